package main

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/nvidia"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/capability"
	"github.com/confidential-node/agent/nodeagent/failpoint"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/nodeagent/passthrough"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vm/floor"
)

// writeVerb is the hidden verb of the process that writes one of the kernel's
// control files: such a write may hang for ever.
const writeVerb = "write-attribute"

// writeLimit is the most the kernel waits for a device after a reset, and some
// more.
const writeLimit = 90 * time.Second

func newWriteAttributeCommand() *cobra.Command {
	return &cobra.Command{
		Use: writeVerb + " FILE", Short: "Write standard input to a kernel's control file, once", Hidden: true, Args: exactArgs("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			if code := vfio.WriteMain(args[0]); code != 0 {
				return &exitError{code: code}
			}
			return nil
		},
	}
}

// pciHost is the PCI bus of the kernel below root.
func pciHost(root string) vfio.Host {
	return vfio.Host{
		Sysfs: filepath.Join(root, "sys"), Dev: filepath.Join(root, "dev"), Proc: filepath.Join(root, "proc"),
		Writer: vfio.Disposable{Command: []string{filepath.Join(root, "proc/self/exe"), writeVerb}, Limit: writeLimit},
	}
}

// openGPUs reads what the agent has taken over, and what it is to take.
func (a *agent) openGPUs(pci vfio.Host) (err error) {
	a.gpus, err = pool.New(pool.Deps{
		Records: a.store, Host: pci, System: vfio.Kernel{}, Logger: a.log, Hook: failpoint.FromEnvironment().Hit,
		UUIDs: func() map[string]vfio.Address { return uuids(pci, a.log) },
	}, pool.Config{Manage: a.cfg.GPU.Manage, BootID: a.started.BootID})
	return err
}

// passthrough is how guests get the agent's GPUs.
func (a *agent) passthrough() passthrough.Host {
	return passthrough.Host{Pool: a.gpus, PCI: pciHost("/"), Versions: a.versions}
}

// xidWatch is how long `nodeagent capability` watches for the driver's errors.
const xidWatch = 300 * time.Millisecond

// askDriver asks the nvidia driver, where it has a device at all. Its absence
// is the usual state, and what it does not answer is only left out.
func askDriver(functions []vfio.Function, watch time.Duration, log hclog.Logger) nvidia.Report {
	if !slices.ContainsFunc(functions, func(f vfio.Function) bool { return f.Driver == "nvidia" }) {
		return nvidia.Report{}
	}
	report, err := nvidia.Read(nvml.New(), watch)
	if err != nil && !errors.Is(err, nvidia.ErrAbsent) {
		log.Warn("the nvidia driver does not tell all of its GPUs", "err", err)
	}
	return report
}

// uuids are the names of the devices that the nvidia driver has now.
func uuids(host vfio.Host, log hclog.Logger) map[string]vfio.Address {
	functions, err := host.Functions()
	if err != nil {
		log.Debug("not all PCI devices can be read", "err", err)
	}
	names := map[string]vfio.Address{}
	for _, g := range askDriver(functions, 0, log).GPUs {
		names[g.UUID] = g.Address
	}
	return names
}

// versions are those that decide whether and how GPUs are attached.
func (a *agent) versions(ctx context.Context) (floor.Versions, error) {
	libvirt, qemu, err := a.driver.Versions(ctx)
	return floor.Versions{Kernel: a.host.kernel, Libvirt: libvirt, QEMU: qemu}, err
}

// gpuDoor shows the pool to the admin socket.
type gpuDoor struct{ pool *pool.Pool }

func (d gpuDoor) List() admin.GPUList {
	views, problems := d.pool.Snapshot()
	list := admin.GPUList{Header: output.NewHeader("GPUList"), GPUs: []admin.GPU{}, Problems: []admin.GPUProblem{}}
	for _, v := range views {
		list.GPUs = append(list.GPUs, gpuDocument(v))
	}
	for _, p := range problems {
		list.Problems = append(list.Problems, admin.GPUProblem{About: p.About, Reason: *admin.ReasonOf(p.Why)})
	}
	return list
}

