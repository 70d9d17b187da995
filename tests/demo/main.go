// Command demo runs the product's main job on this machine, step by step and
// with times: sealed inputs and a measured guest go in, an attested answer and
// sealed, signed results come out. Only the silicon is emulated. It cleans up
// after itself and ends with "demo: ok".
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/trial"
)

func main() {
	if !rig.Capable() {
		fmt.Fprintln(os.Stderr, "demo: needs root, to make namespaces; run: sudo make demo")
		os.Exit(1)
	}
	// Building needs the machine's own network when modules are missing.
	if len(os.Args) > 1 && os.Args[1] == "build" {
		if _, err := trial.Build(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	rig.Enter()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	s := newStory(os.Stdout, term.IsTerminal(int(os.Stdout.Fd())))
	err := run(ctx, s)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: failed after %.1f s: %v\n", s.elapsed(), err)
		os.Exit(1)
	}
	fmt.Fprintln(os.Stdout, "demo: ok")
}
