// Command keybroker runs the reference key broker. It owns its flags and its
// listeners; everything else is package keybroker. It must not print the admin
// token or anything a tenant registers.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/gpu/evidence"
	"github.com/confidential-node/agent/gpu/rim"
	"github.com/confidential-node/agent/tests/keybroker"
	"github.com/confidential-node/agent/tests/keybroker/hsm"
)

// usageError is a wrong invocation; it exits with 2.
type usageError struct{ error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRoot().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "keybroker:", err)
	if refused, ok := errors.AsType[*contract.Refusal](err); ok {
		fmt.Fprintln(os.Stderr, "keybroker: remedy:", refused.Remedy)
	}
	code := 1
	if _, usage := errors.AsType[usageError](err); usage {
		code = 2
	}
	os.Exit(code)
}

type options struct {
	listen, adminListen string
	cert, key           string
	stateDir, tokenFile string
	issuer              string
	emulatedRoots       []string
	products            []string
	development         bool
	manifests           string
	unmeasured          bool
	token               hsm.Config
	logLevel, logFormat string
}

func newRoot() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "keybroker",
		Short: "Release a tenant's keys to attested guests only",
		Long: `keybroker verifies the SEV-SNP evidence of a confidential guest against what the
tenant registered for its launch and gives the launch's keys to the attested
key only. It speaks the CoCo KBS protocol 0.4.0 over TLS 1.3.

Exit codes: 0 stopped on request, 1 failed, 2 usage.`,
		SilenceUsage: true, SilenceErrors: true,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), &o) },
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see keybroker --help", err)}
	})
	f := cmd.Flags()
	f.StringVar(&o.listen, "listen", "127.0.0.1:8443", "address for guests (and tenants, unless --admin-listen is given)")
	f.StringVar(&o.adminListen, "admin-listen", "", "address of the admin API alone")
	f.StringVar(&o.cert, "cert", "", "TLS certificate chain, PEM (required)")
	f.StringVar(&o.key, "key", "", "TLS private key, PEM (required)")
	f.StringVar(&o.stateDir, "state-dir", "", "folder for launches and the token key (required)")
	f.StringVar(&o.tokenFile, "admin-token-file", "", "file with the admin token, at least 32 characters (required)")
	f.StringVar(&o.issuer, "issuer", "keybroker", "the broker's URL as guests know it, for tokens")
	f.StringArrayVar(&o.emulatedRoots, "allow-emulated-root", nil, "PEM `CERT` of an emulated root to accept; for trials without secrets")
	f.BoolVar(&o.development, "allow-development-image", false, "accept guest images without AML defence; for trials without secrets")
	f.StringSliceVar(&o.products, "allow-product", nil, "processor `LINE` to accept although it is excluded by default (milan: its root can be extracted in software)")
	f.StringVar(&o.manifests, "rim-dir", "", "`DIR` with NVIDIA's reference manifests of the GPUs' driver and VBIOS, read at the start")
	f.BoolVar(&o.unmeasured, "allow-unmeasured-gpu", false, "accept GPUs without comparing what they measured; for trials without secrets")
	f.StringVar(&o.logLevel, "log-level", "info", "trace, debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", "text", "text or json")
	tokenFlags(f, &o.token)
	cmd.AddCommand(newToken())
	return cmd
}

func run(ctx context.Context, o *options) (err error) {
	for name, value := range map[string]string{"cert": o.cert, "key": o.key, "state-dir": o.stateDir, "admin-token-file": o.tokenFile} {
		if value == "" {
			return usageError{fmt.Errorf("--%s is required", name)}
		}
	}
	products, err := snp.ParseProducts(o.products)
	if err != nil {
		return usageError{fmt.Errorf("--allow-product: %w", err)}
	}
	level := hclog.LevelFromString(o.logLevel)
	if level == hclog.NoLevel || (o.logFormat != "text" && o.logFormat != "json") {
		return usageError{errors.New("unknown --log-level or --log-format")}
	}
	logger := hclog.New(&hclog.LoggerOptions{Level: level, Output: os.Stderr, JSONFormat: o.logFormat == "json"})
	cert, err := tls.LoadX509KeyPair(o.cert, o.key)
	if err != nil {
		return fmt.Errorf("loading TLS certificate: %w", err)
	}
	token, err := os.ReadFile(o.tokenFile)
	if err != nil {
		return fmt.Errorf("reading admin token: %w", err)
	}
	roots, err := loadRoots(o.emulatedRoots)
	if err != nil {
		return err
	}
	gpus, err := readManifests(o.manifests, roots)
	if err != nil {
		return err
	}
	wrapping, err := openToken(&o.token)
	if err != nil {
		return err
	}
	if wrapping != nil {
		defer func() { err = errors.Join(err, wrapping.Close()) }()
	}
	server, err := keybroker.New(keybroker.Config{
		StateDir: o.stateDir, AdminToken: strings.TrimSpace(string(token)), Token: wrapping, EmulatedRoots: roots,
		AllowDevelopmentImage: o.development, AllowProducts: products, Issuer: o.issuer, Logger: logger,
		GPUManifests: gpus, AllowUnmeasuredGPUs: o.unmeasured,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	if len(roots) > 0 || o.development || o.unmeasured {
		logger.Warn("trial mode: do not register real secrets", "emulated_roots", len(roots), "development_image", o.development, "unmeasured_gpus", o.unmeasured)
	}
	group, ctx := errgroup.WithContext(ctx)
	guests := server.Handler()
	var lc net.ListenConfig
	if o.adminListen != "" {
		guests = server.GuestHandler()
		ln, err := lc.Listen(ctx, "tcp", o.adminListen)
		if err != nil {
			return fmt.Errorf("listening for the admin API: %w", err)
		}
		logger.Info("listening", "for", "admin", "addr", ln.Addr().String())
		group.Go(func() error { return keybroker.Serve(ctx, ln, cert, server.AdminHandler(), logger) })
	}
	ln, err := lc.Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("listening for guests: %w", err)
	}
	logger.Info("listening", "for", "guests", "addr", ln.Addr().String())
	group.Go(func() error { return keybroker.Serve(ctx, ln, cert, guests, logger) })
	return group.Wait()
}

// readManifests reads those of GPUs; "" is no folder.
func readManifests(dir string, roots []*x509.Certificate) ([]*rim.Manifest, error) {
	if dir == "" {
		return nil, nil
	}
	folder, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("reading reference manifests: %w", err)
	}
	defer folder.Close() //nolint:errcheck // nothing was written
	policy := evidence.Policy{EmulatedRoots: roots, Now: time.Now()}
	if err := policy.ReadManifests(folder.FS()); err != nil {
		return nil, usageError{fmt.Errorf("--rim-dir %s: %w", dir, err)}
	}
	return policy.Manifests, nil
}

func loadRoots(files []string) ([]*x509.Certificate, error) {
	var roots []*x509.Certificate
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("reading emulated root: %w", err)
		}
		root, err := snp.ParseEmulatedRoot(data)
		if err != nil {
			return nil, usageError{fmt.Errorf("--allow-emulated-root %s: %w", file, err)}
		}
		roots = append(roots, root)
	}
	return roots, nil
}
