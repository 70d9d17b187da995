package domain

import (
	"math/bits"
	"slices"
	"strconv"

	"libvirt.org/go/libvirtxml"

	"github.com/confidential-node/agent/vm"
)

// windowItem is the fw_cfg item OVMF reads the size of its 64-bit MMIO window
// from, in MiB (edk2 PlatformInitLib/MemDetect.c). libvirt reserves opt/ovmf
// in <sysinfo>, which leaves QEMU's own arguments.
const windowItem = "opt/ovmf/X-PciMmio64Mb"

// maxWindowMiB is the most OVMF takes: 16 TiB.
const maxWindowMiB = 0x1000000

// GPUWindowMiB is the 64-bit MMIO window for GPUs behind a root port each,
// from the size in bytes of each GPU's largest BAR.
//
// OVMF aligns the window of a port to the largest BAR behind it, which spaces
// ports two BARs apart: n need a little more than 2n-1 of them. The window is
// a power of two.
func GPUWindowMiB(bars []uint64) (uint64, error) {
	if len(bars) == 0 {
		return 0, nil
	}
	largest := slices.Max(bars) >> 20
	if slices.ContainsFunc(bars, func(b uint64) bool { return bits.OnesCount64(b) != 1 }) || largest == 0 || largest > maxWindowMiB {
		return 0, refuse("GPU BARs of %d bytes are not powers of two up to 16 TiB", bars)
	}
	need := (2*uint64(len(bars)) - 1) * largest
	window := uint64(1) << bits.Len64(need)
	if window > maxWindowMiB {
		return 0, refuse("%d GPUs with BARs of %d MiB need an MMIO window of %d MiB, firmware takes at most %d", len(bars), largest, window, maxWindowMiB)
	}
	return window, nil
}

func window(s vm.Spec, d *libvirtxml.Domain) error {
	if s.MMIO64MiB != 0 {
		argument(d, "-fw_cfg", "name="+windowItem+",string="+strconv.FormatUint(s.MMIO64MiB, 10))
	}
	return nil
}

// argument adds an option that libvirt has no word for.
func argument(d *libvirtxml.Domain, words ...string) {
	if d.QEMUCommandline == nil {
		d.QEMUCommandline = &libvirtxml.DomainQEMUCommandline{}
	}
	for _, w := range words {
		d.QEMUCommandline.Args = append(d.QEMUCommandline.Args, libvirtxml.DomainQEMUCommandlineArg{Value: w})
	}
}
