package main

import (
	"crypto/x509"
	"encoding/hex"
	"io"
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
	OK     bool        `json:"ok"`
	Checks []snp.Check `json:"checks"`
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
			result := verify.Bundle(data, x)
			doc := verdict{output.NewHeader("Verdict"), result.OK(), result.Checks}
			err = format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error {
				_, err := io.WriteString(w, verify.Text(&result))
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
	if f.minTCB != "" {
		if x.MinTCB, err = contract.ParseTCB(f.minTCB); err != nil {
			return x, usageError("--min-tcb: %w", err)
		}
	}
	for _, name := range f.emulatedRoots {
		root, err := readRoot(name)
		if err != nil {
			return x, err
		}
		x.EmulatedRoots = append(x.EmulatedRoots, root)
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

func readRoot(name string) (*x509.Certificate, error) {
	data, err := readLimited(name, 64<<10)
	if err != nil {
		return nil, err
	}
	root, err := snp.ParseEmulatedRoot(data)
	if err != nil {
		return nil, usageError("--allow-emulated-root %s: %w", name, err)
	}
	return root, nil
}
