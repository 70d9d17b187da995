package main

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/verify"
	"github.com/confidential-node/agent/nodeagent/output"
)

// verdict is the document of `nodeagent verify`.
type verdict struct {
	output.Header
	OK     bool           `json:"ok"`
	Checks []verdictCheck `json:"checks"`
}

type verdictCheck struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Want   string `json:"want,omitempty"`
	Got    string `json:"got,omitempty"`
	Why    string `json:"why,omitempty"`
}

type verifyFlags struct {
	image, nonce, minTCB, imageFile   string
	digests, emulatedRoots            []string
	allowDevelopmentImage, allowMilan bool
}

func newVerifyCommand() *cobra.Command {
	var format output.Format
	var f verifyFlags
	cmd := &cobra.Command{
		Use:   "verify FILE --expected-image REF@DIGEST --expected-digest HEX --nonce HEX",
		Short: "Check a guest's evidence, one line per check",
		Long: `Check a guest's evidence against what you expect of it. Every check prints one line;
exit code 0 means that every one holds, 5 that at least one does not.

The evidence itself is never a source of expectations: take the launch digest from
"nodeagent measure" over files you trust, and the nonce from your own challenge.`,
		Example: "  nodeagent verify evidence.json --expected-image registry.example/app@sha256:... --expected-digest 8a1f... --nonce 00112233445566778899aabbccddeeff",
		Args:    exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			x, err := f.expectations()
			if err != nil {
				return err
			}
			data, err := readLimited(args[0], contract.MaxEvidenceBytes)
			if err != nil {
				return err
			}
			doc := newVerdict(verify.Bundle(data, x))
			if err := format.Print(cmd.OutOrStdout(), doc, doc.table); err != nil {
				return err
			}
			if !doc.OK {
				return &exitError{code: exitPrecondition}
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.VarP(&format, "output", "o", "how to print")
	flags.StringVar(&f.image, "expected-image", "", "workload image, REF@sha256:DIGEST (required)")
	flags.StringSliceVar(&f.digests, "expected-digest", nil, "launch digest in hex, may be repeated (required)")
	flags.StringVar(&f.nonce, "nonce", "", "nonce of your challenge in hex (required)")
	flags.StringVar(&f.minTCB, "min-tcb", "", "lowest platform TCB, for instance snp=27,microcode=86,boot-loader=10")
	flags.StringVar(&f.imageFile, "image", "", "image.json you trust, for the facts a launch digest does not tell")
	flags.StringArrayVar(&f.emulatedRoots, "allow-emulated-root", nil, "certificate of an EMULATED root to accept; no silicon stands behind it")
	flags.BoolVar(&f.allowDevelopmentImage, "allow-development-image", false, "accept an image without a defence against ACPI code from the host")
	flags.BoolVar(&f.allowMilan, "allow-milan", false, "accept EPYC 7003, whose attestation root can be extracted in software")
	return cmd
}

func (f *verifyFlags) expectations() (verify.Expectations, error) {
	x := verify.Expectations{Image: f.image, AllowDevelopmentImage: f.allowDevelopmentImage, AllowMilan: f.allowMilan, Now: time.Now()}
	if f.image == "" || len(f.digests) == 0 || f.nonce == "" {
		return x, usageError("--expected-image, --expected-digest and --nonce are required: evidence proves nothing without your own expectations")
	}
	if _, _, _, err := contract.SplitImage(f.image); err != nil {
		return x, usageError("--expected-image: %q is not pinned as host/repository@sha256:digest", f.image)
	}
	var err error
	if x.Nonce, err = hex.DecodeString(f.nonce); err != nil {
		return x, usageError("--nonce is not hex")
	}
	for _, d := range f.digests {
		raw, err := hex.DecodeString(d)
		if err != nil || len(raw) != 48 {
			return x, usageError("--expected-digest %q is not 96 hex digits", d)
		}
		x.Digests = append(x.Digests, raw)
	}
	if x.MinTCB, err = parseTCB("--min-tcb", f.minTCB); err != nil {
		return x, err
	}
	for _, name := range f.emulatedRoots {
		cert, err := readCertificate(name)
		if err != nil {
			return x, err
		}
		x.EmulatedRoots = append(x.EmulatedRoots, cert)
	}
	if f.imageFile != "" {
		data, err := readLimited(f.imageFile, contract.MaxImageDescriptionBytes)
		if err != nil {
			return x, err
		}
		if x.TrustedImage, err = contract.ParseImageDescription(data); err != nil {
			return x, err
		}
	}
	return x, nil
}

// parseTCB decodes "snp=27,microcode=86". Components left out are 0, which no
// required one may be.
func parseTCB(flag, text string, required ...string) (contract.TCB, error) {
	var tcb contract.TCB
	if text == "" && len(required) == 0 {
		return tcb, nil
	}
	fields := map[string]*uint8{
		"fmc": &tcb.FMC, "boot-loader": &tcb.BootLoader, "tee": &tcb.TEE, "snp": &tcb.SNP, "microcode": &tcb.Microcode,
	}
	given := map[string]bool{}
	for part := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(part, "=")
		name = strings.TrimSpace(name)
		field, known := fields[name]
		v, err := strconv.ParseUint(strings.TrimSpace(value), 0, 8)
		if !known || err != nil {
			return tcb, usageError("%s: %q is not one of fmc, boot-loader, tee, snp, microcode = 0..255", flag, part)
		}
		*field, given[name] = uint8(v), true
	}
	for _, name := range required {
		if !given[name] {
			return tcb, usageError("%s lacks %s: all of %s are needed", flag, name, strings.Join(required, ", "))
		}
	}
	return tcb, nil
}

func readCertificate(name string) (*x509.Certificate, error) {
	data, err := readLimited(name, 64<<10)
	if err != nil {
		return nil, err
	}
	if block, _ := pem.Decode(data); block != nil {
		data = block.Bytes
	}
	cert, err := x509.ParseCertificate(data)
	if err != nil {
		return nil, fmt.Errorf("reading certificate %s: %w", name, err)
	}
	return cert, nil
}

func newVerdict(r snp.Result) verdict {
	v := verdict{Header: output.NewHeader("Verdict"), OK: r.OK()}
	for _, c := range r.Checks {
		v.Checks = append(v.Checks, verdictCheck{c.Name, string(c.Status), c.Want, c.Got, c.Why})
	}
	return v
}

func (v verdict) table(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	held := 0
	for _, c := range v.Checks {
		mark := "✗"
		switch c.Status {
		case string(snp.Pass):
			mark = "✓"
			held++
		case string(snp.Skip):
			mark = "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", mark, c.Name, c.Why)
		if c.Status == string(snp.Fail) && c.Want != "" {
			fmt.Fprintf(w, "\t\texpected %s\n\t\tfound    %s\n", c.Want, c.Got)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	word := "the evidence does NOT hold"
	if v.OK {
		word = "the evidence holds"
	}
	_, err := fmt.Fprintf(out, "%d of %d checks hold: %s\n", held, len(v.Checks), word)
	return err
}
