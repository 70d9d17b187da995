package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
)

func newStatusCommand() *cobra.Command {
	var format output.Format
	var socket string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "status", Short: "Show the running agent, its link and its guests", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			status, err := admin.FetchStatus(ctx, socket)
			if err != nil {
				return err
			}
			return format.Print(cmd.OutOrStdout(), status, func(w io.Writer) error { return printStatus(w, status, time.Now()) })
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "how to print")
	cmd.Flags().StringVar(&socket, "socket", filepath.Join(config.Default().RunDir, admin.SocketName), "the agent's admin socket")
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Second, "how long to wait for the answer")
	return cmd
}

// refusals lists what the relay refused, by reason.
func refusals(r admin.Relay) string {
	var b strings.Builder
	for _, reason := range slices.Sorted(maps.Keys(r.Refused)) {
		fmt.Fprintf(&b, ", %d refused (%s)", r.Refused[reason], reason)
	}
	return b.String()
}

func printStatus(out io.Writer, s admin.Status, now time.Time) error {
	link := "not connected"
	if s.Control.Connected {
		link = "connected to " + s.Control.Server
	}
	link += " (" + s.Control.State + ")"
	confirmed := "never"
	if !s.Control.LastRoundTrip.IsZero() {
		confirmed = now.Sub(s.Control.LastRoundTrip).Round(time.Second).String() + " ago"
	}
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "host\t%s\n", s.HostID)
	fmt.Fprintf(w, "agent\t%s, up %s\n", s.Version, now.Sub(s.StartedAt).Round(time.Second))
	tee := s.TEE
	if s.Emulated {
		tee += " (EMULATED BUILD)"
	}
	fmt.Fprintf(w, "tee\t%s\n", tee)
	fmt.Fprintf(w, "control\t%s, last confirmed round trip %s\n", link, confirmed)
	if s.Control.LastError != "" {
		fmt.Fprintf(w, "\tlast error: %s\n", s.Control.LastError)
	}
	epoch := fmt.Sprint(s.IssuerEpoch)
	if s.IssuerEpoch == 0 {
		epoch = "none yet: waiting for the control plane to open one"
	}
	fmt.Fprintf(w, "epoch\t%s\n", epoch)
	fmt.Fprintf(w, "hypervisor\t%s\n", s.Hypervisor)
	admission := "open"
	if s.Cordoned {
		admission = "closed: " + s.CordonReason
	}
	if !s.Cordoned && len(s.Shortages) > 0 {
		admission = "closed: the host is short of something"
	}
	fmt.Fprintf(w, "admission\t%s\n", admission)
	for _, shortage := range s.Shortages {
		fmt.Fprintf(w, "\t%s\n", shortage)
	}
	trusted := "trusted"
	if !s.Clock.Trusted {
		trusted = "NOT TRUSTED, nothing is launched: " + s.Clock.Reason
	}
	fmt.Fprintf(w, "clock\t%s, %s\n", s.Clock.Now.UTC().Format(time.RFC3339), trusted)
	fmt.Fprintf(w, "outbox\t%d events waiting\n", s.Outbox)
	fmt.Fprintf(w, "audit log\t%d entries, the control plane has confirmed %d\n", s.Audit.Entries, s.Audit.Witnessed)
	fmt.Fprintf(w, "guests\t%d\n", len(s.Guests))
	if refused := refusals(s.Relay); s.Relay.Routed > 0 || refused != "" {
		fmt.Fprintf(w, "relay\t%d connections open, %d routed%s\n", s.Relay.Open, s.Relay.Routed, refused)
	}
	for _, warning := range s.Warnings {
		fmt.Fprintf(w, "warning\t%s\n", warning)
	}
	if len(s.Guests) > 0 {
		fmt.Fprintf(w, "\nGUEST\tGEN\tSTATUS\tPHASE\tSTEP\tFOR\tVCPUS\tMEMORY\tPORTS\tREASON\n")
	}
	for _, g := range s.Guests {
		step, age := g.Step, "" // a domain without a record has no age
		if g.Ending {
			step = "ending"
		}
		if !g.Since.IsZero() {
			age = now.Sub(g.Since).Round(time.Second).String()
		}
		var ports []string
		for _, p := range g.Ports {
			at := fmt.Sprint(p.Host)
			if p.Name != "" {
				at = p.Name + ":" + at
			}
			ports = append(ports, fmt.Sprintf("%s->%d", at, p.Guest))
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%d\t%d MiB\t%s\t%s\n", g.ID, g.Generation, g.Status, g.GuestPhase, step,
			age, g.VCPUs, g.MemoryMiB, strings.Join(ports, " "), g.Reason)
	}
	return w.Flush()
}
