package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/tests/tenant"
)

func newResults(a *app) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "results N --out DIR",
		Short: "Fetch, verify and open what the guest produced",
		Long: `Fetch the results, check the signature of their list under the key that verified
evidence binds, check every file against the list, and open it. Anything else is
refused.`,
		Args: exactArgs("N"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			if out == "" {
				return tenant.Usage("--out is required")
			}
			r, err := t.Results(ctx, args[0], out)
			if err != nil {
				return err
			}
			return a.print(cmd, "Results", r, func(w io.Writer) error {
				var b strings.Builder
				fmt.Fprintf(&b, "workload exit code %d, signed by the attested guest\n", r.ExitCode)
				for _, f := range r.Files {
					fmt.Fprintf(&b, "✓ %s/%s\n", out, f)
				}
				for _, f := range r.Missing {
					fmt.Fprintf(&b, "- %s was not produced\n", f)
				}
				_, err := io.WriteString(w, b.String())
				return err
			})
		}),
	}
	cmd.Flags().StringVar(&out, "out", "", "folder for the opened results (required)")
	return cmd
}

func newStatus(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "status [N]", Short: "Show a deployment, or list all",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return tenant.Usage("%s takes at most one name", cmd.CommandPath())
			}
			return nil
		},
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			if len(args) == 0 {
				names, err := t.List()
				if err != nil {
					return err
				}
				return a.print(cmd, "DeploymentList", names, func(w io.Writer) error {
					for _, n := range names {
						if _, err := fmt.Fprintln(w, n); err != nil {
							return err
						}
					}
					return nil
				})
			}
			s, err := t.Status(ctx, args[0])
			if err != nil {
				return err
			}
			return a.print(cmd, "DeploymentStatus", s, func(w io.Writer) error { return showStatus(w, s) })
		}),
	}
}

func showStatus(w io.Writer, s *tenant.Status) error {
	var b strings.Builder
	d := s.Deployment
	fmt.Fprintf(&b, "name      %s\nstage     %s\nlaunch    %s\nimage     %s (asked for %s)\n", d.Name, d.Stage, d.LaunchID, d.Image, d.RequestedImage)
	if s.Guest != nil {
		fmt.Fprintf(&b, "guest     %s on %s: %s %s\n", d.GuestID, d.Node, s.State, s.Guest.Phase)
		for guest, host := range s.Guest.Ports {
			at := fmt.Sprint(host)
			if name := s.Guest.ServerNames[guest]; name != "" {
				at = name + ":" + at
			}
			fmt.Fprintf(&b, "port      %d published as %s\n", guest, at)
		}
		if r := s.Guest.Refusal; r != nil {
			fmt.Fprintf(&b, "refused   %s\n  code:   %s\n  remedy: %s\n", r.Message, r.Code, r.Remedy)
		}
	}
	if s.Broker != nil {
		fmt.Fprintf(&b, "broker    %d of %d releases, %d refusals\n", len(s.Broker.Releases), s.Broker.MaxReleases, s.Broker.RefusalCount)
		for _, r := range s.Broker.Releases {
			fmt.Fprintf(&b, "  released %s to chip %.16s…\n", r.At.Format(time.RFC3339), r.ChipID)
			for _, g := range r.GPUs {
				fmt.Fprintf(&b, "    with GPU %s, PDI %s, mode %s\n", g.Chip, g.PDI, g.Mode)
			}
		}
		for _, r := range s.Broker.Refusals {
			fmt.Fprintf(&b, "  refused  %s %s: %s\n    remedy: %s\n", r.At.Format(time.RFC3339), r.Refusal.Code, r.Refusal.Message, r.Refusal.Remedy)
		}
	}
	for _, p := range s.Problems {
		fmt.Fprintf(&b, "unknown   %s\n", p)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func newWait(a *app) *cobra.Command {
	var running bool
	cmd := &cobra.Command{
		Use: "wait N", Short: "Attest a guest and wait until it has ended", Args: exactArgs("N"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			wait := t.Wait
			if running {
				wait = t.WaitRunning
			}
			g, err := wait(ctx, args[0])
			if err != nil {
				return err
			}
			return a.print(cmd, "Guest", g, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "guest %s: exit code %d\n", g.GuestID, g.ExitCode)
				return err
			})
		}),
	}
	cmd.Flags().BoolVar(&running, "running", false, "wait only until the workload runs")
	return cmd
}

func newStop(a *app) *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use: "stop N", Short: "End a guest; its results so far are uploaded", Args: exactArgs("N"),
		RunE: a.with(func(ctx context.Context, _ *cobra.Command, t *tenant.Tenant, args []string) error {
			return t.Stop(ctx, args[0], grace)
		}),
	}
	cmd.Flags().DurationVar(&grace, "grace", 10*time.Second, "time the guest gets to end by itself")
	return cmd
}
