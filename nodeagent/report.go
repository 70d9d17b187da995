package main

import (
	"context"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/catalogue"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/capability"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/endorsements"
)

const (
	// reportEvery is how often the host is looked at for changes. Firmware and
	// packages change by an operator's hand; reading it all takes a moment of
	// one processor.
	reportEvery = 5 * time.Minute
	// libvirtPatience is how long versions are waited for.
	libvirtPatience = 5 * time.Second
	// gpuSettle is how long after a GPU's change the host is looked at.
	gpuSettle = 10 * time.Second
)

// versionsFunc asks for the versions of libvirt and of the hypervisor.
type versionsFunc func(context.Context) (libvirt, hypervisor string, err error)

// softwareFacts reads what capability judges. What cannot be read stays
// unknown, and is told in the log.
func softwareFacts(ctx context.Context, kernel string, firmwareDirs []string, versions versionsFunc, log hclog.Logger) capability.Facts {
	f := capability.Facts{Kernel: kernel, Now: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, libvirtPatience)
	defer cancel()
	var err error
	if f.Libvirt, f.QEMU, err = versions(ctx); err != nil {
		log.Warn("asking libvirt for its version", "err", err)
	}
	images, err := catalogue.List(firmwareDirs)
	if err != nil {
		log.Warn("reading the firmware images", "err", err)
		return f
	}
	f.Firmware = []capability.Firmware{}
	for _, i := range images {
		f.Firmware = append(f.Firmware, capability.Firmware{Path: i.Path, Build: string(i.Build), Usable: i.Refusal == nil})
	}
	return f
}

// firmwareDirs are where images are that this host may boot.
func firmwareDirs(root string, cfg config.Config) []string {
	return slices.Concat(catalogue.Dirs(root), cfg.ImageDirs)
}

// endorsementFacts are nil while the provider does not know the platform.
func endorsementFacts(p *endorsements.Provider) *capability.EndorsementFacts {
	if !p.Observed() {
		return nil
	}
	return &capability.EndorsementFacts{Served: p.Endorsements(), Findings: p.Findings()}
}

// capability is what the control plane is told the host can do.
func (a *agent) capability() *api.Capability { return a.lookAtHost(context.Background()) }

func (a *agent) lookAtHost(ctx context.Context) *api.Capability {
	version := buildVersion()
	c := &api.Capability{
		Protocol: api.CapabilityVersion, AgentVersion: version.Version, EmulatedBuild: version.Emulated, Tee: a.cfg.TEE, Features: api.Features(),
		MaxVcpus: uint32(a.cfg.Policy.MaxVCPUs), MaxMemoryMib: min(a.cfg.Policy.MaxMemoryMiB, a.host.capacity.MemoryMiB),
		CpuBrand: a.host.cpuBrand, Kernel: a.host.kernel,
	}
	epoch, err := a.store.Epoch()
	if err != nil {
		a.log.Error("reading the store for a capability report", "err", err)
	}
	c.IssuerEpoch, c.StoreId = epoch.Number, epoch.StoreID[:]
	images, err := a.images()
	if err != nil {
		a.log.Error("reading the image catalogue", "err", err)
	}
	for _, i := range images {
		c.Images = append(c.Images, &api.BootImage{
			FirmwareSha256: unhex(i.Description.Firmware.SHA256), KernelSha256: unhex(i.Description.Kernel.SHA256),
			InitrdSha256: unhex(i.Description.Initrd.SHA256), Cmdline: i.Description.Cmdline,
		})
	}
	facts := softwareFacts(ctx, a.host.kernel, firmwareDirs("/", a.cfg), a.driver.Versions, a.log)
	facts.Now, facts.Endorsements = a.clock.Wall(), endorsementFacts(a.endorsements)
	facts.GPUs = gpuFacts(gpuDoor{a.gpus}.List())
	c.LibvirtVersion, c.QemuVersion = facts.Libvirt, facts.QEMU
	capability.Fill(c, lookAtMachine(), capability.Judge(facts))
	return c
}

// watchCapability tells the control plane when the host is no longer what it
// was, also when it changed while the agent was down.
func (a *agent) watchCapability(ctx context.Context) error {
	first, cancel := context.WithTimeout(ctx, libvirtPatience)
	defer cancel()
	if err := a.driver.WaitConnected(first); err != nil {
		a.log.Debug("libvirt's version is told later", "err", err)
	}
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		gpus := a.gpus.Changed()
		changed, err := capability.Tell(a.records, a.cfg.HostID, a.clock.Wall(), a.lookAtHost(ctx))
		switch {
		case err != nil:
			a.log.Error("telling what changed about the host; it is tried again", "err", err)
		case len(changed) > 0:
			a.log.Info("the host's capability changed", "changed", changed)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			continue
		case <-gpus:
		}
		select { // one look for a board's worth of changes
		case <-ctx.Done():
			return nil
		case <-time.After(gpuSettle):
		}
	}
}
