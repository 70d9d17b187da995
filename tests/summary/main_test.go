package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestSummaryNamesFailuresSkipsAndCounts(t *testing.T) {
	t.Parallel()
	in := `{"Action":"output","Package":"p","Test":"TestA","Output":"boom\n"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"pass","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Test":"TestC","Output":"x_test.go:1: capability missing: root\n"}
{"Action":"skip","Package":"p","Test":"TestC"}
{"Action":"fail","Package":"p"}
`
	var out bytes.Buffer
	failed, err := summarise(strings.NewReader(in), &out)
	if err != nil || !failed {
		t.Errorf("failed is %v, %v", failed, err)
	}
	for _, want := range []string{"boom", "skipped, missing root:\n  p TestC", "1 passed, 2 failed, 1 skipped\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if failed, err := summarise(strings.NewReader(`{"Action":"pass","Package":"p","Test":"TestB"}`), &out); failed || err != nil {
		t.Errorf("a good run fails: %v", err)
	}
	if failed, _ := summarise(strings.NewReader(""), &out); !failed {
		t.Error("a run without tests passes")
	}
}

func TestASkipThatNamesNoCapabilityIsAFailure(t *testing.T) {
	t.Parallel()
	in := `{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestB","Output":"x_test.go:1: not today\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
{"Action":"pass","Package":"p"}
{"Action":"skip","Package":"without/tests"}
`
	var out bytes.Buffer
	failed, err := summarise(strings.NewReader(in), &out)
	if err != nil || !failed {
		t.Errorf("failed is %v, %v", failed, err)
	}
	for _, want := range []string{"FAIL p TestB skips and names no capability\nx_test.go:1: not today\n", "1 passed, 1 failed, 0 skipped\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

// A process that dies in the middle of a test leaves no verdict on it; what
// the test had said is all there is to go by.
func TestATestThatWasCutShortIsNamedWithItsWords(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	failed, err := summarise(strings.NewReader(`{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"fine\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Test":"TestB","Output":"last words\n"}
{"Action":"fail","Package":"p","Elapsed":1}
`), &out)
	if err != nil || !failed {
		t.Errorf("%v %v", failed, err)
	}
	if text := out.String(); !strings.Contains(text, "p TestB did not end\nlast words") || strings.Contains(text, "fine") {
		t.Errorf("summary:\n%s", text)
	}
}
