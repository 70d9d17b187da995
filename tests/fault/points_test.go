//go:build emulated

package fault_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
)

// survived are the points at which some crash test kills the agent, each list
// gone through by the test that is named.
func survived() map[string][]string {
	var whole []string
	for _, c := range matrix() {
		at, _, _ := strings.Cut(c.at, "=")
		whole = append(whole, at)
	}
	return map[string][]string{
		"TestTheAgentIsKilledAtEveryPoint":         whole,
		"TestADeathAtAnyBoundaryLeavesNoGPUBehind": lifecycle.GPUPoints(),
		"TestADeathAnywhereIsRepaired":             pool.Points(),
	}
}

// Every point in the source is one at which a crash test kills the agent: a
// new one that is in no list fails here.
func TestNoFailpointIsLeftOut(t *testing.T) {
	t.Parallel()
	inSource := map[string][]string{}
	for _, root := range []string{"../../nodeagent", "../../gpu", "../../network", "../../vm", "../../vfio"} {
		maps.Copy(inSource, pointsBelow(t, root))
	}
	if len(inSource) != 2 {
		t.Errorf("points in %d packages, expected those of lifecycle and pool: %v", len(inSource), inSource)
	}
	for dir, points := range inSource {
		for _, p := range points {
			if !killedSomewhere(dir, p) {
				t.Errorf("at %s of %s no test kills the agent", p, dir)
			}
		}
	}
}

// killedSomewhere reports whether a point, of which all is known or only what
// it begins with ("begun:"), is in a list of the package's own.
func killedSomewhere(dir, point string) bool {
	for test, list := range survived() {
		if (test == "TestADeathAnywhereIsRepaired") != strings.HasSuffix(dir, "gpu/pool") {
			continue
		}
		if slices.ContainsFunc(list, func(p string) bool {
			return p == point || strings.HasSuffix(point, ":") && strings.HasPrefix(p, point)
		}) {
			return true
		}
	}
	return false
}

// pointsBelow finds the calls of Hit, hook and mark below a folder, by package.
func pointsBelow(t *testing.T, root string) map[string][]string {
	t.Helper()
	packages, files := map[string][]*ast.File{}, token.NewFileSet()
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "/failpoint/") {
			return err
		}
		f, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		packages[filepath.Dir(path)] = append(packages[filepath.Dir(path)], f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]string{}
	for dir, parsed := range packages {
		if points := pointsOf(t, files, parsed); len(points) > 0 {
			found[dir] = points
		}
	}
	return found
}

func pointsOf(t *testing.T, files *token.FileSet, parsed []*ast.File) (points []string) {
	t.Helper()
	texts := map[string]string{}
	for _, f := range parsed {
		ast.Inspect(f, func(n ast.Node) bool {
			if v, is := n.(*ast.ValueSpec); is && len(v.Names) == len(v.Values) {
				for i, value := range v.Values {
					if text, known := textOf(value, nil); known {
						texts[v.Names[i].Name] = text
					}
				}
			}
			return true
		})
	}
	for _, f := range parsed {
		ast.Inspect(f, func(n ast.Node) bool {
			call, is := n.(*ast.CallExpr)
			if !is || len(call.Args) != 1 {
				return true
			}
			to, is := call.Fun.(*ast.SelectorExpr)
			if !is || !slices.Contains([]string{"Hit", "hook", "mark"}, to.Sel.Name) {
				return true
			}
			if passed, is := call.Args[0].(*ast.Ident); is && passed.Name == "point" {
				return true // hook and mark themselves
			}
			point, known := textOf(call.Args[0], texts)
			if point == "" || !known && !strings.HasSuffix(point, ":") {
				t.Errorf("%s: the point is not to be read in the source", files.Position(call.Pos()))
			}
			points = append(points, point)
			return true
		})
	}
	return points
}

// textOf is the constant text of an expression, or its constant beginning.
func textOf(e ast.Expr, constants map[string]string) (text string, whole bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, err == nil && e.Kind == token.STRING
	case *ast.Ident:
		text, known := constants[e.Name]
		return text, known
	case *ast.CallExpr: // string(StepCheck)
		if len(e.Args) == 1 && isString(e.Fun) {
			return textOf(e.Args[0], constants)
		}
	case *ast.BinaryExpr:
		left, known := textOf(e.X, constants)
		if !known || e.Op != token.ADD {
			return left, false
		}
		right, known := textOf(e.Y, constants)
		return left + right, known
	}
	return "", false
}

func isString(e ast.Expr) bool {
	name, is := e.(*ast.Ident)
	return is && name.Name == "string"
}
