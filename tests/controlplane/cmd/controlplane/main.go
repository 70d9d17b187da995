// Command controlplane runs the reference control plane (serve) and drives
// nodes through it (every other verb). It owns flags, printing and exit codes;
// the rest is package controlplane and its client. It must not print launches:
// they carry presigned URLs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/tests/controlplane"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// Exit codes, the same for every verb.
const (
	exitOK           = 0
	exitFailed       = 1
	exitUsage        = 2
	exitUnreachable  = 3
	exitNotFound     = 4
	exitPrecondition = 5
	exitTimeout      = 7
)

// usageError is a wrong invocation.
type usageError struct{ error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// execute runs one command line and returns its exit code.
func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	refused, isRefusal := errors.AsType[*contract.Refusal](err)
	if isRefusal {
		fmt.Fprintf(stderr, "controlplane: refused: %s\n  code:   %s\n  remedy: %s\n", refused.Message, refused.Code, refused.Remedy)
	} else {
		fmt.Fprintf(stderr, "controlplane: %v\n", err)
	}
	_, wrong := errors.AsType[usageError](err)
	switch {
	case wrong:
		return exitUsage
	case isRefusal && (strings.HasSuffix(refused.Code, "-unknown") || strings.HasSuffix(refused.Code, "-not-found")):
		return exitNotFound
	case isRefusal:
		return exitPrecondition
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	case errors.Is(err, client.ErrUnreachable):
		return exitUnreachable
	case errors.Is(err, os.ErrNotExist):
		return exitNotFound
	}
	return exitFailed
}

// app is what all verbs share.
type app struct {
	dir                    string
	url, caFile, tokenFile string
	format                 output.Format
	timeout                time.Duration
}

func newRoot() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:   "controlplane",
		Short: "Drive nodes: a reference control plane and its tool",
		Long: `controlplane serves a reference control plane (NATS JetStream for nodes, HTTPS
for everybody else) and sends commands through it.

Exit codes: 0 success, 1 failed, 2 usage, 3 control plane unreachable,
4 not found, 5 refused, 7 timeout.`,
		SilenceUsage: true, SilenceErrors: true,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage("%w; see %s --help", err, cmd.CommandPath()) })
	f := root.PersistentFlags()
	f.StringVar(&a.dir, "dir", "controlplane", "`FOLDER` of the control plane: keys, counters, streams, and how to reach it")
	f.StringVar(&a.url, "url", "", "the API's `URL` (default: from --dir)")
	f.StringVar(&a.caFile, "ca", "", "CA `FILE` of the API (default: from --dir)")
	f.StringVar(&a.tokenFile, "token-file", "", "`FILE` with the API's token (default: from --dir)")
	f.VarP(&a.format, "output", "o", "how to print")
	f.DurationVar(&a.timeout, "timeout", 0, "give up after this time; 0 waits")
	root.AddCommand(a.serve(), a.enrol(), a.nodes(), a.cordon(), a.uncordon(), a.resolve(), a.revoke(), a.launch(), a.guest(), a.stop(), a.evidence(), a.events(), a.schema())
	return root
}

// exactArgs is cobra's, with the usage exit code.
func exactArgs(what ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(what) {
			return usage("%s takes %d argument(s) %v, got %q; see %s --help", cmd.CommandPath(), len(what), what, args, cmd.CommandPath())
		}
		return nil
	}
}

// open returns a client and the context of the verb.
func (a *app) open(cmd *cobra.Command) (context.Context, *client.Client, func(), error) {
	read := func(path, fallback string) (string, error) {
		if path == "" {
			path = filepath.Join(a.dir, fallback)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return "", fmt.Errorf("finding the control plane: %w; give --dir, or --url, --ca and --token-file", err)
		}
		return string(data), nil
	}
	url := a.url
	var err error
	if url == "" {
		if url, err = read("", controlplane.URLFile); err != nil {
			return nil, nil, nil, err
		}
	}
	ca, err := read(a.caFile, controlplane.CAFile)
	if err != nil {
		return nil, nil, nil, err
	}
	token, err := read(a.tokenFile, controlplane.TokenFile)
	if err != nil {
		return nil, nil, nil, err
	}
	c, err := client.New(strings.TrimSpace(url), []byte(ca), strings.TrimSpace(token))
	if err != nil {
		return nil, nil, nil, usageError{err}
	}
	ctx, cancel := cmd.Context(), context.CancelFunc(func() {})
	if a.timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
	}
	return ctx, c, func() { cancel(); c.Close() }, nil
}
