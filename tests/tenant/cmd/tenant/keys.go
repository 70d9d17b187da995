package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/tests/tenant"
)

func newKeygen(a *app) *cobra.Command {
	var raw, hybrid bool
	cmd := &cobra.Command{
		Use: "keygen FILE", Short: "Make a data key in a new file", Args: exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind := tenant.KeyX25519
			switch {
			case raw && hybrid:
				return tenant.Usage("--raw and --hybrid exclude each other")
			case raw:
				kind = tenant.KeyRaw
			case hybrid:
				kind = tenant.KeyHybrid
			}
			key, err := tenant.Keygen(kind)
			if err != nil {
				return err
			}
			recipient, err := tenant.Recipient(key)
			if err != nil {
				return err
			}
			if err := tenant.WriteKey(args[0], key); err != nil {
				return err
			}
			return a.print(cmd, "Key", map[string]string{"file": args[0], "recipient": recipient}, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, recipient)
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&raw, "raw", false, "32 random bytes instead of an age identity")
	cmd.Flags().BoolVar(&hybrid, "hybrid", false, "post-quantum hybrid age identity (ML-KEM-768 and X25519)")
	return cmd
}

func newSeal(a *app) *cobra.Command {
	var key, out string
	cmd := &cobra.Command{
		Use: "seal FILE", Short: "Seal a file (- for standard input) with age", Args: exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" || (args[0] == "-" && out == "") {
				return tenant.Usage("--encryption-key is required, and --out when reading standard input")
			}
			if out == "" {
				out = args[0] + ".age"
			}
			sealed, err := tenant.SealFile(args[0], out, key, cmd.InOrStdin(), a.reporter(cmd))
			if err != nil {
				return err
			}
			doc := map[string]any{"file": out, "sha256": sealed.SHA256, "size": sealed.Size}
			return a.print(cmd, "Sealed", doc, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s  %s\n", sealed.SHA256, out)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&key, "encryption-key", "", "file://PATH of the data key (required)")
	cmd.Flags().StringVar(&out, "out", "", "file to write, default FILE.age")
	return cmd
}

func newUpload(a *app) *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use: "upload FILE", Short: "Upload a sealed file; plaintext is refused", Args: exactArgs("FILE"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			object, err := t.Upload(ctx, args[0], to)
			if err != nil {
				return err
			}
			return a.print(cmd, "Object", object, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s  encrypted://%s/%s\n", object.SHA256, object.Bucket, object.Key)
				return err
			})
		}),
	}
	cmd.Flags().StringVar(&to, "to", "", "bucket/key, default the profile's bucket and the file's name")
	return cmd
}

func newRotateKey(a *app) *cobra.Command {
	var out, value string
	cmd := &cobra.Command{
		Use:   "rotate-key N|RESOURCE",
		Short: "Re-seal a deployment's inputs under a new key, or replace a broker resource",
		Long: `With a deployment's name: every input is sealed again under a new key, written to
--key-out, and the old key is withdrawn at the broker. The new objects are for the
next deploy; a running guest keeps what it has.

With kbs:///repository/type/tag: the resource gets the value in the file --value,
in every deployment that has it.`,
		Args: exactArgs("N|RESOURCE"),
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, args []string) error {
			if strings.HasPrefix(args[0], "kbs:///") {
				return a.rotateResource(ctx, cmd, t, args[0], value)
			}
			if out == "" {
				return tenant.Usage("--key-out is required")
			}
			r, err := t.RotateKey(ctx, args[0], out)
			if err != nil {
				return err
			}
			return a.print(cmd, "Rotation", r, func(w io.Writer) error {
				for _, in := range r.Inputs {
					if _, err := fmt.Fprintf(w, "%s=encrypted://%s/%s\n", in.Name, in.Bucket, in.Key); err != nil {
						return err
					}
				}
				_, err := fmt.Fprintf(w, "deploy again with --encryption-key file://%s and these inputs\n", r.KeyFile)
				return err
			})
		}),
	}
	cmd.Flags().StringVar(&out, "key-out", "", "new file for the new key")
	cmd.Flags().StringVar(&value, "value", "", "file with the resource's new value")
	return cmd
}

func (a *app) rotateResource(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, uri, file string) error {
	if file == "" {
		return tenant.Usage("--value is required for a resource")
	}
	value, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading the new value: %w", err)
	}
	names, err := t.RotateResource(ctx, uri, value)
	if err != nil {
		return err
	}
	return a.print(cmd, "Rotation", map[string]any{"deployments": names}, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, strings.Join(names, "\n"))
		return err
	})
}
