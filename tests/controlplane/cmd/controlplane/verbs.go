package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

const (
	pollInterval   = 200 * time.Millisecond
	maxLaunchBytes = 1 << 20
)

// with wraps a verb that needs the API.
func (a *app) with(f func(ctx context.Context, cmd *cobra.Command, c *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, c, done, err := a.open(cmd)
		if err != nil {
			return err
		}
		defer done()
		return f(ctx, cmd, c, args)
	}
}

// table prints rows under a head.
func table(w io.Writer, head string, rows func(w io.Writer)) error {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	if head != "" {
		fmt.Fprintln(tw, head)
	}
	rows(tw)
	return tw.Flush()
}

// Documents of -o json and -o yaml.
type (
	nodeList struct {
		output.Header
		Nodes []client.Node `json:"nodes"`
	}
	guestDocument struct {
		output.Header
		*client.Guest
	}
	sentDocument struct {
		output.Header
		*client.Sent
	}
	eventList struct {
		output.Header
		Events []client.Event `json:"events"`
	}
)

// header starts a document of this tool; its kinds are not the agent's.
func header(kind string) output.Header {
	return output.Header{APIVersion: "controlplane/v1", Kind: kind}
}

func (a *app) sent(cmd *cobra.Command, s *client.Sent) error {
	return a.format.Print(cmd.OutOrStdout(), sentDocument{header("Sent"), s}, func(w io.Writer) error {
		return table(w, "COMMAND\tNODE\tGUEST", func(w io.Writer) { fmt.Fprintf(w, "%s\t%s\t%s\n", s.CommandID, s.Node, s.GuestID) })
	})
}

func (a *app) nodes() *cobra.Command {
	return &cobra.Command{
		Use: "nodes", Short: "List the enrolled hosts", Args: exactArgs(),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, _ []string) error {
			nodes, err := c.Nodes(ctx)
			if err != nil {
				return err
			}
			return a.printNodes(cmd, nodes)
		}),
	}
}

func (a *app) printNodes(cmd *cobra.Command, nodes []client.Node) error {
	return a.format.Print(cmd.OutOrStdout(), nodeList{header("NodeList"), nodes}, func(w io.Writer) error {
		return table(w, "NODE\tSEEN\tEPOCH\tADMISSION\tGUESTS\tOUTBOX", func(w io.Writer) {
			for _, n := range nodes {
				seen, admission := "never", "open"
				if n.LastSeen != nil {
					seen = time.Since(*n.LastSeen).Round(time.Second).String() + " ago"
				}
				if n.Cordoned {
					admission = "closed"
				}
				if len(n.Alarms) > 0 {
					admission = "ALARM " + n.Alarms[0].Code
				}
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%d\t%d\n", n.ID, seen, n.NodeEpoch, admission, n.Guests, n.Outbox)
			}
		})
	})
}

func (a *app) cordon() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use: "cordon NODE", Short: "Close a host for new guests", Args: exactArgs("NODE"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, args []string) error {
			s, err := c.Cordon(ctx, args[0], reason)
			if err != nil {
				return err
			}
			return a.sent(cmd, s)
		}),
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for people")
	return cmd
}

func (a *app) uncordon() *cobra.Command {
	return &cobra.Command{
		Use: "uncordon NODE", Short: "Open a host again", Args: exactArgs("NODE"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, args []string) error {
			s, err := c.Uncordon(ctx, args[0])
			if err != nil {
				return err
			}
			return a.sent(cmd, s)
		}),
	}
}

func (a *app) resolve() *cobra.Command {
	return &cobra.Command{
		Use: "resolve NODE", Short: "End a host's alarms, after you looked into them", Args: exactArgs("NODE"),
		Long: `End a host's alarms, after you looked into them. Its audit log and the agent that speaks
for it count from the next heartbeat on, as if they were seen for the first time.`,
		RunE: a.with(func(ctx context.Context, _ *cobra.Command, c *client.Client, args []string) error {
			return c.Resolve(ctx, args[0])
		}),
	}
}

func (a *app) revoke() *cobra.Command {
	return &cobra.Command{
		Use: "revoke NODE", Short: "End every identity a host was given; enrol it again for another", Args: exactArgs("NODE"),
		RunE: a.with(func(ctx context.Context, _ *cobra.Command, c *client.Client, args []string) error {
			return c.Revoke(ctx, args[0])
		}),
	}
}

