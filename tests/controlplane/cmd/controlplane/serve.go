package main

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/tests/controlplane"
)

func (a *app) serve() *cobra.Command {
	var cfg controlplane.Config
	var cert, key, level, format string
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the control plane in the foreground", Args: exactArgs(),
		Long: `Run the control plane in the foreground until SIGTERM or SIGINT. Without --cert a CA
and a certificate for --name and the listening addresses are made in --dir.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l := hclog.LevelFromString(level)
			if l == hclog.NoLevel || (format != "text" && format != "json") {
				return usage("unknown --log-level or --log-format")
			}
			cfg.Dir = a.dir
			cfg.Logger = hclog.New(&hclog.LoggerOptions{Name: "controlplane", Level: l, Output: cmd.ErrOrStderr(), JSONFormat: format == "json"})
			if cert != "" {
				var err error
				if cfg.Cert, err = tls.LoadX509KeyPair(cert, key); err != nil {
					return fmt.Errorf("loading TLS certificate: %w", err)
				}
				if a.caFile == "" {
					return usage("--cert needs --ca, which nodes are given at enrolment")
				}
				if cfg.CAPEM, err = os.ReadFile(a.caFile); err != nil {
					return fmt.Errorf("reading CA: %w", err)
				}
			}
			s, err := controlplane.Start(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			<-cmd.Context().Done()
			s.Close()
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.ListenNATS, "listen-nats", "127.0.0.1:4222", "address for nodes")
	f.StringVar(&cfg.ListenHTTP, "listen-http", "127.0.0.1:4280", "address of the HTTPS API")
	f.StringArrayVar(&cfg.Names, "name", nil, "`NAME` or address under which the control plane is reached, for a certificate of its own making")
	f.StringVar(&cert, "cert", "", "TLS certificate chain, PEM `FILE`")
	f.StringVar(&key, "key", "", "its private key, PEM `FILE`")
	f.StringVar(&level, "log-level", "info", "trace, debug, info, warn or error")
	f.StringVar(&format, "log-format", "text", "text or json")
	return cmd
}

// enrolled is what the verb prints. The credentials are in a file only.
type enrolled struct {
	output.Header
	Host      string   `json:"host_id"`
	CredsFile string   `json:"creds_file"`
	CAFile    string   `json:"ca_file"`
	IssuerKey string   `json:"issuer_key"`
	Servers   []string `json:"servers"`
}

func (a *app) enrol() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use: "enrol NODE", Short: "Make an identity for a host", Args: exactArgs("NODE"),
		Long: "Make an identity for a host and write it to --out; print what belongs into the agent's configuration.",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, c, done, err := a.open(cmd)
			if err != nil {
				return err
			}
			defer done()
			e, err := c.Enrol(ctx, args[0])
			if err != nil {
				return err
			}
			// The agent takes absolute paths only.
			dir, err := filepath.Abs(out)
			if err != nil {
				return fmt.Errorf("writing enrolment: %w", err)
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return fmt.Errorf("writing enrolment: %w", err)
			}
			doc := enrolled{
				header("Enrolment"), args[0], filepath.Join(dir, args[0]+".creds"), filepath.Join(dir, "control-ca.pem"),
				base64.StdEncoding.EncodeToString(e.IssuerKey), e.Servers,
			}
			for path, data := range map[string][]byte{doc.CredsFile: e.Credentials, doc.CAFile: e.CAPEM} {
				if err := os.WriteFile(path, data, 0o600); err != nil {
					return fmt.Errorf("writing enrolment: %w", err)
				}
			}
			return a.format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "host_id = %q\n\n[control]\nservers = [%q]\nca_file = %q\ncreds_file = %q\nissuer_keys = [%q]\n",
					doc.Host, doc.Servers[0], doc.CAFile, doc.CredsFile, doc.IssuerKey)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", ".", "`FOLDER` for the credentials (0600) and the CA")
	return cmd
}
