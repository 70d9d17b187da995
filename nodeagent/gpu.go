package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/nvidia"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/vfio"
)

// gpuShown is the document of `nodeagent gpu show`, and of an order that was
// carried out.
type gpuShown struct {
	output.Header
	AgentRunning bool `json:"agent_running"`
	admin.GPU
	// Driver is what the nvidia driver tells of it, if it has it now.
	Driver *nvidia.GPU `json:"driver,omitempty"`
}

// gpuFlags are common to the verbs.
type gpuFlags struct {
	socket  string
	config  string
	format  output.Format
	timeout time.Duration
	// every is how often the agent is asked how far it is.
	every time.Duration
}

const consequencesRelease = `The GPU leaves duty: CC is switched off, its memory is seen to be cleared, and it goes back
to the driver it had before the agent took it. No guest gets it until ` + "`nodeagent gpu reset`" + `.
With --anyway it goes back even if CC cannot be switched off: the driver may then refuse it.`

func newGPUCommand() *cobra.Command {
	f := gpuFlags{every: time.Second}
	cmd := &cobra.Command{
		Use: "gpu", Short: "Show the agent's GPUs; release, reset or quarantine one",
		Long: `Show the GPUs and NVSwitches that the running agent manages, and order what it never
does by itself: give one back to its driver (release), reset and verify one, out of
quarantine too (reset), or withhold one (quarantine). A GPU that a guest has is not
touched by any of them. Which devices are managed at all is gpu.manage of the
configuration. While the agent does not run, list and show tell what it recorded last,
and say so; orders need it.`,
		Args: exactArgs(), RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().VarP(&f.format, "output", "o", "how to print")
	cmd.PersistentFlags().StringVar(&f.socket, "socket", filepath.Join(config.Default().RunDir, admin.SocketName), "the agent's admin socket")
	cmd.PersistentFlags().StringVar(&f.config, "config", "/etc/nodeagent/agent.toml", "the agent's configuration file, for what is on record while it does not run")
	cmd.PersistentFlags().DurationVar(&f.timeout, "timeout", 20*time.Minute, "how long to wait for what was ordered; the agent goes on with it all the same")
	cmd.AddCommand(newGPUList(&f), newGPUShow(&f), newGPURelease(&f), newGPUReset(&f), newGPUQuarantine(&f))
	return cmd
}

func newGPUList(f *gpuFlags) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the GPUs, their states and what cannot be had", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := f.list(cmd)
			if err != nil {
				return err
			}
			return f.format.Print(cmd.OutOrStdout(), list, func(w io.Writer) error { return printGPUs(w, list, time.Now()) })
		},
	}
}

func newGPUShow(f *gpuFlags) *cobra.Command {
	return &cobra.Command{
		Use: "show ADDRESS", Short: "Show one GPU with all that is known of it", Args: exactArgs("ADDRESS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := vfio.ParseAddress(args[0])
			if err != nil {
				return usageError("%w", err)
			}
			list, err := f.list(cmd)
			if err != nil {
				return err
			}
			g, err := find(list, string(a))
			if err != nil {
				return err
			}
			return f.show(cmd, g, list.AgentRunning)
		},
	}
}

func newGPURelease(f *gpuFlags) *cobra.Command {
	var accepted, anyway bool
	cmd := &cobra.Command{
		Use: "release ADDRESS", Short: "Switch CC off and give a GPU back to its driver", Args: exactArgs("ADDRESS"), Long: consequencesRelease,
		Example: "  nodeagent gpu release 0000:41:00.0 --accept-consequences",
		RunE: func(cmd *cobra.Command, args []string) error {
			if !accepted {
				fmt.Fprintln(cmd.ErrOrStderr(), consequencesRelease)
				return contract.Refuse("gpu.consent-missing", "read the above, then repeat it with --accept-consequences", "nothing was done")
			}
			return f.order(cmd, args[0], admin.GPUOrder{Verb: "release", Anyway: anyway}, pool.Unmanaged)
		},
	}
	cmd.Flags().BoolVar(&accepted, "accept-consequences", false, "do it; without this the consequences are told and nothing is done")
	cmd.Flags().BoolVar(&anyway, "anyway", false, "give it back even if CC cannot be switched off")
	return cmd
}

