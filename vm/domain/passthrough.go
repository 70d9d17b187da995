package domain

import (
	"encoding/xml"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

// Bounds of what is passed through. An HGX board has eight GPUs and four
// NVSwitches, which only the whole board's guest (PPCIe) gets.
const (
	maxGPUs       = 8
	boardSwitches = 4
	maxCPU        = 8191
	// firstSlot of pcie.0 for root ports, eight functions each: above the
	// slots libvirt gives to what has no address.
	firstSlot = 0x10
	// switchShare: the MMIO window is sized by GPUs, and has room to spare for
	// switches as long as each BAR of theirs is at most this part of a GPU's.
	switchShare = 16
)

// iommufd is the element that libvirt has from 12.2 on and libvirtxml
// v1.11010.0 has no field for: the domain is rendered with one more member.
type iommufd struct {
	libvirtxml.Domain

	IOMMUFD struct {
		Enabled string `xml:"enabled,attr"`
	} `xml:"iommufd"`
}

func marshal(d *libvirtxml.Domain, throughIOMMUFD bool) (string, error) {
	if !throughIOMMUFD {
		return d.Marshal()
	}
	whole := iommufd{Domain: *d}
	whole.IOMMUFD.Enabled = "yes"
	text, err := xml.MarshalIndent(&whole, "", "  ")
	return string(text), err
}

func checkPassthrough(s vm.Spec) error {
	gpus, seen := 0, map[string]bool{}
	for i, dev := range s.Devices {
		if _, err := parseAddress(dev.Address); err != nil {
			return err
		}
		if seen[dev.Address] {
			return refuse("device %s is there twice", dev.Address)
		}
		seen[dev.Address] = true
		switch {
		case dev.Kind != vm.KindGPU && dev.Kind != vm.KindNVSwitch:
			return refuse("device %s is of the unknown kind %q", dev.Address, dev.Kind)
		case len(dev.BARs) == 0:
			return refuse("device %s has no BAR", dev.Address)
		case dev.IOMMUGroup < 0:
			return refuse("device %s is in no IOMMU group", dev.Address)
		case dev.Kind == vm.KindGPU && gpus < i:
			return refuse("GPU %s comes after an NVSwitch", dev.Address)
		}
		if dev.Kind == vm.KindGPU {
			gpus++
		}
	}
	if err := checkCount(s, gpus); err != nil {
		return err
	}
	if _, err := GPUWindowMiB(gpuBARs(s.Devices)); err != nil {
		return err
	}
	return checkCPUs(s.CPUs)
}

func checkCount(s vm.Spec, gpus int) error {
	switches := len(s.Devices) - gpus
	switch {
	case gpus > maxGPUs:
		return refuse("%d GPUs are more than %d", gpus, maxGPUs)
	case switches != 0 && (gpus != maxGPUs || switches != boardSwitches):
		return refuse("%d NVSwitches with %d GPUs are no whole board of %d and %d", switches, gpus, boardSwitches, maxGPUs)
	case s.IOMMUFD && len(s.Devices) == 0:
		return refuse("iommufd without a device")
	case s.TEE.Emulated != nil && len(s.Devices) != 0:
		return refuse("an emulated guest gets no device of the host")
	}
	for _, dev := range s.Devices[gpus:] {
		if slices.Max(dev.BARs) > slices.Min(gpuBARs(s.Devices))/switchShare {
			return refuse("NVSwitch %s has a BAR of %d bytes, which the MMIO window of the GPUs has no room for", dev.Address, slices.Max(dev.BARs))
		}
	}
	return nil
}

func checkCPUs(cpus []int) error {
	for i, cpu := range cpus {
		if cpu < 0 || cpu > maxCPU || slices.Contains(cpus[:i], cpu) {
			return refuse("CPUs %d are not different numbers within 0..%d", cpus, maxCPU)
		}
	}
	return nil
}

// parseAddress reads DDDD:BB:SS.F.
func parseAddress(text string) (*libvirtxml.DomainAddressPCI, error) {
	m := regexp.MustCompile(`^([0-9a-f]{4}):([0-9a-f]{2}):([01][0-9a-f])\.([0-7])$`).FindStringSubmatch(text)
	if m == nil {
		return nil, refuse("PCI address %q is not DDDD:BB:SS.F in lower-case hex", text)
	}
	var n [4]uint
	for i := range n {
		v, err := strconv.ParseUint(m[i+1], 16, 16)
		if err != nil {
			return nil, refuse("PCI address %q: %v", text, err)
		}
		n[i] = uint(v)
	}
	return &libvirtxml.DomainAddressPCI{Domain: &n[0], Bus: &n[1], Slot: &n[2], Function: &n[3]}, nil
}

// devices gives each device a root port of its own, at an address that depends
// on its place in the list alone. They are bound already and go back by the
// agent's hand: managed='no'. Limits of locked memory are libvirt's to raise,
// which it does for every domain with such a device.
func devices(s vm.Spec, d *libvirtxml.Domain) error {
	if len(s.Devices) == 0 {
		return nil
	}
	zero, root := uint(0), uint(0)
	d.Devices.Controllers = append(d.Devices.Controllers, libvirtxml.DomainController{
		Type: "pci", Index: &root, Model: "pcie-root",
	})
	for i, dev := range s.Devices {
		source, err := parseAddress(dev.Address)
		if err != nil {
			return err
		}
		index, slot, function := uint(i+1), uint(firstSlot+i/8), uint(i%8)
		port := slot<<3 | function
		at := &libvirtxml.DomainAddressPCI{Domain: &zero, Bus: &zero, Slot: &slot, Function: &function}
		if function == 0 {
			at.MultiFunction = "on"
		}
		d.Devices.Controllers = append(d.Devices.Controllers, libvirtxml.DomainController{
			Type: "pci", Index: &index, Model: "pcie-root-port",
			PCI: &libvirtxml.DomainControllerPCI{
				Model:  &libvirtxml.DomainControllerPCIModel{Name: "pcie-root-port"},
				Target: &libvirtxml.DomainControllerPCITarget{Chassis: &index, Port: &port, Hotplug: "off"},
			},
			Address: &libvirtxml.DomainAddress{PCI: at},
		})
		d.Devices.Hostdevs = append(d.Devices.Hostdevs, libvirtxml.DomainHostdev{
			Managed: "no",
			SubsysPCI: &libvirtxml.DomainHostdevSubsysPCI{
				Driver: &libvirtxml.DomainHostdevSubsysPCIDriver{Name: "vfio"},
				Source: &libvirtxml.DomainHostdevSubsysPCISource{Address: source},
			},
			ROM:     &libvirtxml.DomainROM{Bar: "off"},
			Address: &libvirtxml.DomainAddress{PCI: &libvirtxml.DomainAddressPCI{Domain: &zero, Bus: &index, Slot: &zero, Function: &zero}},
		})
	}
	return nil
}

// placement keeps vCPUs near the devices. Memory follows them: each page is
// taken from the node of the CPU that needs it first, and from another when
// that node is full. A strict binding would end the guest there instead.
func placement(s vm.Spec, d *libvirtxml.Domain) error {
	d.VCPU.CPUSet = list(s.CPUs)
	return nil
}

func list(ids []int) string {
	words := make([]string, len(ids))
	for i, id := range slices.Sorted(slices.Values(ids)) {
		words[i] = strconv.Itoa(id)
	}
	return strings.Join(words, ",")
}

// CheckDevices compares a domain as libvirt has it with what it was given:
// these devices, in whatever order, and no others.
func CheckDevices(text string, want []vm.PCIDevice) error {
	var d libvirtxml.Domain
	if err := d.Unmarshal(text); err != nil {
		return foreign("its XML cannot be read: %v", err)
	}
	missing := map[string]bool{}
	for _, dev := range want {
		missing[dev.Address] = true
	}
	if d.Devices == nil {
		d.Devices = &libvirtxml.DomainDeviceList{}
	}
	for _, dev := range d.Devices.Hostdevs {
		address := hostAddress(dev)
		if !missing[address] {
			return foreign("it has the device %q, which was not asked for", address)
		}
		if dev.Managed == "yes" {
			return foreign("libvirt would give device %s back to its driver (managed='yes')", address)
		}
		delete(missing, address)
	}
	for address := range missing {
		return foreign("it lacks the device %s", address)
	}
	for _, nic := range d.Devices.Interfaces {
		if nic.Source != nil && nic.Source.Hostdev != nil {
			return foreign("it has an interface that is a device of the host")
		}
	}
	if d.QEMUCommandline != nil {
		for _, a := range d.QEMUCommandline.Args {
			if strings.Contains(a.Value, "vfio") {
				return foreign("QEMU's own arguments pass a device through: %q", a.Value)
			}
		}
	}
	return nil
}

func foreign(format string, args ...any) error {
	return contract.Refuse("vm.devices-differ", "see who changed the domain (`virsh dumpxml`); the agent neither ends it nor offers its devices",
		"the domain's devices are not those of the guest: "+format, args...)
}

// hostAddress is "" for what is no PCI function.
func hostAddress(dev libvirtxml.DomainHostdev) string {
	if dev.SubsysPCI == nil || dev.SubsysPCI.Source == nil || dev.SubsysPCI.Source.Address == nil {
		return ""
	}
	a := dev.SubsysPCI.Source.Address
	hex := func(v *uint, digits int) string {
		if v == nil {
			v = new(uint)
		}
		text := strconv.FormatUint(uint64(*v), 16)
		return strings.Repeat("0", max(0, digits-len(text))) + text
	}
	return hex(a.Domain, 4) + ":" + hex(a.Bus, 2) + ":" + hex(a.Slot, 2) + "." + hex(a.Function, 1)
}
