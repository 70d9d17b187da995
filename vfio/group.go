package vfio

import (
	"fmt"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Groups orders functions by IOMMU group. Functions without one are left out.
func Groups(functions []Function) map[string][]Function {
	groups := map[string][]Function{}
	for _, f := range functions {
		if f.Group != "" {
			groups[f.Group] = append(groups[f.Group], f)
		}
	}
	return groups
}

// Companions returns the functions that must be assigned together with f: its
// audio function, when it has one. It refuses with vfio.no-iommu when nothing
// translates the function's DMA, and with vfio.group-shared when its group
// holds anything else but bridges, since whoever drives that could reach the
// guest's memory. Overriding the kernel's ACS checks is not offered.
func Companions(f Function, all []Function) ([]Function, error) {
	if f.Group == "" {
		return nil, contract.Refuse("vfio.no-iommu",
			"enable the IOMMU in the BIOS, and remove iommu=off from the kernel's command line",
			"%s is in no IOMMU group: a guest could not be kept from the host's memory", f.Address)
	}
	var companions []Function
	var strangers []string
	for _, member := range Groups(all)[f.Group] {
		switch {
		case member.Address == f.Address || member.transparent():
		case member.Address.Slot() == f.Address.Slot() && member.Vendor == f.Vendor && member.Kind() == ClassAudio:
			companions = append(companions, member)
		default:
			strangers = append(strangers, fmt.Sprintf("%s (%04x:%04x)", member.Address, member.Vendor, member.Device))
		}
	}
	if len(strangers) > 0 {
		slices.Sort(strangers)
		return nil, contract.Refuse("vfio.group-shared",
			"enable ACS in the BIOS (often shown only with AER on), or move the device to a slot of its own",
			"%s shares IOMMU group %s with %s", f.Address, f.Group, strings.Join(strangers, ", "))
	}
	return companions, nil
}
