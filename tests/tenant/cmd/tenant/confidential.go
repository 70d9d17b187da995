package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/verify"
	"github.com/confidential-node/agent/tests/tenant"
)

// verdictError ends a verification that was printed and does not hold.
type verdictError struct{ error }

func (e *verdictError) Unwrap() error { return e.error }

type verifyFlags struct {
	tenant.VerifyOptions
	minTCB  string
	explain bool
}

func (v *verifyFlags) register(f *pflag.FlagSet) {
	f.StringVar(&v.ExpectedImage, "expected-image", "", "workload image, REF@sha256:DIGEST, or the tag as you deployed it")
	f.StringVar(&v.ExpectedGPU, "expected-gpu", "", "GPUs that the manifest must demand and the guest show evidence of, `MODEL[:COUNT]`")
	f.StringSliceVar(&v.ExpectedPDIs, "expected-pdi", nil, "GPU to accept by its PDI, `HEX`; may be repeated")
	f.StringVar(&v.RIMDir, "rim-dir", "", "`DIR` with NVIDIA's reference manifests of GPUs")
	f.BoolVar(&v.AllowUnmeasuredGPUs, "allow-unmeasured-gpu", false, "accept GPUs without comparing what they measured")
	f.StringSliceVar(&v.Digests, "expected-digest", nil, "launch digest in hex; may be repeated")
	f.StringVar(&v.minTCB, "min-tcb", "", "lowest platform TCB, for instance snp=27,microcode=86")
	f.StringVar(&v.ImageDescription, "image", "", "image.json you trust")
	f.StringArrayVar(&v.AllowEmulatedRoots, "allow-emulated-root", nil, "certificate of an EMULATED root to accept; no silicon stands behind it")
	f.BoolVar(&v.AllowDevelopmentImage, "allow-development-image", false, "accept an image without a defence against ACPI code from the host")
	f.StringSliceVar(&v.AllowProducts, "allow-product", nil, "processor `LINE` to accept although it is excluded by default (milan: its root can be extracted in software)")
	appraisalFlags(f, &v.Appraisal)
}

func (v *verifyFlags) registerExplain(f *pflag.FlagSet) {
	f.BoolVar(&v.explain, "explain", false, "say with each check what it protects from")
}

func (v *verifyFlags) options() (tenant.VerifyOptions, error) {
	var err error
	v.MinTCB, err = tenant.ParseTCB(v.minTCB)
	return v.VerifyOptions, err
}

// show prints one check per line and fails if one does not hold.
func (a *app) show(cmd *cobra.Command, v *tenant.Verdict, explain bool) error {
	if a.output == "json" {
		raw, err := v.JSON(explain)
		if err != nil {
			return err
		}
		if _, err := cmd.OutOrStdout().Write(append(raw, '\n')); err != nil {
			return err
		}
	} else if _, err := io.WriteString(cmd.OutOrStdout(), verify.Text(&v.Result, explain)); err != nil {
		return err
	}
	if !v.OK() {
		return &verdictError{contract.Refuse("tenant.evidence-refused", "see the failed checks", "the evidence does not hold")}
	}
	return nil
}

func newAttest(a *app) *cobra.Command {
	var f verifyFlags
	var out string
	cmd := &cobra.Command{
		Use: "attest N", Short: "Challenge a running guest and verify its evidence", Args: exactArgs("N"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			v, err := t.Attest(ctx, args[0], o)
			if err != nil {
				return err
			}
			if out != "" {
				if err := os.WriteFile(out, v.Raw, 0o600); err != nil {
					return fmt.Errorf("writing evidence: %w", err)
				}
			}
			return a.show(cmd, v, f.explain)
		}),
	}
	f.register(cmd.Flags())
	f.registerExplain(cmd.Flags())
	cmd.Flags().StringVar(&out, "out", "", "write the evidence to this file")
	return cmd
}

func newVerify(a *app) *cobra.Command {
	var f verifyFlags
	cmd := &cobra.Command{
		Use:   "verify FILE|N",
		Short: "Verify evidence from a file, or the latest of a deployment",
		Long: `Verify evidence, one check per line. The evidence is never a source of
expectations: they come from your deployments, your copy of the guest image and
the flags. Exit code 0 means that no check failed, 5 that one did. A line begins with
  ✓  the check holds
  ✗  it does not; expected and found values follow
  -  it was not made, and the line says why: it proves nothing and fails nothing
  !  no check: a warning, which does not change the verdict`,
		Args: exactArgs("FILE|N"),
		RunE: a.with(func(_ context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			var v *tenant.Verdict
			if t.Known(args[0]) {
				v, err = t.VerifyDeployment(args[0], o)
			} else {
				var raw []byte
				if raw, err = readEvidence(args[0]); err != nil {
					return err
				}
				v, err = t.Verify(raw, o)
			}
			if err != nil {
				return err
			}
			return a.show(cmd, v, f.explain)
		}),
	}
	f.register(cmd.Flags())
	f.registerExplain(cmd.Flags())
	cmd.Flags().StringVar(&f.Nonce, "nonce", "", "nonce of your challenge in hex; not needed for challenges this tool made")
	return cmd
}

func readEvidence(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, contract.Refuse("tenant.not-found", "give an evidence file or the name of a deployment", "there is no file and no deployment %q", path)
	}
	if err != nil {
		return nil, fmt.Errorf("reading evidence: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	return io.ReadAll(io.LimitReader(f, contract.MaxEvidenceBytes+1))
}

func newCall(a *app) *cobra.Command {
	var f verifyFlags
	var address, serverName, method, data string
	var port int
	cmd := &cobra.Command{
		Use:   "call N /PATH",
		Short: "Send one HTTP request into an attested guest",
		Long: `Connect to the workload's port with TLS 1.3, verify the guest's evidence and that
it binds this very connection, and only then send the request.`,
		Args: exactArgs("N", "/PATH"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			if !strings.HasPrefix(args[1], "/") {
				return tenant.Usage("path %q does not start with /", args[1])
			}
			if address == "" {
				if address, o.ServerName, err = t.Address(ctx, args[0], port); err != nil {
					return err
				}
			}
			if serverName != "" {
				o.ServerName = serverName
			}
			client, err := t.HTTPClient(args[0], address, o)
			if err != nil {
				return err
			}
			req, err := http.NewRequestWithContext(ctx, method, "https://"+address+args[1], strings.NewReader(data))
			if err != nil {
				return tenant.Usage("%v", err)
			}
			resp, err := client.Do(req)
			if err != nil {
				return fmt.Errorf("calling the guest: %w", err)
			}
			defer resp.Body.Close() //nolint:errcheck // it is read to its end
			if _, err := io.Copy(cmd.OutOrStdout(), resp.Body); err != nil {
				return fmt.Errorf("reading the answer: %w", err)
			}
			if resp.StatusCode >= 400 {
				return fmt.Errorf("the workload answered %s", resp.Status)
			}
			return nil
		}),
	}
	f.register(cmd.Flags())
	cmd.Flags().StringVar(&address, "address", "", "HOST:PORT to connect to, instead of the platform's word")
	cmd.Flags().StringVar(&serverName, "server-name", "", "name to ask for on the node's shared TLS port, instead of the platform's word")
	cmd.Flags().IntVar(&port, "port", 0, "the guest's port, when it has several")
	cmd.Flags().StringVarP(&method, "request", "X", http.MethodGet, "HTTP method")
	cmd.Flags().StringVarP(&data, "data", "d", "", "request body")
	return cmd
}