func newGPUReset(f *gpuFlags) *cobra.Command {
	return &cobra.Command{
		Use: "reset ADDRESS", Short: "Reset and verify a GPU: out of quarantine, back from a release, or once more", Args: exactArgs("ADDRESS"),
		Long: `Have a GPU reset, CC switched on and read back, and its id compared. It is offered again
only if all of that holds; otherwise it is quarantined with what was seen (exit code 5).`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.order(cmd, args[0], admin.GPUOrder{Verb: "reset"}, pool.Clean, pool.Reserved, pool.Attached)
		},
	}
}

func newGPUQuarantine(f *gpuFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use: "quarantine ADDRESS", Short: "Withhold a GPU until it is reset or released", Args: exactArgs("ADDRESS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if reason == "" {
				return usageError("say why: --reason; whoever looks at it later wants to know")
			}
			return f.order(cmd, args[0], admin.GPUOrder{Verb: "quarantine", Reason: reason}, pool.Quarantined)
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for whoever looks at it later (required)")
	return cmd
}

// find picks one GPU.
func find(list admin.GPUList, address string) (admin.GPU, error) {
	at := slices.IndexFunc(list.GPUs, func(g admin.GPU) bool { return g.Address == address })
	if at < 0 {
		return admin.GPU{}, contract.Refuse(pool.CodeNotManaged, "see `nodeagent gpu list`; name it in gpu.manage of the configuration and restart the agent", "the agent does not manage %s", address)
	}
	return list.GPUs[at], nil
}

func (f *gpuFlags) show(cmd *cobra.Command, g admin.GPU, running bool) error {
	doc := gpuShown{output.NewHeader("GPU"), running, g, f.driver(g.Address)}
	return f.format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error {
		printNotRunning(w, running)
		return printGPU(w, doc)
	})
}

