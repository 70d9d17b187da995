package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// module writes a module with two targets, of which one fails at once.
func module(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod": "module example.org/m\ngo 1.26\n",
		"p/p_test.go": `package p
import "testing"
func FuzzGood(f *testing.F) { f.Fuzz(func(t *testing.T, b []byte) {}) }
func FuzzBad(f *testing.F) { f.Add([]byte{1}); f.Fuzz(func(t *testing.T, b []byte) { t.Fatal("broken") }) }
func Fuzzy() {}
`,
		"p/testdata/x_test.go": "package x\nimport \"testing\"\nfunc FuzzHidden(f *testing.F) {}\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestEveryTargetIsFoundAndNothingElse(t *testing.T) {
	t.Chdir(module(t))
	targets, err := find([]string{"."}, regexp.MustCompile(""))
	if err != nil {
		t.Fatal(err)
	}
	want := []target{{"./p", "FuzzBad"}, {"./p", "FuzzGood"}}
	if len(targets) != 2 || targets[0] != want[0] || targets[1] != want[1] {
		t.Fatalf("found %v, want %v", targets, want)
	}
}

func TestATargetThatFailsIsAFailureAndTheOtherHasFigures(t *testing.T) {
	t.Chdir(module(t))
	targets, err := find([]string{"."}, regexp.MustCompile(""))
	if err != nil {
		t.Fatal(err)
	}
	var figures, table strings.Builder
	results := fuzzAll(t.Context(), targets, time.Second, 2, "", &figures)
	if failed := report(&table, results); failed != 1 {
		t.Fatalf("%d failures, want FuzzBad alone:\n%s", failed, table.String())
	}
	if results[0].err == nil || !strings.Contains(table.String(), "broken") {
		t.Errorf("FuzzBad: %v; its output is missing from the table:\n%s", results[0].err, table.String())
	}
	if results[1].err != nil || results[1].executions == 0 {
		t.Errorf("FuzzGood: %+v, want executions", results[1])
	}
	if strings.Count(figures.String(), "\n") != 2 {
		t.Errorf("log has not one line per target:\n%s", figures.String())
	}
}

func TestTheEndOfTheTimeIsNoFailure(t *testing.T) {
	const ended = "fuzz: elapsed: 1s, execs: 75665 (74459/sec), new interesting: 0 (total: 1)\n--- FAIL: FuzzGood (1.02s)\n    context deadline exceeded\nFAIL\n"
	for output, want := range map[string]bool{
		ended:                                true,
		ended + "Failing input written to x": false,
		strings.ReplaceAll(ended, "context deadline exceeded", "broken"): false,
	} {
		if got := outOfTime(output, time.Second, time.Second); got != want {
			t.Errorf("%v for %q", got, output)
		}
	}
	if outOfTime(ended, time.Second, time.Minute) {
		t.Error("a target that ended early is taken for one whose time was over")
	}
}

func TestFiguresAreOfTheLastLine(t *testing.T) {
	got := figures(`fuzz: elapsed: 0s, gathering baseline coverage: 0/20 completed
fuzz: elapsed: 3s, execs: 100 (33/sec), new interesting: 1 (total: 21)
fuzz: elapsed: 10m0s, execs: 123456 (205/sec), new interesting: 7 (total: 27)
PASS`)
	if got.elapsed != 10*time.Minute || got.executions != 123456 || got.fresh != 7 || got.corpus != 27 {
		t.Fatalf("got %+v", got)
	}
}
