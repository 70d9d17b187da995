package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/firmware/snp/host/psp"
	"github.com/confidential-node/agent/nodeagent/history"
	"github.com/confidential-node/agent/nodeagent/output"
)

// platformChange is the document of `nodeagent platform`.
type platformChange struct {
	output.Header
	// Command is what was given to the firmware.
	Command string        `json:"command"`
	Before  platformState `json:"before"`
	After   platformState `json:"after"`
}

// platformState is what SNP_PLATFORM_STATUS says of what can be changed.
type platformState struct {
	Firmware    string   `json:"firmware"`
	CurrentTCB  host.TCB `json:"current_tcb"`
	ReportedTCB host.TCB `json:"reported_tcb"`
	MaskChipID  bool     `json:"mask_chip_id"`
	MaskChipKey bool     `json:"mask_chip_key"`
	VLEKLoaded  bool     `json:"vlek_loaded"`
}

// platformFlags are common to the verbs.
type platformFlags struct {
	root                 string
	configFile, stateDir string
	kernel               host.Syscalls
	accepted             bool
	format               output.Format
}

func newPlatformCommand(root string, kernel host.Syscalls) *cobra.Command {
	f := platformFlags{root: root, kernel: kernel}
	cmd := &cobra.Command{
		Use: "platform", Short: "Change the SEV firmware of this host: commit, configure, load a VLEK",
		Long: `Change the SEV firmware of this host. The agent never does any of this by itself,
whatever a control plane asks. Each verb says what cannot be undone, and does
nothing unless it is repeated with --accept-consequences. What was done, or may have been
done when the host died meanwhile, is in the history.`,
		Args: exactArgs(), RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().BoolVar(&f.accepted, "accept-consequences", false, "do it; without this the consequences are told and nothing is done")
	cmd.PersistentFlags().VarP(&f.format, "output", "o", "how to print")
	cmd.PersistentFlags().StringVar(&f.configFile, "config", "/etc/nodeagent/agent.toml", "the agent's configuration file; what is done is noted in its state_dir")
	cmd.PersistentFlags().StringVar(&f.stateDir, "state-dir", "", "folder to note it in on a machine without agent, instead of --config")
	cmd.AddCommand(newPlatformHistory(&f), newPlatformCommit(&f), newPlatformConfigure(&f), newPlatformLoadVLEK(&f))
	return cmd
}

// Consequences, as they are told before anything is done.
const (
	consequencesCommit = `SNP_COMMIT makes the firmware that runs now the oldest that this chip will ever run
again. THIS CANNOT BE UNDONE, by no BIOS, no reset and no vendor: should this firmware
turn out to be faulty, no older one can take its place. The reported TCB becomes the
current one: a VCEK of another TCB no longer fits, and a loaded VLEK is dropped.
Verifiers demand committed firmware, so commit once you trust it.`
	consequencesConfigure = `SNP_SET_CONFIG changes what every report of this host states from now on, also those of
guests that run. With another reported TCB a VCEK of the former one no longer fits, and a
loaded VLEK is dropped; to have the VLEK back it must be wrapped and loaded anew. With a
masked chip id nobody can find the chip's certificate; with a masked chip key reports are
not signed, and every verifier refuses them. Reports that were made meanwhile stay as they
are; the settings themselves can be set again.`
	consequencesVLEK = `SNP_VLEK_LOAD lets a cloud provider's key sign the reports of every guest that does not
ask for the chip's own, also of guests that run; verifiers that demand a VCEK refuse them.
No command takes a VLEK out again: it stays until the reported TCB changes or the host
reboots. It must have been wrapped for this chip and its reported TCB.`
)

func newPlatformCommit(f *platformFlags) *cobra.Command {
	return &cobra.Command{
		Use: "commit", Short: "Make the running firmware the oldest this chip will ever run (irreversible)", Args: exactArgs(),
		Long: consequencesCommit,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.change(cmd, psp.SNPCommitCommand, consequencesCommit, func(o *psp.Operator, _ host.Report) error { return o.Commit() })
		},
	}
}

func newPlatformConfigure(f *platformFlags) *cobra.Command {
	var tcb string
	var maskID, maskKey bool
	cmd := &cobra.Command{
		Use: "configure", Short: "Set the reported TCB and the masks of chip id and chip key", Args: exactArgs(),
		Long: consequencesConfigure + "\n\nWhat is not named stays as it is.",
		Example: "  nodeagent platform configure --reported-tcb boot-loader=10,tee=0,snp=27,microcode=86 --accept-consequences\n" +
			"  nodeagent platform configure --mask-chip-id=false --accept-consequences",
		RunE: func(cmd *cobra.Command, _ []string) error {
			flags := cmd.Flags()
			if !flags.Changed("reported-tcb") && !flags.Changed("mask-chip-id") && !flags.Changed("mask-chip-key") {
				return usageError("nothing to set: name --reported-tcb, --mask-chip-id or --mask-chip-key; see %s --help", cmd.CommandPath())
			}
			return f.change(cmd, psp.SNPSetConfigCommand, consequencesConfigure, func(o *psp.Operator, r host.Report) error {
				s := r.Facts.SNPFirmware
				c := psp.Config{ReportedTCB: s.ReportedTCB, MaskChipID: s.MaskChipID, MaskChipKey: s.MaskChipKey}
				if flags.Changed("mask-chip-id") {
					c.MaskChipID = maskID
				}
				if flags.Changed("mask-chip-key") {
					c.MaskChipKey = maskKey
				}
				if flags.Changed("reported-tcb") {
					var err error
					if c.ReportedTCB, err = reportedTCB(r, tcb); err != nil {
						return err
					}
				}
				return o.SetConfig(c)
			})
		},
	}
	cmd.Flags().StringVar(&tcb, "reported-tcb", "", `every component (boot-loader=10,tee=0,snp=27,microcode=86, and fmc on Turin), or "current"`)
	cmd.Flags().BoolVar(&maskID, "mask-chip-id", false, "leave the chip id out of reports; =false puts it back")
	cmd.Flags().BoolVar(&maskKey, "mask-chip-key", false, "leave reports unsigned; =false signs them again")
	return cmd
}