func gpuDocument(v pool.View) admin.GPU {
	g := admin.GPU{
		Address: string(v.Address), Model: v.Model.Name, Board: v.Model.Board, State: string(v.State), Since: v.Since, Step: string(v.Step), StepSince: v.StepAt,
		Configured: v.Named, OnDuty: v.Duty, Leaving: v.Leaving, Guest: v.Guest, Mode: v.Mode.String(), PDI: v.PDI, UUID: v.UUID, FSP: v.FSP, Finding: admin.ReasonOf(v.Finding),
	}
	if v.Step == pool.StepNone {
		g.StepSince = time.Time{}
	}
	if len(v.Bindings) > 0 {
		g.OriginalDriver = v.Bindings[0].Driver
	}
	if q := v.Quarantine; q != nil {
		g.Quarantine = &admin.Quarantine{Reason: *admin.ReasonOf(q.Reason), At: q.At, From: string(q.From), Step: string(q.Step), Guest: q.Guest, Evidence: q.Evidence}
	}
	return g
}

func (d gpuDoor) Order(address string, o admin.GPUOrder) error {
	a, err := vfio.ParseAddress(address)
	if err != nil {
		return contract.Refuse("gpu.bad-address", "take the address from `nodeagent gpu list`", "%v", err)
	}
	switch o.Verb {
	case "release":
		return d.pool.Release(a, o.Anyway)
	case "reset":
		return d.pool.Reset(a)
	case "quarantine":
		return d.pool.Quarantine(a, o.Reason)
	}
	return contract.Refuse("gpu.order-malformed", "use the nodeagent of the running agent's version", "there is no order %q", o.Verb)
}

// gpuFacts are the GPUs of a host for its capability.
func gpuFacts(list admin.GPUList) []capability.GPU {
	gpus := []capability.GPU{}
	for _, g := range list.GPUs {
		c := capability.GPU{Address: g.Address, Model: g.Model, Board: g.Board, State: g.State, Mode: g.Mode, Offered: g.Configured && g.State != "unmanaged" && g.Quarantine == nil && !g.Leaving}
		switch {
		case g.Quarantine != nil:
			c.Why = g.Quarantine.Refusal()
		case g.Finding != nil:
			c.Why = g.Finding.Refusal()
		}
		gpus = append(gpus, c)
	}
	for _, p := range list.Problems {
		gpus = append(gpus, capability.GPU{Address: p.About, State: "refused", Mode: "unknown", Why: p.Refusal()})
	}
	return gpus
}

// localGPUs are the GPUs of the running agent, if one answers, and the host's
// others as they are seen from outside.
func localGPUs(ctx context.Context, socket string, host vfio.Host, log hclog.Logger) []capability.GPU {
	ctx, cancel := context.WithTimeout(ctx, libvirtPatience)
	defer cancel()
	functions, err := host.Functions()
	var gpus []capability.GPU
	if list, offline := admin.FetchGPUs(ctx, socket); offline == nil {
		gpus = gpuFacts(list)
	}
	for _, g := range capability.Inventory(functions) {
		if !slices.ContainsFunc(gpus, func(known capability.GPU) bool { return known.Address == g.Address }) {
			gpus = append(gpus, g)
		}
	}
	if err != nil {
		log.Debug("not all PCI devices can be read", "err", err)
	}
	capability.AddDriver(gpus, askDriver(functions, xidWatch, log))
	return gpus
}

// gpuWarnings tells what an operator should look at.
func gpuWarnings(gpus admin.GPUList, warn func(format string, args ...any)) {
	for _, g := range gpus.GPUs {
		if g.Quarantine != nil {
			warn("GPU %s is quarantined: %s: %s; %s", g.Address, g.Quarantine.Code, g.Quarantine.Message, g.Quarantine.Remedy)
		}
		if g.Finding != nil {
			warn("GPU %s: %s: %s; %s", g.Address, g.Finding.Code, g.Finding.Message, g.Finding.Remedy)
		}
	}
	for _, p := range gpus.Problems {
		warn("gpu.manage, %s: %s: %s; %s", p.About, p.Code, p.Message, p.Remedy)
	}
}
