package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/nodeagent/capability"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/vm/libvirt"
)

// capabilityDocument is the document of `nodeagent capability`.
type capabilityDocument struct {
	output.Header
	SEVSNP host.Report `json:"sev_snp"`
	capability.Report
}

func newCapabilityCommand() *cobra.Command {
	var format output.Format
	var configFile string
	cmd := &cobra.Command{
		Use: "capability", Short: "Show what this host can do, and why not more", Args: exactArgs(),
		Long: `Show what this host has of AMD SEV-SNP: processor, firmware, TCB, ASIDs, whether
guests can be started and, when not, every reason with what to do about it and the
raw value behind it; whether kernel, libvirt, QEMU and OVMF are new enough without
and with GPUs; what GPUs it has and whether they are rented out; and what the agent
holds of AMD's certificates. Nothing is changed.
Run it as root: anybody else sees less, and is told what. The exit code is 0
whatever the host can do.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := configOrDefaults(cmd, configFile)
			if err != nil {
				return err
			}
			silent := hclog.NewNullLogger() // the document says what is unknown
			machine := lookAtMachine()
			versions := func(ctx context.Context) (string, string, error) { return libvirt.Probe(ctx, cfg.Libvirt.URI, silent) }
			facts := softwareFacts(cmd.Context(), machine.Facts.Kernel.Release, firmwareDirs("/", cfg), versions, silent)
			facts.GPUs = localGPUs(cmd.Context(), socketFile(cfg), pciHost("/"), silent)
			facts.Endorsements = localEndorsements(cmd.Context(), cfg, hclog.New(&hclog.LoggerOptions{Name: "nodeagent", Level: hclog.Warn, Output: cmd.ErrOrStderr()}))
			doc := newCapability(machine, facts)
			return format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error { return printCapability(w, doc) })
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "how to print")
	cmd.Flags().StringVar(&configFile, "config", "/etc/nodeagent/agent.toml", "the agent's configuration file; defaults hold while there is none")
	return cmd
}

// configOrDefaults reads the file of --config; where none was named and there
// is none, the agent is not set up yet and the defaults hold.
func configOrDefaults(cmd *cobra.Command, file string) (config.Config, error) {
	cfg, err := config.Load(file)
	if errors.Is(err, fs.ErrNotExist) && !cmd.Flags().Changed("config") {
		return config.Default(), nil
	}
	return cfg, err
}

// localEndorsements are those of the agent's cache; nil where there is none,
// or it cannot be read.
func localEndorsements(ctx context.Context, cfg config.Config, log hclog.Logger) *capability.EndorsementFacts {
	if _, err := os.ReadDir(endorsementCache(cfg)); err != nil {
		return nil // not set up yet, or not root
	}
	p, err := openEndorsements(cfg, time.Now, log)
	if err == nil {
		_, err = p.Status(ctx) // asks the platform
	}
	if err != nil {
		log.Warn("endorsements are left out", "err", err)
		return nil
	}
	return endorsementFacts(p)
}

func newCapability(machine host.Report, facts capability.Facts) capabilityDocument {
	return capabilityDocument{output.NewHeader("Capability"), machine, capability.Judge(facts)}
}

func printCapability(out io.Writer, c capabilityDocument) error {
	r := c.SEVSNP
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	usable := "usable"
	if !r.Enabled {
		usable = "not usable: " + r.Why()
	}
	fmt.Fprintf(w, "sev-snp\t%s\n", usable)
	cpu := r.Facts.CPU
	fmt.Fprintf(w, "processor\t%s\t%s, %s family %#x model %#x stepping %d, microcode %s\n", processorText(r.Processor), cpu.Brand, cpu.Vendor, cpu.Family, cpu.Model, cpu.Stepping, cpu.Microcode)
	fmt.Fprintf(w, "kernel\t%s\t%s\n", r.Facts.Kernel.Release, orNone("SNP parameters", r.Facts.Kernel.Parameters))
	vmTypes := "could not be asked"
	if k := r.Facts.KVM; k != nil {
		vmTypes = fmt.Sprintf("VM types %#x", k.VMTypes)
	}
	fmt.Fprintf(w, "kvm\t%s\t%s\n", vmTypes, orNone("kvm_amd", parameterList(r.Facts.Modules.KVMAMD)))
	firmware := "unknown"
	if f := r.Firmware; f != nil {
		firmware = f.Version
		if f.State != "" {
			firmware += ", " + f.State
		}
	}
	fmt.Fprintf(w, "firmware\t%s\t%s\n", firmware, orNone("chip ids", r.Facts.ChipIDs))
	fmt.Fprintf(w, "tcb current\t%s\n", tcbText(r.CurrentTCB))
	fmt.Fprintf(w, "tcb reported\t%s\n", tcbText(r.ReportedTCB))
	fmt.Fprintf(w, "vlek\t%s\n", vlekText(r.VLEKLoaded))
	fmt.Fprintf(w, "asids\t%s\n", asidsText(r.ASIDs))
	fmt.Fprintf(w, "rmp\t%s\n", rmpText(r.RMP))
	fmt.Fprintf(w, "certificates\t%s\n", endorsementsText(c.Endorsements))
	fmt.Fprintf(w, "\nCOMPONENT\tNEW ENOUGH\tWITH GPUS\tOBSERVED\tFLOOR\tWITH GPUS\n")
	for _, k := range c.Components {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", k.Name, k.Meets, k.MeetsGPU, cmp.Or(k.Observed, "unknown"), k.Floor, k.FloorGPU)
	}
	if len(c.GPUs) > 0 {
		fmt.Fprintf(w, "\nGPU\tMODEL\tSTATE\tCC MODE\tOFFERED\tWHY NOT\n")
	}
	for _, g := range c.GPUs {
		why := ""
		if g.Why != nil {
			why = g.Why.Code
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%t\t%s\n", g.Address, strings.TrimSpace(g.Model+" "+g.Board), g.State, g.Mode, g.Offered, why)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, k := range c.Components {
		if k.Remedy != "" {
			fmt.Fprintf(out, "\n%s\n  what to do: %s\n", k.Name, k.Remedy)
		}
	}
	for _, f := range r.Findings {
		fmt.Fprintf(out, "\n%s  %s\n  %s\n", strings.ToUpper(string(f.Level)), f.Code, f.Message)
		if f.Observed != "" {
			fmt.Fprintf(out, "  seen: %s\n", f.Observed)
		}
		if f.Remedy != "" {
			fmt.Fprintf(out, "  what to do: %s\n", f.Remedy)
		}
	}
	return nil
}

func endorsementsText(e *capability.Endorsements) string {
	if e == nil {
		return "unknown"
	}
	text := fmt.Sprintf("for the reported TCB: %s, revocation list current: %s", e.Certificate, e.RevocationList)
	if !e.RevocationListNextUpdate.IsZero() {
		text += ", until " + e.RevocationListNextUpdate.Format(time.DateOnly)
	}
	var codes []string
	for _, f := range e.Findings {
		codes = append(codes, f.Code)
	}
	return text + "\t" + strings.Join(codes, ", ")
}

func orNone(what string, values []string) string {
	if len(values) == 0 {
		return what + ": none"
	}
	return what + ": " + strings.Join(values, " ")
}

// parameterList keeps an order that does not change between runs.
func parameterList(values map[string]string) []string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(values)) {
		list = append(list, name+"="+values[name])
	}
	return list
}

func processorText(p *host.Processor) string {
	if p == nil {
		return "not known"
	}
	return fmt.Sprintf("%s, %s, product line %s", p.Name, p.Generation, p.Product)
}

func tcbText(t *host.TCB) string {
	if t == nil {
		return "unknown"
	}
	p := t.Parts
	return fmt.Sprintf("boot-loader=%d tee=%d snp=%d microcode=%d fmc=%d\t%#x", p.BootLoader, p.TEE, p.SNP, p.Microcode, p.FMC, uint64(t.Raw))
}

func vlekText(loaded *bool) string {
	switch {
	case loaded == nil:
		return "unknown"
	case *loaded:
		return "loaded"
	}
	return "not loaded"
}

func asidsText(a *host.ASIDs) string {
	switch {
	case a == nil:
		return "none known"
	case a.Used == nil:
		return fmt.Sprintf("%d, how many are free is unknown", a.Total)
	}
	text := fmt.Sprintf("%d of %d free", *a.Free, a.Total)
	if a.Returning != nil {
		text += fmt.Sprintf(", %d starting, ending or SEV-ES", *a.Returning)
	}
	return text + "\tfrom the " + a.Source
}

func rmpText(r *host.RMP) string {
	if r == nil {
		return "unknown"
	}
	return fmt.Sprintf("%s, covers memory: %s\t%s; base %#x, memory ends at %#x", r.Mode, r.Covers, r.Why, uint64(r.Base), r.MemoryEnd)
}
