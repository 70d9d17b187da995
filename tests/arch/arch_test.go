// Package arch_test enforces the shape of the house: which folder may import
// which, that every package says what it owns, and that what is shipped
// cannot emulate silicon.
package arch_test

import (
	"bytes"
	"encoding/json"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	module = "github.com/confidential-node/agent/"
	root   = "../.."
)

// mayImport is the arrow between top-level folders, besides each its own.
// firmware/contract is open to all; tests may import everything.
func mayImport() map[string]map[string]string {
	const (
		leaf   = "leaves import no sibling and never the agent, so that each can be read, tested and replaced alone"
		middle = "vm never imports the agent: guests are started for whoever asks"
		top    = "nothing imports tests but tests"
	)
	return map[string]map[string]string{
		"nodeagent": {"vm": "", "vfio": "", "gpu": "", "firmware": "", "network": "", "": top},
		"vm":        {"vfio": "", "gpu": "", "firmware": "", "network": "", "": middle},
		"gpu":       {"vfio": "", "": leaf},
		"vfio":      {"": leaf},
		"firmware":  {"": leaf},
		"network":   {"": leaf},
		"packaging": {"": leaf},
	}
}

// forbidden returns why from may not import to, "" when it may.
func forbidden(from, to string) string {
	fromTop, _, _ := strings.Cut(from, "/")
	toTop, _, _ := strings.Cut(to, "/")
	rules, known := mayImport()[fromTop]
	if !known && fromTop != "tests" {
		return "no rule for the top-level folder " + fromTop + ": decide in mayImport what it may import"
	}
	if fromTop == "tests" {
		return ""
	}
	if strings.HasSuffix(to, "test") && !strings.HasSuffix(from, "test") {
		return "what plays hardware, and can mint its evidence, is for tests and for other players"
	}
	if fromTop == toTop || to == "firmware/contract" {
		return ""
	}
	if _, allowed := rules[toTop]; allowed {
		return ""
	}
	return rules[""]
}

// files calls visit for every Go file that is not a test, with its package.
func files(t *testing.T, visit func(pkg, path string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && d.Name() != ".." || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			rel, err := filepath.Rel(root, filepath.Dir(path))
			if err != nil {
				return err
			}
			visit(filepath.ToSlash(rel), path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestImportsFollowTheArrow(t *testing.T) {
	t.Parallel()
	seen := 0
	files(t, func(pkg, path string) {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		// A package that imports nothing of ours still needs a folder with rules.
		if why := forbidden(pkg, pkg); why != "" {
			t.Errorf("%s: %s", path, why)
		}
		for _, spec := range f.Imports {
			to, ours := strings.CutPrefix(strings.Trim(spec.Path.Value, `"`), module)
			if !ours {
				continue
			}
			seen++
			if why := forbidden(pkg, to); why != "" {
				t.Errorf("%s imports %s: %s", path, to, why)
			}
		}
	})
	if seen == 0 {
		t.Error("no imports found: the test looks in the wrong place")
	}
}

func TestTheArrowItself(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, to string
		allowed  bool
	}{
		{"nodeagent", "vm/domain", true},
		{"nodeagent/admit", "gpu", true},
		{"vm", "firmware/contract", true},
		{"gpu", "vfio", true},
		{"gpu", "firmware/contract", true},
		{"firmware/snp", "firmware/contract", true},
		{"tests/rig", "nodeagent/api", true},
		{"gpu/rim/rimtest", "gpu/spdm/spdmtest", true},
		{"tests/attester", "gpu/spdm/spdmtest", true},
		{"gpu/evidence", "gpu/spdm/spdmtest", false},
		{"nodeagent", "firmware/snp/snptest", false},
		{"vm", "nodeagent/api", false},
		{"gpu", "firmware/snp", false},
		{"vfio", "gpu", false},
		{"network", "vm", false},
		{"firmware/image", "vm", false},
		{"nodeagent", "tests/skip", false},
		{"firmware/snp", "tests/rig", false},
		{"unheard-of", "unheard-of/of", false},
		{"unheard-of/of", "firmware/contract", false},
		{"nodeagent", "unheard-of", false},
	} {
		if got := forbidden(c.from, c.to) == ""; got != c.allowed {
			t.Errorf("%s may import %s: %v, want %v", c.from, c.to, got, c.allowed)
		}
	}
}

func TestEveryPackageSaysWhatItOwns(t *testing.T) {
	t.Parallel()
	documented := map[string]int{}
	files(t, func(pkg, path string) {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Fatal(err)
		}
		documented[pkg] += len(f.Doc.Text())
	})
	for pkg, size := range documented {
		if size < 100 && !strings.Contains(pkg, "/cmd/") {
			t.Errorf("package %s has a comment of %d characters: say what it owns, what it must not do, and its concurrency rule", pkg, size)
		}
	}
}

// The shipped agent must not hold a path to an emulated TEE. The agent built
// with the tag shows that the markers are what such a path leaves behind.
func TestTheShippedAgentCannotEmulate(t *testing.T) {
	t.Parallel()
	markers := []string{
		"org.confidential-node.psp",                 // the guest's port to the process playing the PSP
		"opt/org.confidential-node/emulated-launch", // policy and HOST_DATA for that process
		"force-raw=on",                              // the hash table, loaded by QEMU's generic loader
		"writing hash table",                        // its file
		"NODEAGENT_FAILPOINTS",                      // faults for tests
		"unknown fault %q",                          // and what carries them out
	}
	for _, c := range []struct {
		tags     string
		emulated bool
	}{{"libvirt_dlopen", false}, {"libvirt_dlopen,emulated", true}} {
		binary := filepath.Join(t.TempDir(), "nodeagent")
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-tags", c.tags, "-o", binary, root+"/nodeagent").CombinedOutput(); err != nil {
			t.Fatalf("building with %s: %v\n%s", c.tags, err, out)
		}
		out, err := exec.CommandContext(t.Context(), binary, "version", "-o", "json").Output()
		var v struct {
			Emulated *bool `json:"emulated"`
		}
		if err != nil || json.Unmarshal(out, &v) != nil || v.Emulated == nil || *v.Emulated != c.emulated {
			t.Errorf("built with %s: version says %s (%v)", c.tags, out, err)
		}
		text, err := os.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		for _, marker := range markers {
			if got := bytes.Contains(text, []byte(marker)); got != c.emulated {
				t.Errorf("built with %s: the agent holds %q is %v, want %v", c.tags, marker, got, c.emulated)
			}
		}
	}
}
