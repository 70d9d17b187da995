// Package passthrough gives guests the devices of gpu/pool in the form a domain
// wants them: as vm's values, on versions that can attach them. It owns no
// state; a Host is safe for concurrent use.
package passthrough

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/floor"
)

var _ lifecycle.GPUs = Host{}

// Host is the host's GPUs.
type Host struct {
	*pool.Pool
	PCI vfio.Host
	// Versions are what is installed, as it names itself.
	Versions func(context.Context) (floor.Versions, error)
}

// Reserve implements lifecycle.GPUs. It refuses also what the host's software
// could not attach: vm.version-too-old, vm.version-unknown.
func (h Host) Reserve(ctx context.Context, guestID, model string, count int) error {
	if _, err := h.iommufd(ctx); err != nil {
		return err
	}
	return h.Pool.Reserve(guestID, model, count)
}

func (h Host) iommufd(ctx context.Context) (bool, error) {
	versions, err := h.Versions(ctx)
	if err != nil {
		return false, contract.Refuse("vm.version-unknown", "see that libvirtd (or virtqemud) runs on the host, then launch again",
			"the versions that decide how GPUs are attached cannot be asked for").Because(err)
	}
	return floor.Attach(versions)
}

// Attach implements lifecycle.GPUs.
func (h Host) Attach(ctx context.Context, guestID string, vcpus int) (lifecycle.Passthrough, error) {
	iommufd, err := h.iommufd(ctx)
	if err != nil {
		return lifecycle.Passthrough{}, err
	}
	if err := h.Pool.Attach(ctx, guestID); err != nil {
		return lifecycle.Passthrough{}, err
	}
	functions, err := h.functions(guestID)
	if err != nil {
		return lifecycle.Passthrough{}, err
	}
	nodes, err := h.PCI.NodeCPUs()
	if err != nil {
		return lifecycle.Passthrough{}, fmt.Errorf("looking for the CPUs near the GPUs of guest %s: %w", guestID, err)
	}
	devices, err := describe(functions)
	return lifecycle.Passthrough{Devices: devices, IOMMUFD: iommufd, CPUs: near(functions, nodes, vcpus)}, err
}

// near are the CPUs of the nodes that the functions are on. None when that
// would be every CPU or one node is not known, and when they are fewer than
// the guest's own: it would be slower there than far away. Pure.
func near(functions []vfio.Function, nodes map[int][]int, vcpus int) []int {
	if len(nodes) < 2 {
		return nil
	}
	on := map[int][]int{}
	for _, f := range functions {
		if len(nodes[f.NUMANode]) == 0 {
			return nil
		}
		on[f.NUMANode] = nodes[f.NUMANode]
	}
	cpus := slices.Sorted(slices.Values(slices.Concat(slices.Collect(maps.Values(on))...)))
	if len(on) == len(nodes) || len(cpus) < vcpus {
		return nil
	}
	return cpus
}

// Held implements lifecycle.GPUs.
func (h Host) Held(guestID string) ([]vm.PCIDevice, error) {
	functions, err := h.functions(guestID)
	if err != nil {
		return nil, err
	}
	return describe(functions)
}

func (h Host) functions(guestID string) ([]vfio.Function, error) {
	var functions []vfio.Function
	for _, r := range h.Pool.Held(guestID) {
		f, err := h.PCI.Function(r.Address)
		if err != nil {
			return nil, fmt.Errorf("looking at the GPUs of guest %s: %w", guestID, err)
		}
		functions = append(functions, f)
	}
	return functions, nil
}

// describe words functions as vm does.
func describe(functions []vfio.Function) ([]vm.PCIDevice, error) {
	devices := make([]vm.PCIDevice, 0, len(functions))
	for _, f := range functions {
		group, err := strconv.Atoi(f.Group)
		if err != nil {
			return nil, fmt.Errorf("IOMMU group %q of %s: %w", f.Group, f.Address, err)
		}
		d := vm.PCIDevice{Address: string(f.Address), Kind: vm.KindGPU, IOMMUGroup: group}
		if f.Kind() == vfio.ClassOtherBridge {
			d.Kind = vm.KindNVSwitch
		}
		for _, bar := range f.BARs {
			if !bar.IO {
				d.BARs = append(d.BARs, bar.Size)
			}
		}
		devices = append(devices, d)
	}
	return devices, nil
}