// reportedTCB reads the TCB to report, in the layout of this machine.
func reportedTCB(r host.Report, text string) (psp.Hex, error) {
	if text == "current" {
		return r.CurrentTCB.Raw, nil
	}
	line, err := snp.ProductByName(r.Processor.Product)
	if err != nil {
		return 0, err
	}
	levels, err := wholeTCB("--reported-tcb", line, text)
	if err != nil {
		return 0, err
	}
	if !line.HasFMC() && levels.FMC != 0 {
		return 0, usageError("--reported-tcb: a TCB of %s has no FMC component", line.Name)
	}
	raw := psp.Hex(line.EncodeTCB(levels))
	if raw == 0 {
		return 0, usageError(`--reported-tcb: zero means the current one to the firmware; say "current" if that is meant`)
	}
	return raw, nil
}

func newPlatformLoadVLEK(f *platformFlags) *cobra.Command {
	return &cobra.Command{
		Use: "load-vlek FILE", Short: "Load a wrapped VLEK, as AMD's key service returned it", Args: exactArgs("FILE"),
		Long: consequencesVLEK + "\n\nFILE is the wrapped hashstick of 432 bytes. The certificate goes to the agent by\n`nodeagent endorsements import --vlek`.",
		RunE: func(cmd *cobra.Command, args []string) error {
			hashstick, err := readLimited(args[0], 64<<10)
			if err != nil {
				return err
			}
			return f.change(cmd, psp.SNPVLEKLoadCommand, consequencesVLEK, func(o *psp.Operator, _ host.Report) error { return o.LoadVLEK(hashstick) })
		},
	}
}

// change tells the consequences and, if they were accepted, gives the command
// and reads back what became of it.
func (f *platformFlags) change(cmd *cobra.Command, command psp.Command, consequences string, act func(*psp.Operator, host.Report) error) error {
	fmt.Fprintf(cmd.ErrOrStderr(), "WARNING: %s\n", strings.TrimSpace(consequences))
	if !f.accepted {
		return &exitError{exitPrecondition, contract.Refuse("platform.not-accepted", "if that is what you want, repeat the command with --accept-consequences",
			"nothing was done: %s needs your explicit consent", command)}
	}
	before, err := f.observe()
	if err != nil {
		return err
	}
	d := diary{}
	if d.stateDir, err = f.stateFolder(cmd); err != nil {
		return err
	}
	if d.log, err = history.Open(historyFile(d.stateDir)); err != nil {
		return err
	}
	defer d.log.Close() //nolint:errcheck // each entry is on disk before it counts
	doc := platformChange{Header: output.NewHeader("PlatformChange"), Command: command.String(), Before: stateOf(before)}
	if err := d.note(doc, history.Unknown, nil); err != nil {
		return err
	}
	if err := f.give(before, act); err != nil {
		return errors.Join(err, d.note(doc, history.Failed, err))
	}
	after, err := f.observe()
	if err != nil {
		err = fmt.Errorf("%s was carried out, but reading the platform back: %w", command, err)
		return errors.Join(err, d.note(doc, history.Done, err))
	}
	doc.After = stateOf(after)
	if err := d.note(doc, history.Done, nil); err != nil {
		return err
	}
	return f.format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error { return printPlatform(w, doc) })
}

// give gives the command to the firmware.
func (f *platformFlags) give(before host.Report, act func(*psp.Operator, host.Report) error) error {
	operator, err := psp.OpenOperator(f.root, f.kernel)
	if err != nil {
		return err
	}
	return errors.Join(act(operator, before), operator.Close())
}

// observe reads the machine. One whose SNP is not in use is refused: to ask
// its firmware could start it.
func (f *platformFlags) observe() (host.Report, error) {
	r := host.Judge(host.New(f.root, f.kernel).Facts())
	if r.ReportedTCB == nil {
		return r, noSNP(r)
	}
	return r, nil
}

func stateOf(r host.Report) platformState {
	s := r.Facts.SNPFirmware
	return platformState{r.Firmware.Version, *r.CurrentTCB, *r.ReportedTCB, s.MaskChipID, s.MaskChipKey, s.VLEKLoaded}
}

func printPlatform(out io.Writer, c platformChange) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "%s done\tBEFORE\tAFTER\n", c.Command)
	b, a := c.Before, c.After
	fmt.Fprintf(w, "firmware\t%s\t%s\n", b.Firmware, a.Firmware)
	fmt.Fprintf(w, "tcb current\t%s\t%s\n", b.CurrentTCB.Parts, a.CurrentTCB.Parts)
	fmt.Fprintf(w, "tcb reported\t%s\t%s\n", b.ReportedTCB.Parts, a.ReportedTCB.Parts)
	fmt.Fprintf(w, "mask chip id\t%s\t%s\n", yesNo(b.MaskChipID), yesNo(a.MaskChipID))
	fmt.Fprintf(w, "mask chip key\t%s\t%s\n", yesNo(b.MaskChipKey), yesNo(a.MaskChipKey))
	fmt.Fprintf(w, "vlek loaded\t%s\t%s\n", yesNo(b.VLEKLoaded), yesNo(a.VLEKLoaded))
	return w.Flush()
}
