// Command tenant deploys confidential guests, verifies them and opens their
// results. It owns flags, printing and exit codes; everything else is package
// tenant. It must not print keys or presigned URLs. It runs one verb at a time.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/tenant"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run carries out one command line and returns its exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil {
		explain(stderr, err)
	}
	return tenant.ExitCode(err)
}

// explain prints an error and every other that was joined to it: what happened
// and what to do; of a refusal also its code and what was behind it.
func explain(w io.Writer, err error) {
	for _, part := range parts(err) {
		if _, printed := errors.AsType[*verdictError](part); printed {
			continue // with its checks
		}
		refused, ok := errors.AsType[*contract.Refusal](part)
		if !ok {
			fmt.Fprintf(w, "tenant: %s\n  remedy: %s\n", oneLine(part.Error()), tenant.Remedy(part))
			continue
		}
		text := strings.Replace(part.Error(), refused.Error(), refused.Message, 1)
		if tenant.ExitCode(part) != tenant.ExitUsage {
			text = "refused: " + text
		}
		fmt.Fprintf(w, "tenant: %s\n", oneLine(text))
		if refused.Cause != nil {
			fmt.Fprintf(w, "  cause:  %s\n", oneLine(refused.Cause.Error()))
		}
		fmt.Fprintf(w, "  code:   %s\n  remedy: %s\n", refused.Code, refused.Remedy)
	}
}

// parts takes apart what errors.Join put together, and nothing else.
func parts(err error) (out []error) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || err.Error() != errors.Join(joined.Unwrap()...).Error() {
		return []error{err}
	}
	for _, e := range joined.Unwrap() {
		out = append(out, parts(e)...)
	}
	return out
}

func oneLine(text string) string { return strings.Join(strings.Split(text, "\n"), "; ") }

// app is what all verbs share.
type app struct {
	profile string
	output  string
	timeout time.Duration
	quiet   bool
}

func newRoot() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:   "tenant",
		Short: "Deploy confidential guests and trust only what they prove",
		Long: `tenant seals inputs before they leave this machine, registers keys at your key
broker, deploys confidential guests, verifies their evidence, and opens results
that the attested guest has signed.

Exit codes: 0 success, 1 failed, 2 usage, 3 control plane or broker unreachable,
4 not found, 5 refused or a check does not hold, 6 conflict, 7 timeout.`,
		SilenceUsage: true, SilenceErrors: true,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return tenant.Usage("%v; see %s --help", err, cmd.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.profile, "profile", "tenant.toml", "profile `FILE`")
	f.StringVarP(&a.output, "output", "o", "table", "how to print: table or json")
	f.DurationVar(&a.timeout, "timeout", 0, "give up after this time; 0 waits")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "show no progress")
	deploy := &cobra.Command{Use: "deploy", Short: "Deploy something", Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	deploy.AddCommand(newDeployConfidential(a))
	confidential := &cobra.Command{Use: "confidential", Short: "Prove and use confidential guests", Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	confidential.AddCommand(newAttest(a), newVerify(a), newCall(a))
	root.AddCommand(deploy, confidential, newKeygen(a), newSeal(a), newUpload(a), newResults(a),
		newStatus(a), newWait(a), newStop(a), newRotateKey(a))
	return root
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return tenant.Usage("unknown command or argument %q; see %s --help", args[0], cmd.CommandPath())
	}
	return nil
}

// exactArgs is cobra's, with the usage exit code.
func exactArgs(what ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(what) {
			return tenant.Usage("%s takes %v, got %d arguments; see %s --help", cmd.CommandPath(), what, len(args), cmd.CommandPath())
		}
		return nil
	}
}

func (a *app) reporter(cmd *cobra.Command) tenant.Reporter {
	return newReporter(cmd.ErrOrStderr(), a.quiet)
}

// open reads the profile and prepares the tenant.
func (a *app) open(cmd *cobra.Command) (*tenant.Tenant, error) {
	if a.output != "table" && a.output != "json" {
		return nil, tenant.Usage("-o %q is not table or json", a.output)
	}
	p, err := tenant.LoadProfile(a.profile)
	if err != nil {
		return nil, err
	}
	return tenant.Open(p, a.reporter(cmd))
}

func (a *app) context(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	if a.timeout > 0 {
		return context.WithTimeout(cmd.Context(), a.timeout)
	}
	return context.WithCancel(cmd.Context())
}

// with runs a verb that needs the profile.
func (a *app) with(verb func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		t, err := a.open(cmd)
		if err != nil {
			return err
		}
		ctx, cancel := a.context(cmd)
		defer cancel()
		return verb(ctx, cmd, t, args)
	}
}

// print writes one document, as JSON with its kind or as lines for people.
func (a *app) print(cmd *cobra.Command, kind string, doc any, lines func(io.Writer) error) error {
	if a.output != "json" {
		return lines(cmd.OutOrStdout())
	}
	raw, err := json.Marshal(struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Spec       any    `json:"data"`
	}{"tenant/v1", kind, doc})
	if err != nil {
		return fmt.Errorf("encoding output: %w", err)
	}
	_, err = cmd.OutOrStdout().Write(append(raw, '\n'))
	return err
}
