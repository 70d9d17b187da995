package lifecycle

import (
	"context"
	"errors"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

// settleGPUs tells which guests of an earlier run still have their devices.
// Domains that no record accounts for keep theirs.
func (m *Manager) settleGPUs(accounted map[string]bool, strangers []vm.Observed) error {
	if m.d.GPUs == nil {
		return nil
	}
	keep := map[string]bool{}
	for id := range accounted {
		keep[id] = true
	}
	for _, o := range strangers {
		keep[o.GuestID] = true
	}
	return m.d.GPUs.Settle(func(id string) bool { return keep[id] })
}

// wantsGPUs says whether the guest's manifest asks for any.
func (g *guest) wantsGPUs() bool {
	_, manifest, err := g.command()
	return err == nil && manifest.GPU != nil
}

// reserveGPUs confirms what was reserved when the guest was accepted.
func (g *guest) reserveGPUs(ctx context.Context) error {
	_, manifest, err := g.command()
	if err != nil {
		return err
	}
	if err := g.m.hook("inside:" + stepGPUs); err != nil {
		return err
	}
	return g.m.d.GPUs.Reserve(ctx, g.id, manifest.GPU.Model, manifest.GPU.Count)
}

func (g *guest) returnGPUs(ctx context.Context) error {
	if g.m.d.GPUs == nil {
		return nil
	}
	return g.m.d.GPUs.Return(ctx, g.id)
}

func (g *guest) gpusLeft(context.Context) (bool, error) {
	held, err := g.m.d.GPUs.Held(g.id)
	return len(held) > 0, err
}

// checkGPUs has the modes read back. From here on the devices count as the
// guest's, whatever becomes of its domain.
func (g *guest) checkGPUs(ctx context.Context) error {
	passthrough, err := g.m.d.GPUs.Attach(ctx, g.id, g.record().VCPUs)
	if err != nil {
		return err
	}
	g.passthrough = passthrough
	return g.m.hook("inside:" + stepGPUCheck)
}

// compareDevices looks whether an adopted guest has the devices it was given.
// One that has others is served on and reported: what its silicon measured is
// the tenant's to verify, and ending it is the operator's to decide.
func (g *guest) compareDevices(ctx context.Context) error {
	var want []vm.PCIDevice
	if g.m.d.GPUs != nil {
		var err error
		if want, err = g.m.d.GPUs.Held(g.id); err != nil {
			return err
		}
	}
	err := g.m.d.Hypervisor.CheckDevices(ctx, g.id, want)
	refusal, refused := errors.AsType[*contract.Refusal](err)
	if !refused {
		return err
	}
	g.foreign = refusal.Message + "; " + refusal.Remedy
	return nil
}
