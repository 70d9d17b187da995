// Command psp runs an emulated security processor, see package psp.
package main

import (
	"context"
	"errors"
	"flag"
	"math"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/emulator/psp"
)

func main() {
	socket := flag.String("socket", "", "unix socket QEMU connects to")
	dir := flag.String("endorsements", "", "folder to write vcek.der, ask.der, ark.der and root.pem to")
	svn := flag.Uint("snp-svn", 27, "SNP component of the TCB")
	microcode := flag.Uint("microcode", 86, "microcode component of the TCB")
	policy := flag.Uint64("policy", 0, "guest policy to report instead of the launch's")
	fault := flag.String("fault", "", "wrong-measurement, wrong-host-data, bad-signature or silent")
	flag.Parse()
	logger := hclog.New(&hclog.LoggerOptions{Name: "EMULATED-psp", Output: os.Stderr})
	if *svn > math.MaxUint8 || *microcode > math.MaxUint8 {
		logger.Error("a component of the TCB has one byte", "snp_svn", *svn, "microcode", *microcode)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *socket, *dir, psp.Config{
		TCB:            contract.TCB{BootLoader: 10, SNP: uint8(*svn), Microcode: uint8(*microcode)},
		PolicyOverride: *policy, Fault: psp.Fault(*fault), Logger: logger,
	})
	stop()
	if err != nil {
		logger.Error("ended", "err", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, socket, dir string, cfg psp.Config) error {
	if socket == "" || dir == "" {
		return errors.New("--socket and --endorsements are required")
	}
	p, err := psp.New(cfg)
	if err != nil {
		return err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	// QEMU runs as another user.
	if err := os.Chmod(socket, 0o666); err != nil { //nolint:gosec // an emulated PSP guards nothing
		return err
	}
	if err := p.WriteEndorsements(dir); err != nil {
		return err
	}
	cfg.Logger.Warn("this is no security processor: nothing it signs proves anything", "socket", socket)
	return p.Serve(ctx, listener)
}