func (a *app) launch() *cobra.Command {
	var node, file string
	var features []string
	var wait bool
	cmd := &cobra.Command{
		Use: "launch", Short: "Start a guest", Args: exactArgs(),
		Long: "Start a guest from a LaunchGuest in protobuf's JSON form. An empty guest_id is assigned; without --node the first open host with the image is taken.",
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, _ []string) error {
			if file == "" {
				return usage("--file is required")
			}
			raw, err := readInput(cmd, file)
			if err != nil {
				return err
			}
			l := &api.LaunchGuest{}
			if err := protojson.Unmarshal(raw, l); err != nil {
				return usage("%s is not a LaunchGuest in JSON", file)
			}
			s, err := c.Launch(ctx, node, l, features...)
			if err != nil {
				return err
			}
			if !wait {
				return a.sent(cmd, s)
			}
			g, err := c.WaitGuest(ctx, s.GuestID, func(g *client.Guest) bool { return g.Ended() })
			if err != nil {
				return err
			}
			return a.printGuest(cmd, g)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&node, "node", "", "host to start on; empty lets the control plane choose")
	f.StringVarP(&file, "file", "f", "", "`FILE` with the launch, - for standard input")
	f.StringArrayVar(&features, "feature", nil, "`NAME` of a feature the host must have")
	f.BoolVar(&wait, "wait", false, "wait for the guest's end")
	return cmd
}

func readInput(cmd *cobra.Command, file string) ([]byte, error) {
	in := cmd.InOrStdin()
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("reading launch: %w", err)
		}
		defer f.Close() //nolint:errcheck // read only
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, maxLaunchBytes))
	if err != nil {
		return nil, fmt.Errorf("reading launch: %w", err)
	}
	return raw, nil
}

func (a *app) guest() *cobra.Command {
	return &cobra.Command{
		Use: "guest GUEST", Short: "Show how far a guest has come", Args: exactArgs("GUEST"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, args []string) error {
			g, err := c.Guest(ctx, args[0])
			if err != nil {
				return err
			}
			return a.printGuest(cmd, g)
		}),
	}
}

func (a *app) printGuest(cmd *cobra.Command, g *client.Guest) error {
	state, err := g.GuestState()
	if err != nil {
		return err
	}
	return a.format.Print(cmd.OutOrStdout(), guestDocument{header("Guest"), g}, func(w io.Writer) error {
		reason := ""
		if g.Refusal != nil {
			reason = g.Refusal.Code
		}
		if r := state.GetRefusal(); r != nil {
			reason = r.GetCode()
		}
		return table(w, "GUEST\tNODE\tCOMMAND\tSTATUS\tPHASE\tRESULTS\tREASON", func(w io.Writer) {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\n", g.GuestID, g.Node, g.Outcome, state.GetStatus().Word(), state.GetGuestPhase(), len(g.Results), reason)
		})
	})
}

func (a *app) stop() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use: "stop GUEST", Short: "End a guest", Args: exactArgs("GUEST"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, args []string) error {
			s, err := c.Stop(ctx, args[0], grace)
			if err != nil {
				return err
			}
			return a.sent(cmd, s)
		}),
	}
	cmd.Flags().DurationVar(&grace, "grace", 0, "time the guest gets to end by itself")
	return cmd
}

func (a *app) evidence() *cobra.Command {
	var nonce, out string
	cmd := &cobra.Command{
		Use: "evidence GUEST", Short: "Challenge a guest and fetch its evidence", Args: exactArgs("GUEST"),
		Long: "Challenge a guest with your nonce and fetch its evidence. It proves nothing before `nodeagent verify` has judged it.",
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, args []string) error {
			n, err := hex.DecodeString(nonce)
			if err != nil || len(n) < contract.MinNonceBytes || len(n) > contract.MaxNonceBytes {
				return usage("--nonce is not %d to %d bytes in hex", contract.MinNonceBytes, contract.MaxNonceBytes)
			}
			evidence, err := ask(ctx, c, args[0], n)
			if err != nil {
				return err
			}
			if out == "" {
				_, err = cmd.OutOrStdout().Write(append(evidence, '\n'))
				return err
			}
			if err := os.WriteFile(out, evidence, 0o600); err != nil {
				return fmt.Errorf("writing evidence: %w", err)
			}
			return nil
		}),
	}
	cmd.Flags().StringVar(&nonce, "nonce", "", "your nonce in `HEX`, fresh and unpredictable (required)")
	cmd.Flags().StringVar(&out, "out", "", "`FILE` for the evidence instead of standard output")
	return cmd
}

