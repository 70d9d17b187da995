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

// gpuBARs is the largest BAR of each GPU.
func gpuBARs(devices []vm.PCIDevice) (bars []uint64) {
	for _, dev := range devices {
		if dev.Kind == vm.KindGPU {
			bars = append(bars, slices.Max(dev.BARs))
		}
	}
	return bars
}

// window sizes the MMIO window. Firmware also needs the host's width of
// physical addresses: the default of 40 bits ends below it.
func window(s vm.Spec, d *libvirtxml.Domain) error {
	mib, err := GPUWindowMiB(gpuBARs(s.Devices))
	if err != nil || mib == 0 {
		return err
	}
	d.CPU.MaxPhysAddr = &libvirtxml.DomainCPUMaxPhysAddr{Mode: "passthrough"}
	argument(d, "-fw_cfg", "name="+windowItem+",string="+strconv.FormatUint(mib, 10))
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
