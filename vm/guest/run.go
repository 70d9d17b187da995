package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/boot"
	"github.com/confidential-node/agent/vm/guest/gpu"
	"github.com/confidential-node/agent/vm/guest/inputs"
	"github.com/confidential-node/agent/vm/guest/metadata"
	"github.com/confidential-node/agent/vm/guest/tee"
	"github.com/confidential-node/agent/vm/guest/workload"
)

// bootTimeout bounds everything before the host can be spoken to.
const bootTimeout = 90 * time.Second

// run is the wiring list: it brings the machine up and gives the flow what it
// works with. Errors before the network is up can be told to nobody.
func run(ctx context.Context, log hclog.Logger, debug bool) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	started := time.Now()
	bootCtx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	driver, err := boot.Modules()
	if err := errors.Join(boot.Limits(), err); err != nil {
		return err
	}
	device, err := boot.LinkUp(bootCtx)
	if err != nil {
		return err
	}
	host := metadata.New(device)
	g := &guest{log: log, host: host, started: started, linger: evidenceLinger, now: time.Now}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	g.stopping = make(chan struct{})
	go func() {
		// Without it the host can only pull the plug.
		if err := boot.PowerButton(ctx, g.stop); err != nil {
			log.Warn("no power button", "err", err)
		}
	}()
	return g.end(ctx, func() error {
		if err := g.equip(device, driver, debug); err != nil {
			return err
		}
		return g.flow(ctx)
	}())
}

// equip gives the guest the machine's own parts. driver is why that of the
// GPUs did not load.
func (g *guest) equip(device string, driver error, debug bool) (err error) {
	if !tee.Emulated {
		if err := boot.ReportFS(); err != nil {
			return err
		}
	}
	if err := boot.Entropy(); err != nil {
		return contract.Refuse("guest.entropy", "launch on a processor model with RDRAND, without an entropy device of the host, and with the image's own command line",
			"the guest's randomness would be the host's").Because(err)
	}
	if g.memory, err = boot.Memory(); err != nil {
		return err
	}
	if g.tee, err = tee.Open(); err != nil {
		return contract.Refuse("guest.no-report", "start the guest as a confidential one, on a host that can", "the guest gets no attestation reports").Because(err)
	}
	g.configure = func(f contract.NetworkFacts) error { return boot.Configure(device, f) }
	g.inputs = inputs.Store{Disks: inputs.Disks{Sys: "/sys/block", Dev: "/dev"}, Private: boot.Private, Plain: boot.Inputs}
	g.resultsDir, g.rootDir = boot.Results, boot.Root
	g.idShift, g.ids = workload.IDShift, workload.IDs
	if _, err := os.Stat(boot.GPUHelper); err == nil {
		g.driverFolder = boot.GPUFolder
		g.openGPUs = gpu.Machine{
			Sysfs: "/sys", Proc: "/proc", Dev: "/dev", Helper: []string{boot.GPUHelper}, Env: []string{"LD_LIBRARY_PATH=" + boot.GPULibrary},
			Driver: driver,
		}.Open
	}
	g.listen = func(ctx context.Context, port int) (net.Listener, error) {
		return (&net.ListenConfig{}).Listen(ctx, "tcp", ":"+strconv.Itoa(port))
	}
	g.start = func(ctx context.Context, spec workload.Spec) (process, error) {
		var out io.Writer
		if debug {
			out = os.Stderr
		}
		return workload.Start(ctx, spec, out)
	}
	return nil
}
