package arch_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The map of faults must not promise a test that is not there, nor leave a
// fault or a pitfall out.
func TestTheMapOfFaultsIsTrue(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(root + "/tests/FAULTS.md")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range declared.FindAllSubmatch(source, -1) {
			there[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z]\w+`).FindAllString(string(text), -1)
	if len(named) < 80 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, name := range named {
		if !there[name] {
			t.Errorf("FAULTS.md names %s, which is nowhere", name)
		}
	}
	faults, pitfalls, _ := strings.Cut(string(text), "## Pitfalls")
	rows := regexp.MustCompile(`(?m)^\| \d+ \|`)
	if a, b := len(rows.FindAllString(faults, -1)), len(rows.FindAllString(pitfalls, -1)); a != 45 || b != 30 {
		t.Errorf("%d faults and %d pitfalls, want 45 and 30", a, b)
	}
}
