// Package passthrough gives guests the devices of gpu/pool in the form a domain
// wants them: as vm's values, on versions that can attach them. It owns no
// state; a Host is safe for concurrent use.
package passthrough

import (
	"context"
	"fmt"
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
func (h Host) Attach(ctx context.Context, guestID string) (lifecycle.Passthrough, error) {
	iommufd, err := h.iommufd(ctx)
	if err != nil {
		return lifecycle.Passthrough{}, err
	}
	if err := h.Pool.Attach(ctx, guestID); err != nil {
		return lifecycle.Passthrough{}, err
	}
	devices, err := h.Held(guestID)
	return lifecycle.Passthrough{Devices: devices, IOMMUFD: iommufd}, err
}

// Held implements lifecycle.GPUs.
func (h Host) Held(guestID string) ([]vm.PCIDevice, error) {
	var devices []vm.PCIDevice
	for _, r := range h.Pool.Held(guestID) {
		f, err := h.PCI.Function(r.Address)
		if err != nil {
			return nil, fmt.Errorf("looking at the GPUs of guest %s: %w", guestID, err)
		}
		group, err := strconv.Atoi(f.Group)
		if err != nil {
			return nil, fmt.Errorf("IOMMU group %q of %s: %w", f.Group, f.Address, err)
		}
		d := vm.PCIDevice{Address: string(f.Address), Kind: vm.KindGPU, NUMANode: f.NUMANode, IOMMUGroup: group}
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
	return slices.Clip(devices), nil
}
