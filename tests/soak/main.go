//go:build emulated

// Command soak launches guests on a trial platform and breaks things at random
// for as long as it is told, from a seed that it prints: `make soak
// DURATION=2h SEED=n`. After every round the guests must have ended once, the
// host must be clean, and the agent must not have grown; a violation ends it
// with exit code 1, the seed and every step. It runs one round at a time and
// touches nothing outside its namespaces.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/rig"
)

func main() {
	duration := flag.Duration("duration", 2*time.Hour, "how long rounds are begun")
	seed := flag.Uint64("seed", 0, "what decides every round; 0 takes one of the clock")
	flag.Parse()
	rig.Enter()
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *duration, *seed)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "soak: %v\nagain: make soak DURATION=%s SEED=%d\n", err, *duration, *seed)
		os.Exit(1)
	}
}

func run(ctx context.Context, duration time.Duration, seed uint64) (err error) {
	fmt.Fprintf(os.Stdout, "seed %d, %s\n", seed, duration)
	f, err := fault.New(ctx)
	if err != nil {
		return err
	}
	s := &soak{Field: f, random: rand.New(rand.NewPCG(seed, 0)), kinds: map[string]int{}, begun: time.Now()} //nolint:gosec // to be repeated
	defer func() {
		if err != nil {
			for _, step := range s.steps {
				fmt.Fprintln(os.Stdout, step)
			}
			for name, text := range f.LogTails(60) {
				fmt.Fprintf(os.Stdout, "%s:\n%s\n", name, text)
			}
		}
		err = errors.Join(err, f.Close())
	}()
	for time.Since(s.begun) < duration {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.round(ctx); err != nil {
			return fmt.Errorf("round %d: %w", s.rounds, err)
		}
	}
	if err := s.goroutines(ctx); err != nil {
		return err
	}
	s.table()
	return s.trend()
}
