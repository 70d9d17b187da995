package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/tests/skip"
)

// goStub stands in for go: builds and vets nothing, and answers each of the
// two test runs with the events and the exit code of the files RUN and
// RUN.code, the first for the tags without "emulated".
const goStub = `#!/bin/sh
run=emulated
case "$*" in
"run ./tests/summary") exec "$SUMMARY" ;;
test*,emulated*) ;;
test*) run=shipped ;;
*) exit 0 ;;
esac
cat "$STUB/$run"
exit "$(cat "$STUB/$run.code")"
`

// TestMain lets the stub run this binary as the command.
func TestMain(m *testing.M) {
	if os.Getenv("SUMMARY") != "" {
		main()
		return
	}
	m.Run()
}

// `make test` fails whenever one of its runs does, whether or not events tell
// so, and lists the skips of both.
func TestMakeTestFailsWhenEitherRunDoes(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"make", "bash"} {
		if _, err := exec.LookPath(tool); err != nil {
			skip.Missing(t, tool)
		}
	}
	const (
		good    = `{"Action":"pass","Package":"p","Test":"TestA"}` + "\n"
		skipped = `{"Action":"output","Package":"q","Test":"TestB","Output":"capability missing: root\n"}
{"Action":"skip","Package":"q","Test":"TestB"}
`
		bad = `{"Action":"fail","Package":"p","Test":"TestA"}` + "\n"
	)
	for name, c := range map[string]struct {
		shipped, emulated         string
		shippedCode, emulatedCode string
		fails                     bool
		want                      string
	}{
		"both pass":                  {good + skipped, good, "0", "0", false, "missing root:\n  q TestB\n2 passed, 0 failed, 1 skipped\n"},
		"the shipped tags fail":      {bad, good, "1", "0", true, "FAIL p TestA\n"},
		"the emulated tags fail":     {good, bad, "0", "1", true, "FAIL p TestA\n"},
		"the shipped run is killed":  {good, good, "137", "0", true, ""},
		"the emulated run is killed": {good, good, "0", "137", true, ""},
		"only the events tell":       {good, bad, "0", "0", true, "FAIL p TestA\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			for file, text := range map[string]string{
				"shipped": c.shipped, "shipped.code": c.shippedCode, "emulated": c.emulated, "emulated.code": c.emulatedCode, "go": goStub,
			} {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o700); err != nil { //nolint:gosec // one is run
					t.Fatal(err)
				}
			}
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "make", "-o", "setup", "test")
			cmd.Dir = "../.."
			cmd.Env = []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "STUB=" + dir, "SUMMARY=" + self}
			out, err := cmd.CombinedOutput()
			if (err != nil) != c.fails || !strings.Contains(string(out), c.want) {
				t.Errorf("make says %v; no %q in\n%s", err, c.want, out)
			}
		})
	}
}
