package arch_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// refusals collects the codes that a folder's own files refuse with, and
// complains of one without remedy or with a code that cannot be found out.
func refusals(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s has no Go files: %v", dir, err)
	}
	set := token.NewFileSet()
	constants, codes := map[string]string{}, map[string]bool{}
	var calls []*ast.CallExpr
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(set, file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ValueSpec:
				for i, name := range n.Names {
					if i < len(n.Values) {
						constants[name.Name], _ = literal(n.Values[i])
					}
				}
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.SelectorExpr); ok && f.Sel.Name == "Refuse" && len(n.Args) >= 3 {
					calls = append(calls, n)
				}
			}
			return true
		})
	}
	for _, call := range calls {
		code, ok := literal(call.Args[0])
		if name, isName := call.Args[0].(*ast.Ident); isName {
			code, ok = constants[name.Name], constants[name.Name] != ""
		}
		if !ok {
			t.Errorf("%s: the refusal's code is no constant", set.Position(call.Pos()))
		}
		if remedy, isLiteral := literal(call.Args[1]); isLiteral && strings.TrimSpace(remedy) == "" {
			t.Errorf("%s: %s has no remedy", set.Position(call.Pos()), code)
		}
		codes[code] = true
	}
	return codes
}

func literal(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	text, err := strconv.Unquote(lit.Value)
	return text, err == nil
}

func TestEveryRefusalOfAGPUHasARemedyAndARow(t *testing.T) {
	codes := map[string]bool{}
	for _, dir := range []string{"gpu", "gpu/ccmode", "gpu/pool", "vfio"} {
		maps.Copy(codes, refusals(t, dir))
	}
	text, err := os.ReadFile(filepath.Join(root, "gpu/CODES.md"))
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z.-]+)` \\| [^|]+ \\| [^| ][^|]* \\|$").FindAllStringSubmatch(string(text), -1) {
		rows = append(rows, m[1])
	}
	if !slices.IsSorted(rows) || len(slices.Compact(slices.Clone(rows))) != len(rows) {
		t.Error("rows of gpu/CODES.md are not in order, or one is there twice")
	}
	for _, code := range slices.Sorted(maps.Keys(codes)) {
		if !slices.Contains(rows, code) {
			t.Errorf("%s has no row with a meaning and a remedy in gpu/CODES.md", code)
		}
	}
	for _, row := range rows {
		if !codes[row] {
			t.Errorf("gpu/CODES.md has %s, which nothing refuses with", row)
		}
	}
	if len(codes) < 50 {
		t.Errorf("only %d codes were found", len(codes))
	}
}