// order gives an order, tells how far it is, and shows what came of it. It is
// an error when the GPU does not come to one of the wanted states.
func (f *gpuFlags) order(cmd *cobra.Command, address string, order admin.GPUOrder, want ...pool.State) error {
	a, err := vfio.ParseAddress(address)
	if err != nil {
		return usageError("%w", err)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
	defer cancel()
	if err := admin.OrderGPU(ctx, f.socket, string(a), order); err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s ordered\n", a, order.Verb)
	g, err := f.follow(ctx, cmd.ErrOrStderr(), string(a))
	if err != nil {
		return err
	}
	if err := f.show(cmd, g, true); err != nil {
		return err
	}
	switch {
	case slices.Contains(want, pool.State(g.State)) && g.Resting():
		return nil
	case g.Quarantine != nil:
		return g.Quarantine.Refusal()
	case g.Finding != nil:
		return g.Finding.Refusal()
	}
	return contract.Refuse("gpu.other-order", "see `nodeagent gpu show "+g.Address+"`", "%s is %s: something else was ordered meanwhile", g.Address, g.State)
}

// follow waits until the agent has nothing more to do with the GPU, or waits
// for something itself.
func (f *gpuFlags) follow(ctx context.Context, progress io.Writer, address string) (admin.GPU, error) {
	const remind = 10 * time.Second
	late := func() error {
		return fmt.Errorf("%s is not done; the agent goes on with it, see `nodeagent gpu show %s`: %w", address, address, ctx.Err())
	}
	last, told := "", time.Time{}
	tick := time.NewTicker(f.every)
	defer tick.Stop()
	for {
		var g admin.GPU
		list, err := admin.FetchGPUs(ctx, f.socket)
		if err == nil {
			g, err = find(list, address)
		}
		switch {
		case err != nil && ctx.Err() != nil:
			return g, late()
		case err != nil:
			return g, err
		}
		if g.Resting() || g.Finding != nil {
			return g, nil
		}
		if now := g.State + " " + g.Step; now != last || time.Since(told) > remind {
			fmt.Fprintf(progress, "%s: %s\n", address, progressText(g, time.Now()))
			last, told = now, time.Now()
		}
		select {
		case <-ctx.Done():
			return g, late()
		case <-tick.C:
		}
	}
}

func progressText(g admin.GPU, now time.Time) string {
	if g.Step == "" {
		return g.State + ", waiting for its turn"
	}
	return fmt.Sprintf("%s, step %s for %s", g.State, g.Step, now.Sub(g.StepSince).Round(time.Second))
}

func printGPUs(out io.Writer, list admin.GPUList, now time.Time) error {
	printNotRunning(out, list.AgentRunning)
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	if len(list.GPUs) == 0 {
		fmt.Fprintln(w, "no GPU is managed: name some in gpu.manage of the configuration")
	} else {
		fmt.Fprintln(w, "ADDRESS\tMODEL\tSTATE\tFOR\tSTEP\tCC MODE\tGUEST\tWHY")
	}
	for _, g := range list.GPUs {
		state, why := g.State, ""
		switch {
		case g.Leaving:
			state += " (leaving)"
		case !g.Configured:
			state += " (not configured)"
		}
		if g.Quarantine != nil {
			why = g.Quarantine.Code
		} else if g.Finding != nil {
			why = g.Finding.Code
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", g.Address, strings.TrimSpace(g.Model+" "+g.Board), state, now.Sub(g.Since).Round(time.Second), g.Step, g.Mode, g.Guest, why)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, p := range list.Problems {
		fmt.Fprintf(out, "\n%s  %s\n  %s\n  what to do: %s\n", p.About, p.Code, p.Message, p.Remedy)
	}
	return nil
}

func printGPU(out io.Writer, g gpuShown) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	unknown := func(s string) string { return cmp.Or(s, "unknown") }
	fmt.Fprintf(w, "address\t%s\nmodel\t%s\nstate\t%s since %s\n", g.Address, strings.TrimSpace(g.Model+" "+g.Board), g.State, g.Since.Format(time.DateTime))
	if g.Step != "" {
		fmt.Fprintf(w, "step\t%s since %s\n", g.Step, g.StepSince.Format(time.DateTime))
	}
	fmt.Fprintf(w, "cc mode\t%s, as read back last\ndevice id\t%s\nuuid\t%s\nfsp firmware\t%s\n", g.Mode, unknown(g.PDI), unknown(g.UUID), unknown(g.FSP))
	fmt.Fprintf(w, "configured\t%t\noriginal driver\t%s\nguest\t%s\n", g.Configured, cmp.Or(g.OriginalDriver, "none"), cmp.Or(g.Guest, "none"))
	if q := g.Quarantine; q != nil {
		fmt.Fprintf(w, "quarantined\t%s, at %s, from %s %s\n\t%s\nway out\t%s\n", q.Code, q.At.Format(time.DateTime), q.From, q.Step, q.Message, q.Remedy)
		if q.Guest != "" {
			fmt.Fprintf(w, "last guest\t%s\n", q.Guest)
		}
		for _, e := range q.Evidence {
			fmt.Fprintf(w, "seen\t%s\n", strings.ReplaceAll(e, "\n", "; "))
		}
	}
	if f := g.Finding; f != nil {
		fmt.Fprintf(w, "waits\t%s: %s\nwhat to do\t%s\n", f.Code, f.Message, f.Remedy)
	}
	if d := g.Driver; d != nil {
		fmt.Fprintf(w, "nvidia driver\t%s\n", cmp.Or(driverText(d), "tells nothing"))
	}
	return w.Flush()
}
