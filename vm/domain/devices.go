package domain

import (
	"encoding/xml"
	"fmt"
	"math/bits"
	"regexp"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

// windowItem is the fw_cfg item OVMF reads the size of its 64-bit MMIO window
// from, in MiB (edk2 PlatformInitLib/MemDetect.c). libvirt reserves opt/ovmf
// in <sysinfo>, which leaves QEMU's own arguments. fw_cfg is not measured.
const windowItem = "opt/ovmf/X-PciMmio64Mb"

const (
	// maxWindowMiB is the most OVMF takes: 16 TiB.
	maxWindowMiB = 0x1000000
	// maxPCIDevices is an HGX Hopper board under Protected PCIe: eight GPUs
	// and four switches.
	maxPCIDevices = 12
	// firstPortSlot is where root ports of devices sit on the guest's root
	// bus, eight to a slot, so that a device keeps its address when disks
	// are added.
	firstPortSlot = 0x10
)

// windowMiB is the 64-bit MMIO window for devices behind a root port each.
//
// OVMF aligns the window of a port to the largest BAR behind it, which spaces
// ports two BARs apart: n need a little more than 2n-1 of them. The window is
// a power of two.
func windowMiB(devices []vm.PCIDevice) (uint64, error) {
	if len(devices) == 0 {
		return 0, nil
	}
	var largest uint64
	for _, d := range devices {
		if mib := d.LargestBAR >> 20; mib == 0 || mib > maxWindowMiB || bits.OnesCount64(d.LargestBAR) != 1 {
			return 0, refuse("the largest BAR of %s has %d bytes, which is no power of two from 1 MiB to 16 TiB", d.Address, d.LargestBAR)
		}
		largest = max(largest, d.LargestBAR>>20)
	}
	need := (2*uint64(len(devices)) - 1) * largest
	window := uint64(1) << bits.Len64(need)
	if window > maxWindowMiB {
		return 0, refuse("%d devices with BARs of %d MiB need an MMIO window of %d MiB, firmware takes at most %d", len(devices), largest, window, maxWindowMiB)
	}
	return window, nil
}

// devices passes host functions through, each behind a root port of its own:
// the largest NVIDIA boards do not work on the root bus. libvirt neither binds
// nor gives back; whoever owns the devices has done so and resets them.
func devices(s vm.Spec, d *libvirtxml.Domain) error {
	window, err := windowMiB(s.Devices)
	if err != nil || window == 0 {
		return err
	}
	d.Devices.Controllers = append(d.Devices.Controllers, libvirtxml.DomainController{Type: "pci", Index: new(uint(0)), Model: "pcie-root"})
	for i, device := range s.Devices {
		d.Devices.Controllers = append(d.Devices.Controllers, rootPort(uint(i), len(s.Devices)))
		source, err := pciAddress(device.Address)
		if err != nil {
			return err
		}
		bus := uint(i + 1)
		d.Devices.Hostdevs = append(d.Devices.Hostdevs, libvirtxml.DomainHostdev{
			Managed: "no",
			SubsysPCI: &libvirtxml.DomainHostdevSubsysPCI{
				Driver: &libvirtxml.DomainHostdevSubsysPCIDriver{Name: "vfio"},
				Source: &libvirtxml.DomainHostdevSubsysPCISource{Address: source},
			},
			ROM:     &libvirtxml.DomainROM{Bar: "off"},
			Address: &libvirtxml.DomainAddress{PCI: &libvirtxml.DomainAddressPCI{Domain: new(uint(0)), Bus: &bus, Slot: new(uint(0)), Function: new(uint(0))}},
		})
	}
	// A model's own 40 address bits leave a window of 128 GiB, less than one
	// GPU needs.
	d.CPU.MaxPhysAddr = &libvirtxml.DomainCPUMaxPhysAddr{Mode: "passthrough"}
	argument(d, "-fw_cfg", "name="+windowItem+",string="+strconv.FormatUint(window, 10))
	return nil
}

// rootPort is the i-th of count root ports; eight share a slot.
func rootPort(i uint, count int) libvirtxml.DomainController {
	index, slot, function := i+1, firstPortSlot+i/8, i%8
	address := &libvirtxml.DomainAddressPCI{Domain: new(uint(0)), Bus: new(uint(0)), Slot: &slot, Function: &function}
	if function == 0 && int(i)+1 < count {
		address.MultiFunction = "on"
	}
	return libvirtxml.DomainController{
		Type: "pci", Index: &index, Model: "pcie-root-port",
		// Nothing may be plugged into a confidential guest.
		PCI:     &libvirtxml.DomainControllerPCI{Target: &libvirtxml.DomainControllerPCITarget{Chassis: &index, Port: &index, Hotplug: "off"}},
		Address: &libvirtxml.DomainAddress{PCI: address},
	}
}

func pciAddress(text string) (*libvirtxml.DomainAddressPCI, error) {
	match := regexp.MustCompile(`^([0-9a-f]{4}):([0-9a-f]{2}):([01][0-9a-f])\.([0-7])$`).FindStringSubmatch(text)
	if match == nil {
		return nil, refuse("device %q is not a PCI address like 0000:41:00.0", text)
	}
	var n [4]uint
	for i, part := range match[1:] {
		value, err := strconv.ParseUint(part, 16, 16)
		if err != nil {
			return nil, fmt.Errorf("PCI address %s: %w", text, err)
		}
		n[i] = uint(value)
	}
	return &libvirtxml.DomainAddressPCI{Domain: &n[0], Bus: &n[1], Slot: &n[2], Function: &n[3]}, nil
}

func checkPCIDevices(s vm.Spec) error {
	if len(s.Devices) > maxPCIDevices {
		return refuse("%d PCI devices are more than %d", len(s.Devices), maxPCIDevices)
	}
	seen := map[string]bool{}
	for _, d := range s.Devices {
		if _, err := pciAddress(d.Address); err != nil {
			return err
		}
		if seen[d.Address] {
			return refuse("device %s is named twice", d.Address)
		}
		seen[d.Address] = true
		if d.LocalCPUs != "" && !regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`).MatchString(d.LocalCPUs) {
			return refuse("device %s: %q is no list of CPUs like 0-31,64-95", d.Address, d.LocalCPUs)
		}
	}
	if s.IOMMUFD && len(s.Devices) == 0 {
		return refuse("iommufd without a device")
	}
	_, err := windowMiB(s.Devices)
	return err
}

// placement keeps the guest beside its devices when all are on one NUMA node.
// Memory is preferred there and not bound: a full node must not end a guest.
// Huge pages are never asked for, since private memory is converted by the
// page.
func placement(s vm.Spec, d *libvirtxml.Domain) error {
	if len(s.Devices) == 0 {
		return nil
	}
	first := s.Devices[0]
	for _, device := range s.Devices {
		if device.NUMANode < 0 || device.NUMANode != first.NUMANode || device.LocalCPUs != first.LocalCPUs {
			return nil
		}
	}
	d.NUMATune = &libvirtxml.DomainNUMATune{Memory: &libvirtxml.DomainNUMATuneMemory{Mode: "preferred", Nodeset: strconv.Itoa(first.NUMANode)}}
	d.VCPU.CPUSet = first.LocalCPUs
	return nil
}

// iommufd asks libvirt (12.2.0 or later) for iommufd in place of the type 1
// container, whose 65535 mappings a guest that converts memory by the page may
// use up. The element is younger than the XML module this is built with, which
// leaves adding it to the text.
func iommufd(text string) (string, error) {
	element, err := xml.Marshal(struct {
		XMLName xml.Name `xml:"iommufd"`
		Enabled string   `xml:"enabled,attr"`
	}{Enabled: "yes"})
	if err != nil {
		return "", fmt.Errorf("rendering iommufd: %w", err)
	}
	before, after, found := strings.Cut(text, "  <devices>")
	if !found {
		return "", contract.Refuse("internal", "report this", "a domain without devices")
	}
	return before + "  " + string(element) + "\n  <devices>" + after, nil
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
