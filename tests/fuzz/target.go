package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// target is one fuzz function.
type target struct {
	dir  string // of its package, "./firmware/ovmf"
	name string // "FuzzParse"
}

// result is what one target did.
type result struct {
	target
	elapsed    time.Duration // of fuzzing, without building
	executions int64
	fresh      int64  // inputs found in this run that reach new code
	corpus     int64  // inputs known at the end that reach different code
	output     string // of a target that failed
	err        error
}

func (r result) String() string {
	line := fmt.Sprintf("%-28s %-32s %8s %11d execs %5d new %6d total", r.dir, r.name, r.elapsed, r.executions, r.fresh, r.corpus)
	if r.err != nil {
		line += " FAILED: " + r.err.Error()
	}
	return line
}

// find returns the fuzz targets below dirs whose "DIR NAME" matches, sorted.
// Hidden folders and testdata are not searched.
func find(dirs []string, match *regexp.Regexp) ([]target, error) {
	var targets []target
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case entry.IsDir() && path != dir && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata"):
				return fs.SkipDir
			case entry.IsDir() || !strings.HasSuffix(path, "_test.go"):
				return nil
			}
			names, err := fuzzFunctions(path)
			for _, name := range names {
				t := target{dir: "./" + filepath.Clean(filepath.Dir(path)), name: name}
				if match.MatchString(t.dir + " " + t.name) {
					targets = append(targets, t)
				}
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(targets, func(a, b target) int {
		return cmp.Or(cmp.Compare(a.dir, b.dir), cmp.Compare(a.name, b.name))
	})
	return slices.Compact(targets), nil
}

// fuzzFunctions returns the names of a test file's functions FuzzX(*testing.F).
func fuzzFunctions(path string) ([]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, declaration := range file.Decls {
		function, ok := declaration.(*ast.FuncDecl)
		if ok && function.Recv == nil && strings.HasPrefix(function.Name.Name, "Fuzz") && len(function.Type.Params.List) == 1 {
			names = append(names, function.Name.Name)
		}
	}
	return names, nil
}

// fuzz runs one target. Minimising is cut short: a target that is slow per
// input would otherwise spend its time on making one input smaller.
func fuzz(ctx context.Context, t target, duration time.Duration, tags string) result {
	command := exec.CommandContext(ctx, "go", "test", "-tags", tags, "-run", "^$",
		"-fuzz", "^"+t.name+"$", "-fuzztime", duration.String(), "-fuzzminimizetime", "10x", "-parallel", "1", t.dir)
	// Workers must not outlive a run that was stopped.
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGTERM) }
	command.WaitDelay = 10 * time.Second
	output, err := command.CombinedOutput()
	r := figures(string(output))
	r.target = t
	switch {
	case ctx.Err() != nil:
		r.err = ctx.Err()
	case err != nil && !outOfTime(string(output), r.elapsed, duration):
		r.err, r.output = err, string(output)
	case r.executions == 0:
		r.err, r.output = errors.New("nothing was executed"), string(output)
	}
	return r
}

// outOfTime tells Go's own mistake of calling the end of the fuzzing time a
// failure, when it comes while a worker is between two inputs, from a failure:
// the time is over, and no input was written down.
func outOfTime(output string, elapsed, duration time.Duration) bool {
	return elapsed >= duration.Truncate(time.Second) && strings.Contains(output, "context deadline exceeded") &&
		!strings.Contains(output, "Failing input written") && !strings.Contains(output, "panic:")
}

// figures reads the last progress line of `go test -fuzz`.
func figures(output string) (r result) {
	progress := regexp.MustCompile(`fuzz: elapsed: (\S+), execs: (\d+) \(\d+/sec\)(?:, new interesting: (\d+) \(total: (\d+)\))?`)
	for _, match := range progress.FindAllStringSubmatch(output, -1) {
		r.elapsed, _ = time.ParseDuration(match[1])
		r.executions = number(match[2])
		r.fresh, r.corpus = number(match[3]), number(match[4])
	}
	return r
}

func number(digits string) int64 {
	n, _ := strconv.ParseInt(digits, 10, 64)
	return n
}

// report prints the table, failures last and whole, and counts the failures.
func report(out io.Writer, results []result) (failed int) {
	var total int64
	fmt.Fprintln(out)
	for _, r := range results {
		fmt.Fprintln(out, r)
		total += r.executions
		if r.err != nil {
			failed++
		}
	}
	fmt.Fprintf(out, "%d targets, %d executions, %d failed\n", len(results), total, failed)
	for _, r := range results {
		if r.output != "" {
			fmt.Fprintf(out, "\n%s %s\n%s", r.dir, r.name, r.output)
		}
	}
	return failed
}
