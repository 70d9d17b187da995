// Command fuzz runs every fuzz target of the repository for the same time and
// ends with a table of what each did. Go's own tool fuzzes one target of one
// package per call and forgets the figures; "each parser was fuzzed for ten
// minutes" needs all of them, side by side.
//
//	fuzz [-time 10m] [-jobs N] [-match REGEXP] [-log FILE] [DIR...]
//
// Without DIR it takes all below the working directory. Targets run with one
// worker each, N at once. The exit code is 1 when any target failed or did
// nothing; its output, which names the file with the failing input, is printed
// in full. Figures are appended to FILE as they come, one line per target, so
// that a run that was stopped is not lost.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"sync"
	"syscall"
	"time"
)

func main() {
	var (
		duration = flag.Duration("time", 10*time.Minute, "how long each target runs")
		jobs     = flag.Int("jobs", runtime.NumCPU(), "targets that run at once")
		match    = flag.String("match", "", "only targets whose DIR NAME matches this expression")
		log      = flag.String("log", "", "append each target's figures to this file")
		tags     = flag.String("tags", "libvirt_dlopen,emulated", "build tags")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *duration, *jobs, *match, *log, *tags, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, duration time.Duration, jobs int, match, log, tags string, dirs []string) error {
	pattern, err := regexp.Compile(match)
	if err != nil {
		return fmt.Errorf("-match: %w", err)
	}
	if duration < time.Second || jobs < 1 {
		return fmt.Errorf("-time must be at least 1s and -jobs at least 1")
	}
	if len(dirs) == 0 {
		dirs = []string{"."}
	}
	targets, err := find(dirs, pattern)
	if err != nil {
		return err
	}
	if len(targets) == 0 {
		return fmt.Errorf("no fuzz target in %v matches %q", dirs, match)
	}
	figures := io.Discard
	if log != "" {
		file, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer file.Close() //nolint:errcheck // each line is written as it comes
		figures = file
	}
	rounds := (len(targets) + jobs - 1) / jobs
	fmt.Fprintf(os.Stdout, "%d targets, %s each, %d at once: about %s\n", len(targets), duration, jobs, duration*time.Duration(rounds))
	results := fuzzAll(ctx, targets, duration, jobs, tags, figures)
	if failed := report(os.Stdout, results); failed > 0 {
		return fmt.Errorf("%d of %d targets failed", failed, len(targets))
	}
	return ctx.Err()
}

// fuzzAll runs the targets, jobs at once, and returns results in the order of targets.
func fuzzAll(ctx context.Context, targets []target, duration time.Duration, jobs int, tags string, figures io.Writer) []result {
	results := make([]result, len(targets))
	next := make(chan int)
	var group sync.WaitGroup
	var printing sync.Mutex
	done := 0
	for range jobs {
		group.Go(func() {
			for i := range next {
				results[i] = fuzz(ctx, targets[i], duration, tags)
				printing.Lock()
				done++
				fmt.Fprintf(os.Stdout, "%3d/%d %s\n", done, len(targets), results[i])
				fmt.Fprintf(figures, "%s %s\n", time.Now().UTC().Format(time.RFC3339), results[i])
				printing.Unlock()
			}
		})
	}
	for i := range targets {
		if ctx.Err() != nil {
			results[i] = result{target: targets[i], err: ctx.Err()}
			continue
		}
		next <- i
	}
	close(next)
	group.Wait()
	return results
}
