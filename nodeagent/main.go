// Command nodeagent is the daemon of a GPU provider's host, and the tool
// around it: `run` is the daemon, `status` asks it, `measure` predicts launch
// digests, `firmware` looks at images, `verify` checks evidence,
// `endorsements` keeps the certificates behind it, `capability` says what the
// host can do, `gpu` shows and orders the agent's GPUs, `platform` changes its
// SEV firmware. Only the composition happens in this package: run.go is the one
// wiring list, every other file is a verb.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/store"
)

// Exit codes, the same for every verb.
const (
	exitOK           = 0
	exitFailed       = 1
	exitUsage        = 2
	exitUnreachable  = 3
	exitNotFound     = 4
	exitPrecondition = 5
	exitConflict     = 6
	exitTimeout      = 7
)

// exitError carries the exit code of a failure whose text is err's. A nil err
// means that everything worth saying was already printed.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func usageError(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// execute runs one command line and returns its exit code.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	exit, typed := errors.AsType[*exitError](err)
	if !typed || exit.err != nil {
		fmt.Fprintf(stderr, "nodeagent: %v\n", err)
	}
	if refusal, ok := errors.AsType[*contract.Refusal](err); ok {
		fmt.Fprintf(stderr, "  what to do: %s\n", refusal.Remedy)
	}
	return exitCode(err)
}

// exitCode is the one of a verb that failed with err.
func exitCode(err error) int {
	refusal, _ := errors.AsType[*contract.Refusal](err)
	exit, typed := errors.AsType[*exitError](err)
	switch {
	case typed:
		return exit.code
	case refusal != nil && slices.Contains([]string{store.CodeInUse, pool.CodeInUse, pool.CodeBusy}, refusal.Code):
		return exitConflict
	case refusal != nil && refusal.Code == pool.CodeNotManaged:
		return exitNotFound
	case refusal != nil:
		return exitPrecondition
	case errors.Is(err, admin.ErrUnreachable):
		return exitUnreachable
	case errors.Is(err, os.ErrNotExist):
		return exitNotFound
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	default:
		return exitFailed
	}
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "nodeagent",
		Short: "Rent out confidential GPU machines from this host",
		Long: `nodeagent turns a bare-metal AMD EPYC host into one that rents out confidential
machines: it starts SEV-SNP guests for a control plane, moves only ciphertext and
launch measurements, and can prove what it started.

Exit codes: 0 success, 1 failed, 2 usage, 3 agent unreachable, 4 not found,
5 precondition or check not met, 6 conflict, 7 timeout.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError("unknown command %q; see nodeagent --help", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError("%w; see %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(newRunCommand(), newStatusCommand(), newClockCommand(), newMeasureCommand(), newFirmwareCommand(), newVerifyCommand(), newCapabilityCommand(), newEndorsementsCommand(), newGPUCommand(), newPlatformCommand("/", host.Linux{}), newAuditCommand(), newWriteAttributeCommand(), newVersionCommand(), newSchemaCommand())
	return root
}

// exactArgs is cobra's, with the usage exit code.
func exactArgs(what ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(what) {
			return usageError("%s takes %d argument(s) %v, got %d; see %s --help", cmd.CommandPath(), len(what), what, len(args), cmd.CommandPath())
		}
		return nil
	}
}
