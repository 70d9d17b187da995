//go:build emulated

package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/confidential-node/agent/tests/trial"
)

// Growth from the first quarter to the last that is no leak: the runtime's own
// threads and arenas settle in that range.
const (
	moreFDs     = 8
	moreThreads = 10
	moreRSS     = 24 << 10 // KiB
)

// sample is the agent between two rounds.
type sample struct {
	rss, fds, threads int // RSS in KiB
	disk              int // KiB of state, the cache of blobs apart
}

// measure looks at the agent and prints a line of progress.
func (s *soak) measure(ctx context.Context, k kind) error {
	dir := filepath.Join("/proc", strconv.Itoa(s.Host.Agent().PID()))
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return fmt.Errorf("measuring the agent: %w", err)
	}
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return fmt.Errorf("measuring the agent: %w", err)
	}
	du, err := s.Host.Output(ctx, "du", "-sk", trial.StateDir)
	if err != nil {
		return err
	}
	x := sample{rss: field(string(status), "VmRSS:"), threads: field(string(status), "Threads:"), fds: len(fds)}
	if _, err := fmt.Sscan(du, &x.disk); err != nil {
		return fmt.Errorf("measuring the disk: %w", err)
	}
	s.samples = append(s.samples, x)
	fmt.Fprintf(os.Stdout, "%6.0f s  round %3d  %-24s launches %3d  RSS %d KiB  fds %d  threads %d  state %d KiB\n",
		time.Since(s.begun).Seconds(), s.rounds, k.name, s.launches, x.rss, x.fds, x.threads, x.disk)
	return nil
}

func field(status, name string) int {
	_, rest, _ := strings.Cut(status, "\n"+name)
	words := strings.Fields(rest)
	if len(words) == 0 {
		return 0
	}
	n, err := strconv.Atoi(words[0])
	if err != nil {
		return 0
	}
	return n
}

func countGoroutines(log string) (int, error) {
	text, err := os.ReadFile(log)
	if err != nil {
		return 0, err
	}
	dump := text[max(0, bytes.LastIndex(text, []byte("SIGQUIT: quit"))):]
	n := bytes.Count(dump, []byte("\ngoroutine "))
	if n < 5 {
		return 0, fmt.Errorf("only %d goroutines in the agent's last words", n)
	}
	return n, nil
}

// figures are the columns of a sample.
func figures() map[string]func(sample) int {
	return map[string]func(sample) int{
		"RSS KiB": func(x sample) int { return x.rss }, "fds": func(x sample) int { return x.fds },
		"threads": func(x sample) int { return x.threads }, "state KiB": func(x sample) int { return x.disk },
	}
}

// quarters are the means of the first and the last.
func (s *soak) quarters(of func(sample) int) (first, last int) {
	n := max(1, len(s.samples)/4)
	mean := func(part []sample) int {
		sum := 0
		for _, x := range part {
			sum += of(x)
		}
		return sum / n
	}
	return mean(s.samples[:n]), mean(s.samples[len(s.samples)-n:])
}

func (s *soak) table() {
	fmt.Fprintf(os.Stdout, "\n%d rounds, %d launches, %d stops in %s; libvirtd was stuck and restarted %d times\n", s.rounds, s.launches, s.stops, time.Since(s.begun).Round(time.Second), s.remedied)
	for _, name := range slices.Sorted(maps.Keys(s.kinds)) {
		fmt.Fprintf(os.Stdout, "  %-26s %d\n", name, s.kinds[name])
	}
	fmt.Fprintf(os.Stdout, "%-12s %10s %10s %14s %14s\n", "", "max", "final", "first quarter", "last quarter")
	for _, name := range slices.Sorted(maps.Keys(figures())) {
		of := figures()[name]
		most := 0
		for _, x := range s.samples {
			most = max(most, of(x))
		}
		first, last := s.quarters(of)
		fmt.Fprintf(os.Stdout, "%-12s %10d %10d %14d %14d\n", name, most, of(s.samples[len(s.samples)-1]), first, last)
	}
}

// trend is an error when the agent has grown.
func (s *soak) trend() error {
	for name, more := range map[string]int{"RSS KiB": moreRSS, "fds": moreFDs, "threads": moreThreads} {
		if first, last := s.quarters(figures()[name]); last > first+more {
			return fmt.Errorf("%s grew from %d in the first quarter to %d in the last", name, first, last)
		}
	}
	return nil
}
