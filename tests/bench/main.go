// Command bench compares what the agent does with the plainest way to do the
// same, on this machine, in one run: ratios carry over to other machines, the
// times beside them do not. It starts a platform of its own (package trial)
// with the agent's state and cache on the checkout's disk, prints one table
// per topic, and leaves nothing behind. It judges nothing: the number to reach
// stands above each table. One goroutine measures; nothing else should run on
// the machine meanwhile.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"

	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/trial"
)

// Verbs besides measuring. fetchVerb and uploadVerb are the children that are
// measured.
const (
	buildVerb  = "build"
	fetchVerb  = "fetch"
	uploadVerb = "upload"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	var verb string
	if len(os.Args) > 1 {
		verb = os.Args[1]
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch verb {
	case buildVerb:
		// Building needs the machine's own network when modules are missing.
		_, err := trial.Build(ctx)
		return err
	case fetchVerb:
		return fetchChild(ctx, os.Stdin)
	case uploadVerb:
		return uploadChild(ctx, os.Stdin)
	}
	keep, match, err := arguments(os.Args[1:])
	if err != nil {
		return err
	}
	if !rig.Capable() {
		return errors.New("needs root, to make namespaces; run: sudo make bench")
	}
	rig.Enter()
	r, err := measureAll(ctx, os.Stdout, match)
	if err != nil || keep == "" {
		return err
	}
	return r.save(keep)
}

// arguments returns the file that -o json names, or "", and which topics to
// measure.
func arguments(args []string) (keep string, match *regexp.Regexp, err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	topics := flags.String("match", "", "`REGEXP` of topics to measure, of launches, launch digest, blob fetch, result upload, idle agent")
	format := flags.String("o", "table", "table, or json FILE to keep every round in FILE as well")
	if err := flags.Parse(args); err != nil {
		return "", nil, err
	}
	if match, err = regexp.Compile(*topics); err != nil {
		return "", nil, fmt.Errorf("reading -match: %w", err)
	}
	switch {
	case *format == "table" && flags.NArg() == 0:
		return "", match, nil
	case *format == "json" && flags.NArg() == 1:
		return flags.Arg(0), match, nil
	}
	return "", nil, errors.New("usage: bench [-match REGEXP] [-o json FILE]")
}