// ask challenges and waits for the answer, or for the command's refusal.
func ask(ctx context.Context, c *client.Client, guest string, nonce []byte) ([]byte, error) {
	s, err := c.RequestEvidence(ctx, guest, nonce)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for since := uint64(0); ; {
		evidence, err := c.Evidence(ctx, guest, nonce)
		if r, refused := errors.AsType[*contract.Refusal](err); !refused || r.Code != client.CodeNoEvidence {
			return evidence, err
		}
		events, err := c.Events(ctx, since, 1000, false)
		if err != nil {
			return nil, err
		}
		for _, e := range events {
			since = e.Seq
			event, err := e.Decode()
			if err != nil {
				return nil, err
			}
			if r := event.GetCommandRefused(); r != nil && event.GetCommandId() == s.CommandID {
				return nil, api.RefusalFromWire(r.GetRefusal())
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for evidence: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func (a *app) events() *cobra.Command {
	var since uint64
	var heartbeats, follow bool
	cmd := &cobra.Command{
		Use: "events", Short: "Show what nodes reported", Args: exactArgs(),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, c *client.Client, _ []string) error {
			tick := time.NewTicker(pollInterval)
			defer tick.Stop()
			head := true
			for {
				events, err := c.Events(ctx, since, 1000, heartbeats)
				if err != nil {
					return err
				}
				if len(events) > 0 || (head && !follow) {
					if err := a.printEvents(cmd, events, head); err != nil {
						return err
					}
					head = false
				}
				if len(events) > 0 {
					since = events[len(events)-1].Seq
					continue
				}
				if !follow {
					return nil
				}
				select {
				case <-ctx.Done():
					return nil
				case <-tick.C:
				}
			}
		}),
	}
	f := cmd.Flags()
	f.Uint64Var(&since, "since", 0, "only events after this `NUMBER`")
	f.BoolVar(&heartbeats, "heartbeats", false, "heartbeats too")
	f.BoolVarP(&follow, "follow", "f", false, "wait for more")
	return cmd
}

func (a *app) printEvents(cmd *cobra.Command, events []client.Event, head bool) error {
	return a.format.Print(cmd.OutOrStdout(), eventList{header("EventList"), events}, func(w io.Writer) error {
		title := ""
		if head {
			title = "SEQ\tAT\tNODE\tKIND\tCOMMAND\tWHAT"
		}
		var failed error
		err := table(w, title, func(w io.Writer) {
			for _, e := range events {
				event, err := e.Decode()
				if err != nil {
					failed = err
					return
				}
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\n", e.Seq, event.GetAt().AsTime().Format(time.RFC3339), event.GetHostId(), e.Kind,
					event.GetCommandId(), summary(event))
			}
		})
		return errors.Join(err, failed)
	})
}

// summary says the most important of an event.
func summary(e *api.Event) string {
	switch b := e.GetBody().(type) {
	case *api.Event_CommandRefused:
		r := b.CommandRefused.GetRefusal()
		return r.GetCode() + ": " + r.GetMessage()
	case *api.Event_GuestState:
		s := b.GuestState
		return strings.Join(slices.DeleteFunc([]string{s.GetGuestId(), s.GetStatus().Word(), s.GetGuestPhase(), s.GetRefusal().GetCode()},
			func(word string) bool { return word == "" }), " ")
	case *api.Event_Evidence:
		return fmt.Sprintf("%s %d bytes", b.Evidence.GetGuestId(), len(b.Evidence.GetEvidence()))
	case *api.Event_ResultUploaded:
		return fmt.Sprintf("%s %s %d bytes", b.ResultUploaded.GetGuestId(), b.ResultUploaded.GetName(), b.ResultUploaded.GetSize())
	case *api.Event_ResultGivenUp:
		return fmt.Sprintf("%s %s %s", b.ResultGivenUp.GetGuestId(), b.ResultGivenUp.GetName(), b.ResultGivenUp.GetRefusal().GetCode())
	case *api.Event_Capability:
		text := fmt.Sprintf("%s, tee %s, %d images", b.Capability.GetAgentVersion(), b.Capability.GetTee(), len(b.Capability.GetImages()))
		if changed := b.Capability.GetChanged(); len(changed) > 0 {
			text += ", changed: " + strings.Join(changed, " ")
		}
		return text
	case *api.Event_Heartbeat:
		return fmt.Sprintf("%d guests, %d events waiting", b.Heartbeat.GetGuests(), b.Heartbeat.GetOutbox())
	case *api.Event_CommandDone, nil:
	}
	return ""
}
