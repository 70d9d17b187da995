package main

import (
	"encoding/hex"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/verify"
	"github.com/confidential-node/agent/nodeagent/output"
)

// verdict is the document of `nodeagent verify`.
type verdict struct {
	output.Header
	OK       bool                   `json:"ok"`
	Signer   *snp.Signer            `json:"signer,omitempty"`
	GPUs     []contract.AttestedGPU `json:"gpus,omitempty"`
	Checks   []verdictCheck         `json:"checks"`
	Warnings []snp.Warning          `json:"warnings,omitempty"`
}

type verdictCheck struct {
	snp.Check
	// ProtectsFrom is set by --explain.
	ProtectsFrom string `json:"protects_from,omitempty"`
}

type verifyFlags struct {
	image, nonce, imageFile string
	reportData, hostData    string
	certs                   []string
	allowDevelopmentImage   bool
	explain                 bool
	policy                  policyFlags
	gpus                    expectedGPUs
}

func newVerifyCommand() *cobra.Command {
	var format output.Format
	var f verifyFlags
	cmd := &cobra.Command{
		Use:   "verify FILE --expected-digest HEX ...",
		Short: "Check a guest's evidence, one line per check",
		Long: `Check a guest's evidence against what you expect of it. Every check prints one line;
exit code 0 means that none failed, 5 that at least one did. A line begins with
  ✓  the check holds
  ✗  it does not; expected and found values follow
  -  it was not made, and the line says why: it proves nothing and fails nothing
  !  no check: a warning, which does not change the verdict

FILE is one of
  an evidence bundle (JSON): needs --expected-image, --expected-digest and --nonce,
  and where the guest has GPUs also --expected-gpu and --rim-dir;
  a raw attestation report of 1184 bytes, with its certificates in --certs, or
  a go-sev-guest attestation (protobuf): both need --expected-digest, --report-data
  and --host-data.

The evidence itself is never a source of expectations: take the launch digest from
"nodeagent measure" over files you trust, and the nonce from your own challenge.

No signature ties a GPU to the processor that signed the report. That the GPUs are in
the same machine, and that no genuine GPU elsewhere answered in their stead, is the word
of the measured guest which asked them; it is as good as its launch digest.`,
		Example: `  nodeagent verify evidence.json --expected-image registry.example/app@sha256:... --expected-digest 8a1f... --nonce 00112233445566778899aabbccddeeff
  nodeagent verify evidence.json --expected-image registry.example/app@sha256:... --expected-digest 8a1f... --nonce 0011... --expected-gpu H100 --rim-dir rims
  nodeagent verify report.bin --certs vcek.pem --certs cert_chain.pem --expected-digest 8a1f... --report-data 5c0e... --host-data 91b2... --explain`,
		Args: exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, err := readLimited(args[0], contract.MaxEvidenceBytes)
			if err != nil {
				return err
			}
			result, err := f.judge(cmd.Flags(), data)
			if err != nil {
				return err
			}
			doc := f.document(result)
			err = format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error {
				_, err := io.WriteString(w, verify.Text(result, f.explain))
				return err
			})
			if err != nil {
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
	flags.BoolVar(&f.explain, "explain", false, "say with each check what it protects from")
	flags.StringVar(&f.image, "expected-image", "", "workload image, REF@sha256:DIGEST (bundles)")
	flags.StringVar(&f.nonce, "nonce", "", "nonce of your challenge in hex (bundles)")
	flags.StringVar(&f.imageFile, "image", "", "image.json you trust, for the facts a launch digest does not tell (bundles)")
	flags.BoolVar(&f.allowDevelopmentImage, "allow-development-image", false, "accept an image without a defence against ACPI code from the host (bundles)")
	flags.StringVar(&f.reportData, "report-data", "", "REPORT_DATA in hex, 64 bytes (reports and attestations)")
	flags.StringVar(&f.hostData, "host-data", "", "HOST_DATA in hex, 32 bytes (reports and attestations)")
	flags.StringArrayVar(&f.certs, "certs", nil, "`PEM` file with VCEK or VLEK, ASK and ARK in any order, instead of the evidence's own; may be repeated (reports and attestations)")
	f.policy.register(flags)
	f.gpus.register(flags)
	return cmd
}

// judge reads evidence in whatever form it is. What cannot even be read is a
// failed check, not an error: it is no evidence.
func (f *verifyFlags) judge(set *pflag.FlagSet, data []byte) (*snp.Result, error) {
	if !set.Changed("expected-digest") {
		return nil, usageError("--expected-digest is required, and what else FILE's form needs (see --help): evidence proves nothing without your own expectations")
	}
	policy, err := f.policy.policy()
	if err != nil {
		return nil, err
	}
	form := verify.Detect(data)
	if form == verify.FormatBundle {
		x, err := f.expectations(set, policy)
		if err != nil {
			return nil, err
		}
		result := verify.Bundle(data, x)
		return &result, nil
	}
	var e contract.Endorsements
	if form == verify.FormatAttestation {
		if data, e, err = verify.ParseAttestation(data); err != nil {
			var result snp.Result
			result.Add("report", false, "", "", "", err.Error()+"; this is no bundle, no report of 1184 bytes and no attestation of go-sev-guest")
			return &result, nil //nolint:nilerr // a failed check says so
		}
	}
	x, err := f.expect(set, policy)
	if err != nil {
		return nil, err
	}
	if len(f.certs) > 0 {
		if e, err = readCertificates(f.certs); err != nil {
			return nil, err
		}
	}
	result := snp.Verify(data, e, x)
	return &result, nil
}

func (f *verifyFlags) document(result *snp.Result) verdict {
	doc := verdict{Header: output.NewHeader("Verdict"), OK: result.OK(), Signer: result.Signer, GPUs: result.GPUs, Warnings: result.Warnings}
	for _, c := range result.Checks {
		check := verdictCheck{Check: c}
		if f.explain {
			check.ProtectsFrom = verify.Explain(c.Name)
		}
		doc.Checks = append(doc.Checks, check)
	}
	return doc
}

// only refuses flags that mean nothing for this form of evidence, and
// demands those without which it proves nothing.
func only(set *pflag.FlagSet, form string, needed, foreign []string) error {
	for _, name := range foreign {
		if set.Changed(name) {
			return usageError("--%s means nothing for %s", name, form)
		}
	}
	for _, name := range needed {
		if !set.Changed(name) {
			return usageError("%s needs --%s: evidence proves nothing without your own expectations", form, strings.Join(needed, ", --"))
		}
	}
	return nil
}

func (f *verifyFlags) expectations(set *pflag.FlagSet, policy snp.AppraisalPolicy) (verify.Expectations, error) {
	x := verify.Expectations{Image: f.image, AllowDevelopmentImage: f.allowDevelopmentImage, AppraisalPolicy: policy}
	err := only(set, "an evidence bundle", []string{"expected-image", "nonce"}, []string{"report-data", "host-data", "certs"})
	if err != nil {
		return x, err
	}
	if _, _, _, err := contract.SplitImage(f.image); err != nil {
		return x, usageError("--expected-image: %q is not pinned as host/repository@sha256:digest", f.image)
	}
	if x.Nonce, err = hex.DecodeString(f.nonce); err != nil {
		return x, usageError("--nonce is not hex")
	}
	gpus, err := f.gpus.policy(set, &policy)
	if err != nil {
		return x, err
	}
	if gpus != nil {
		x.GPUs = gpus.Judge
	}
	if f.imageFile != "" {
		data, err := readLimited(f.imageFile, contract.MaxImageDescriptionBytes)
		if err != nil {
			return x, err
		}
		if x.TrustedImage, err = contract.ParseImageDescription(data); err != nil {
			return x, usageError("--image %s: %w", f.imageFile, err)
		}
	}
	return x, nil
}

func (f *verifyFlags) expect(set *pflag.FlagSet, policy snp.AppraisalPolicy) (snp.Expect, error) {
	x := snp.Expect{AppraisalPolicy: policy}
	err := only(set, "an attestation report", []string{"report-data", "host-data"},
		append(gpuFlagNames(), "expected-image", "nonce", "image", "allow-development-image"))
	if err != nil {
		return x, err
	}
	if x.ReportData, err = decodeHex("report-data", f.reportData, contract.ReportDataSize); err != nil {
		return x, err
	}
	x.HostData, err = decodeHex("host-data", f.hostData, 32)
	return x, err
}

func decodeHex(flag, text string, size int) ([]byte, error) {
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != size {
		return nil, usageError("--%s %q is not %d hex digits", flag, text, 2*size)
	}
	return raw, nil
}

func readCertificates(names []string) (contract.Endorsements, error) {
	var files [][]byte
	for _, name := range names {
		data, err := readLimited(name, verify.MaxCertificatesBytes)
		if err != nil {
			return contract.Endorsements{}, err
		}
		files = append(files, data)
	}
	e, err := verify.ParseCertificates(files...)
	if err != nil {
		return e, usageError("--certs: %w", err)
	}
	return e, nil
}
