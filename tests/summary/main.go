// Command summary reads `go test -json` and prints what people need of it:
// one line per package, failures in full, at the end every skipped test with
// the capability it misses, and the count. It reads several runs in a row as
// one. A skip that names no capability is a failure: nobody could tell what to
// install to have that test run.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sort"
	"strings"

	"github.com/confidential-node/agent/tests/skip"
)

type event struct {
	Action, Package, Test, Output, ImportPath string
	Elapsed                                   float64
}

func main() {
	failed, err := summarise(os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
	}
	if failed || err != nil {
		os.Exit(1)
	}
}

// summarise copies a run's essence to out and tells whether anything failed.
func summarise(in io.Reader, out io.Writer) (failed bool, err error) {
	var passes, failures int
	output := map[string][]string{}
	skipped := map[string][]string{}
	running := map[string]string{} // test by key, until it ends
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(out, lines.Text()) // not from go test: a build's own words
			continue
		}
		key := e.Package + e.ImportPath + " " + e.Test
		switch {
		case e.Action == "output" || e.Action == "build-output":
			output[key] = append(output[key], e.Output)
		case e.Action == "build-fail":
			failures++
			fmt.Fprintf(out, "FAIL %s does not build\n%s", e.ImportPath, strings.Join(output[key], ""))
		case e.Test == "" && e.Action == "fail":
			failures++
			fmt.Fprintf(out, "FAIL %-70s %6.1fs\n%s", e.Package, e.Elapsed, strings.Join(output[key], ""))
			// A test that the end of the process cut short has no last event.
			for _, unfinished := range slices.Sorted(maps.Keys(running)) {
				if strings.HasPrefix(unfinished, e.Package+" ") {
					fmt.Fprintf(out, "FAIL %s did not end\n%s", running[unfinished], strings.Join(output[unfinished], ""))
					delete(running, unfinished)
				}
			}
		case e.Test == "" && e.Action == "pass":
			fmt.Fprintf(out, "ok   %-70s %6.1fs\n", e.Package, e.Elapsed)
		case e.Action == "pass":
			passes++
		case e.Action == "fail":
			failures++
			fmt.Fprintf(out, "FAIL %s %s\n%s", e.Package, e.Test, strings.Join(output[key], ""))
		case e.Action == "skip" && e.Test != "":
			reason, named := missing(output[key])
			if !named {
				failures++
				fmt.Fprintf(out, "FAIL %s %s skips and names no capability\n%s", e.Package, e.Test, strings.Join(output[key], ""))
				break
			}
			skipped[reason] = append(skipped[reason], e.Package+" "+e.Test)
		}
		switch e.Action {
		case "run":
			running[key] = e.Package + " " + e.Test
		case "pass", "fail", "skip":
			delete(running, key)
		}
		if e.Action != "output" && e.Action != "build-output" && e.Action != "run" && e.Action != "pause" && e.Action != "cont" {
			delete(output, key)
		}
	}
	count := report(out, skipped)
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passes, failures, count)
	return failures > 0 || passes == 0, lines.Err()
}

// missing finds the capability in a skipped test's output.
func missing(lines []string) (capability string, named bool) {
	for _, line := range lines {
		if _, capability, ok := strings.Cut(line, skip.Prefix); ok {
			return strings.TrimSpace(capability), true
		}
	}
	return "", false
}

// report lists the skipped tests by what they miss.
func report(out io.Writer, skipped map[string][]string) (count int) {
	reasons := make([]string, 0, len(skipped))
	for reason := range skipped {
		reasons = append(reasons, reason)
	}
	sort.Strings(reasons)
	for _, reason := range reasons {
		fmt.Fprintf(out, "skipped, missing %s:\n", reason)
		for _, test := range skipped[reason] {
			fmt.Fprintf(out, "  %s\n", test)
			count++
		}
	}
	return count
}
