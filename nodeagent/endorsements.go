package main

import (
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/renameio/v2"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/endorsements"
	"github.com/confidential-node/agent/nodeagent/output"
)

func endorsementCache(cfg config.Config) string {
	return filepath.Join(cfg.StateDir, "endorsement-cache")
}

// openEndorsements is the provider of a configured host.
func openEndorsements(cfg config.Config, now func() time.Time, logger hclog.Logger) (*endorsements.Provider, error) {
	roots, err := snp.PinnedRoots()
	if err != nil {
		return nil, err
	}
	return endorsements.New(endorsements.Config{
		Dir: endorsementCache(cfg), OperatorDir: cfg.EndorsementsDir, KeyService: cfg.KeyService,
		Roots: roots, Platform: localPlatform(cfg), Now: now, Logger: logger,
	})
}

// endorsementChanges is the document of fetch, import and export.
type endorsementChanges struct {
	output.Header
	Documents []endorsements.Change `json:"documents"`
}

// endorsementStatus is the document of `endorsements status`.
type endorsementStatus struct {
	output.Header
	endorsements.Status
}

// endorsementFlags are common to the verbs.
type endorsementFlags struct {
	configFile, stateDir string
	format               output.Format
}

func newEndorsementsCommand() *cobra.Command {
	var f endorsementFlags
	cmd := &cobra.Command{
		Use: "endorsements", Short: "Fetch, carry over and show the certificates behind attestation reports",
		Long: `Fetch, carry over and show the certificates behind this host's attestation reports.

The agent fetches them by itself. These verbs are for hosts that cannot reach AMD: fetch
on a machine that can, export there, import here. They share the agent's cache and its
pace of one request per ten seconds, and work whether it runs or not.`,
		Args: exactArgs(), RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	flags := cmd.PersistentFlags()
	flags.StringVar(&f.configFile, "config", "/etc/nodeagent/agent.toml", "the agent's configuration file")
	flags.StringVar(&f.stateDir, "state-dir", "", "folder to work in on a machine that is no host, instead of --config")
	flags.VarP(&f.format, "output", "o", "how to print")
	cmd.AddCommand(newEndorsementsFetch(&f), newEndorsementsImport(&f), newEndorsementsExport(&f), newEndorsementsStatus(&f))
	return cmd
}

// open reads the configuration and opens the provider.
func (f *endorsementFlags) open(cmd *cobra.Command) (*endorsements.Provider, config.Config, error) {
	cfg := config.Default()
	cfg.StateDir, cfg.EndorsementsDir = f.stateDir, filepath.Join(f.stateDir, "endorsements")
	if f.stateDir == "" {
		var err error
		if cfg, err = config.Load(f.configFile); err != nil {
			return nil, cfg, err
		}
	}
	p, err := openEndorsements(cfg, time.Now, hclog.New(&hclog.LoggerOptions{Name: "nodeagent", Level: hclog.Warn, Output: cmd.ErrOrStderr()}))
	return p, cfg, err
}

func (f *endorsementFlags) printChanges(cmd *cobra.Command, changes []endorsements.Change) error {
	doc := endorsementChanges{output.NewHeader("EndorsementChanges"), append([]endorsements.Change{}, changes...)}
	return f.format.Print(cmd.OutOrStdout(), doc, func(out io.Writer) error {
		w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
		for _, c := range doc.Documents {
			fmt.Fprintf(w, "%s\t%s\t%s\n", c.Result, c.Name, c.Why)
		}
		return w.Flush()
	})
}

func newEndorsementsFetch(f *endorsementFlags) *cobra.Command {
	var product, chipID, tcb string
	var vlek bool
	cmd := &cobra.Command{
		Use: "fetch [--product NAME --chip-id HEX --tcb COMPONENTS]", Short: "Get what is missing from AMD's key service",
		Long: `Get what is missing from AMD's key service, for this platform or for a named chip. What
is there already is not asked for again, except a revocation list older than a day.`,
		Example: "  nodeagent endorsements fetch --product Genoa --chip-id 5f3a... --tcb boot-loader=10,tee=0,snp=27,microcode=86",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var id endorsements.Identity
			named := product != "" || chipID != "" || tcb != ""
			if named {
				var err error
				if id, err = namedChip(product, chipID, tcb); err != nil {
					return err
				}
				id.VLEK = vlek
			}
			p, cfg, err := f.open(cmd)
			if err != nil {
				return err
			}
			if !named {
				platform := localPlatform(cfg)
				if platform == nil {
					return &exitError{exitPrecondition, contract.Refuse("endorsements.no-platform", "name the chip with --product, --chip-id and --tcb",
						"an emulated platform has no certificates of AMD's")}
				}
				if id, err = platform.Identity(cmd.Context()); err != nil {
					refusal := *contract.AsRefusal(err)
					refusal.Remedy += "; or name the chip with --product, --chip-id and --tcb"
					return &exitError{exitPrecondition, &refusal}
				}
			}
			changes, err := p.Fetch(cmd.Context(), id)
			return errors.Join(f.printChanges(cmd, changes), endorsementExit(err))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&product, "product", "", "product line: Milan, Genoa (also Bergamo, Siena) or Turin")
	flags.StringVar(&chipID, "chip-id", "", "chip id in hex, as in reports")
	flags.StringVar(&tcb, "tcb", "", "reported TCB, every component: boot-loader=10,tee=0,snp=27,microcode=86, and fmc on Turin")
	flags.BoolVar(&vlek, "vlek", false, "only the chain and revocation list of VLEKs; the VLEK itself is your cloud provider's to give")
	return cmd
}

func namedChip(product, chipID, tcb string) (endorsements.Identity, error) {
	var id endorsements.Identity
	if product == "" || chipID == "" || tcb == "" {
		return id, usageError("--product, --chip-id and --tcb belong together")
	}
	line, err := snp.ProductByName(product)
	if err != nil {
		return id, usageError("--product: %w; there are Milan, Genoa and Turin", err)
	}
	levels, err := wholeTCB("--tcb", line, tcb)
	if err != nil {
		return id, err
	}
	raw, err := hex.DecodeString(chipID)
	if err != nil {
		return id, usageError("--chip-id is not hex")
	}
	if id.Identity, err = snp.NewIdentity(product, raw, levels); err != nil {
		return id, usageError("%w", err)
	}
	return id, nil
}

// wholeTCB reads a TCB of which nothing may be left out: exactly this one is
// asked for, or set.
func wholeTCB(flag string, line snp.Product, text string) (contract.TCB, error) {
	required := []string{"boot-loader", "tee", "snp", "microcode"}
	if line.HasFMC() {
		required = append(required, "fmc")
	}
	levels, err := contract.ParseTCB(text)
	if err != nil {
		return levels, usageError("%s: %w", flag, err)
	}
	for _, name := range required {
		if !strings.Contains(text, name+"=") {
			return levels, usageError("%s lacks %s: all of %s are needed", flag, name, strings.Join(required, ", "))
		}
	}
	return levels, nil
}

func newEndorsementsImport(f *endorsementFlags) *cobra.Command {
	var vlek, chain string
	cmd := &cobra.Command{
		Use: "import FILE | --vlek FILE --chain FILE", Short: "Take over a bundle, or a VLEK",
		Long: `Take over a bundle that "export" wrote, or a VLEK from a cloud provider with its chain
(ASVK and ARK in PEM, as AMD's key service hands it out). Everything is checked up to
AMD's pinned root; nothing is taken unless all of it holds.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if (vlek != "") != (chain != "") || (vlek != "") == (len(args) == 1) || len(args) > 1 {
				return usageError("import takes either one FILE or --vlek with --chain; see %s --help", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			p, _, err := f.open(cmd)
			if err != nil {
				return err
			}
			var changes []endorsements.Change
			if vlek != "" {
				cert, errCert := readLimited(vlek, 64<<10)
				issuers, errChain := readLimited(chain, 64<<10)
				if err := errors.Join(errCert, errChain); err != nil {
					return err
				}
				if block, _ := pem.Decode(cert); block != nil {
					cert = block.Bytes
				}
				changes, err = p.ImportVLEK(cmd.Context(), cert, issuers)
			} else {
				data, errRead := readLimited(args[0], endorsements.MaxBundle)
				if errRead != nil {
					return errRead
				}
				changes, err = p.Import(cmd.Context(), data)
			}
			if err != nil {
				return endorsementExit(err)
			}
			return f.printChanges(cmd, changes)
		},
	}
	cmd.Flags().StringVar(&vlek, "vlek", "", "VLEK certificate, DER or PEM")
	cmd.Flags().StringVar(&chain, "chain", "", "its ASVK and ARK, PEM")
	return cmd
}

func newEndorsementsExport(f *endorsementFlags) *cobra.Command {
	return &cobra.Command{
		Use: "export FILE", Short: "Write everything in the cache to one file", Args: exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, _, err := f.open(cmd)
			if err != nil {
				return err
			}
			data, changes, err := p.Export()
			if err != nil {
				return err
			}
			if err := renameio.WriteFile(args[0], data, 0o644); err != nil {
				return fmt.Errorf("writing bundle: %w", err)
			}
			return f.printChanges(cmd, changes)
		},
	}
}

func newEndorsementsStatus(f *endorsementFlags) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what is there, how current it is, and what is missing", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, _, err := f.open(cmd)
			if err != nil {
				return err
			}
			status, err := p.Status(cmd.Context())
			if err != nil {
				return err
			}
			doc := endorsementStatus{output.NewHeader("EndorsementStatus"), status}
			return f.format.Print(cmd.OutOrStdout(), doc, func(out io.Writer) error { return printEndorsements(out, status, time.Now()) })
		},
	}
}

func printEndorsements(out io.Writer, s endorsements.Status, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	service := "never asked"
	if s.KeyService != "" {
		service = s.KeyService + ", may be asked now"
		if wait := s.MayAskAt.Sub(now); wait > 0 {
			service = fmt.Sprintf("%s, may be asked in %s", s.KeyService, wait.Round(time.Second))
		}
	}
	fmt.Fprintf(w, "key service\t%s\n", service)
	platform := "cannot be asked here"
	if p := s.Platform; p != nil {
		platform = fmt.Sprintf("%s %s, TCB %s, VLEK %v", p.Product, p.ChipID, p.TCB, p.VLEK)
	}
	fmt.Fprintf(w, "platform\t%s\n", platform)
	fmt.Fprintf(w, "served from\t%s\n", s.Source)
	for _, f := range s.Findings {
		fmt.Fprintf(w, "finding\t%s: %s; %s\n", f.Code, f.Message, f.Remedy)
	}
	if len(s.Documents) > 0 {
		fmt.Fprintf(w, "\nDOCUMENT\tTCB\tVALID UNTIL\tREMARK\n")
	}
	for _, d := range s.Documents {
		tcb, until, remark := "", "", d.Problem
		if d.TCB != nil {
			tcb = d.TCB.String()
		}
		if !d.NotAfter.IsZero() {
			until = d.NotAfter.UTC().Format(time.DateOnly)
		}
		if remark == "" && d.Stale {
			remark = "stale, not served"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", d.Name, tcb, until, remark)
	}
	return w.Flush()
}

// endorsementExit gives a refusal of the provider its exit code.
func endorsementExit(err error) error {
	refusal, ok := errors.AsType[*contract.Refusal](err)
	if !ok {
		return err
	}
	switch refusal.Code {
	case "endorsements.unknown-chip":
		return &exitError{exitNotFound, err}
	case "endorsements.rate-limited":
		return &exitError{exitConflict, err}
	case "endorsements.unreachable":
		return &exitError{exitFailed, err}
	}
	return &exitError{exitPrecondition, err}
}
