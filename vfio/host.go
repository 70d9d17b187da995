package vfio

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Host is where the kernel shows its devices. The zero value is unusable; see
// System for the running one. It keeps no state and is safe for concurrent use.
type Host struct {
	Sysfs, Dev, Proc string
	Writer           Writer
}

// Function is one PCI function as sysfs shows it.
type Function struct {
	Address         Address  `json:"address"`
	Vendor          uint16   `json:"vendor"`
	Device          uint16   `json:"device"`
	SubsystemVendor uint16   `json:"subsystem_vendor"`
	SubsystemDevice uint16   `json:"subsystem_device"`
	Class           uint32   `json:"class"` // 24 bits: class, subclass, interface
	Revision        uint8    `json:"revision"`
	Driver          string   `json:"driver,omitempty"`          // empty: none bound
	Override        string   `json:"driver_override,omitempty"` // empty: none
	Group           string   `json:"iommu_group,omitempty"`     // empty: no IOMMU translates for it
	NUMANode        int      `json:"numa_node"`                 // -1: unknown
	BARs            []BAR    `json:"bars"`
	Link            Link     `json:"link"`
	ResetMethods    []string `json:"reset_methods"` // in the kernel's order, "flr", "bus"
	PowerState      string   `json:"power_state,omitempty"`
	// Bridge is the port above, empty on a root bus.
	Bridge Address `json:"bridge,omitempty"`
	// VFIODevice is "vfioN", the character device, empty when there is none.
	VFIODevice string `json:"vfio_device,omitempty"`
}

// BAR is a memory or I/O window that has an address.
type BAR struct {
	Index        int    `json:"index"` // of sysfs resourceN and of the VFIO region
	Start        uint64 `json:"start"`
	Size         uint64 `json:"size"` // bytes
	Prefetchable bool   `json:"prefetchable"`
	Wide         bool   `json:"wide"` // 64-bit
	IO           bool   `json:"io"`
}

// Link is the PCI Express link; zero values are unknown. Speeds are as the
// kernel words them, "32.0 GT/s PCIe". An idle device may train down.
type Link struct {
	Speed    string `json:"speed,omitempty"`
	Width    int    `json:"width,omitempty"`
	MaxSpeed string `json:"max_speed,omitempty"`
	MaxWidth int    `json:"max_width,omitempty"`
}

// Class codes that matter here, PCI Code and ID Assignment Specification 1.16.
const (
	ClassHostBridge = 0x0600
	ClassPCIBridge  = 0x0604
	ClassAudio      = 0x0403
	// ClassOtherBridge is NVSwitch's, which is a device to assign and no
	// bridge with anything behind it.
	ClassOtherBridge = 0x0680
)

// Kind is the 16-bit class, without the programming interface.
func (f Function) Kind() uint32 { return f.Class >> 8 }

// transparent tells bridges that the kernel's VFIO ignores in a group.
func (f Function) transparent() bool {
	return f.Kind() == ClassHostBridge || f.Kind() == ClassPCIBridge
}

func (h Host) devices() string { return filepath.Join(h.Sysfs, "bus/pci/devices") }

func (h Host) path(a Address, name string) string { return filepath.Join(h.devices(), string(a), name) }

// Functions lists all PCI functions in the order of their addresses. One that
// cannot be read does not hide the others: it comes back in the error.
func (h Host) Functions() ([]Function, error) {
	entries, err := os.ReadDir(h.devices())
	if err != nil {
		return nil, contract.Refuse("vfio.no-pci", "run on a host with PCI; in a container, mount /sys",
			"PCI devices cannot be listed").Because(err)
	}
	var functions []Function
	var errs []error
	for _, entry := range entries {
		address, err := ParseAddress(entry.Name())
		if err != nil {
			continue // the kernel lists nothing else here
		}
		f, err := h.Function(address)
		if errors.Is(err, fs.ErrNotExist) {
			continue // unplugged while we looked
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		functions = append(functions, f)
	}
	slices.SortFunc(functions, func(a, b Function) int { return cmp.Compare(a.Address, b.Address) })
	return functions, errors.Join(errs...)
}

// Function reads one function. A missing one is vfio.no-device.
func (h Host) Function(a Address) (Function, error) {
	f := Function{Address: a, NUMANode: -1}
	if _, err := os.Stat(h.path(a, "")); err != nil {
		return f, contract.Refuse("vfio.no-device", "list the devices with `lspci -Dnn`; rescan the bus or reseat the device",
			"there is no PCI device at %s", a).Because(err)
	}
	r := reader{host: h, address: a}
	f.Vendor, f.Device = uint16(r.number("vendor", 16)), uint16(r.number("device", 16))
	f.SubsystemVendor, f.SubsystemDevice = uint16(r.number("subsystem_vendor", 16)), uint16(r.number("subsystem_device", 16))
	f.Class = uint32(r.number("class", 24))
	f.Revision = uint8(r.number("revision", 8))
	f.Driver, f.Group = r.link("driver"), r.link("iommu_group")
	if f.Override = r.text("driver_override"); f.Override == "(null)" {
		f.Override = ""
	}
	if node, err := strconv.Atoi(r.text("numa_node")); err == nil {
		f.NUMANode = node
	}
	f.Link = Link{
		Speed: r.text("current_link_speed"), Width: r.count("current_link_width"),
		MaxSpeed: r.text("max_link_speed"), MaxWidth: r.count("max_link_width"),
	}
	f.ResetMethods = strings.Fields(r.text("reset_method"))
	f.PowerState = r.text("power_state")
	f.VFIODevice = r.entry("vfio-dev", "vfio")
	f.Bridge = r.bridge()
	var err error
	if f.BARs, err = parseResource(r.text("resource")); err != nil {
		r.errs = append(r.errs, err)
	}
	if err := errors.Join(r.errs...); err != nil {
		return f, fmt.Errorf("PCI device %s: %w", a, err)
	}
	return f, nil
}

// reader reads attributes of one function and collects what is wrong.
type reader struct {
	host    Host
	address Address
	errs    []error
}

const attributeLimit = 4096 // a page: the kernel's own limit

// text reads an attribute, "" when the kernel does not offer it.
func (r *reader) text(name string) string {
	text, err := readAttribute(r.host.path(r.address, name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.errs = append(r.errs, err)
	}
	return text
}

func readAttribute(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	raw, err := io.ReadAll(io.LimitReader(file, attributeLimit))
	return strings.TrimSpace(string(raw)), errors.Join(err, file.Close())
}

func (r *reader) number(name string, bits int) uint64 {
	text := r.text(name)
	value, err := strconv.ParseUint(strings.TrimPrefix(text, "0x"), 16, bits)
	if err != nil {
		r.errs = append(r.errs, fmt.Errorf("%s is %q: %w", name, text, err))
	}
	return value
}

func (r *reader) count(name string) int {
	value, err := strconv.Atoi(r.text(name))
	if err != nil || value < 0 || value > 64 {
		return 0 // "Unknown" and absent alike
	}
	return value
}

// link returns the last element of a symbolic link's target.
func (r *reader) link(name string) string {
	target, err := os.Readlink(r.host.path(r.address, name))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

// entry returns the first entry of a folder with a prefix.
func (r *reader) entry(dir, prefix string) string {
	entries, _ := os.ReadDir(r.host.path(r.address, dir))
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			return e.Name()
		}
	}
	return ""
}

// bridge finds the port above: the folder that holds the device's own.
func (r *reader) bridge() Address {
	place, err := filepath.EvalSymlinks(r.host.path(r.address, ""))
	if err != nil {
		return ""
	}
	parent, err := ParseAddress(filepath.Base(filepath.Dir(place)))
	if err != nil {
		return ""
	}
	return parent
}

// Flags of a resource line, include/linux/ioport.h.
const (
	resourceIO       = 0x00000100
	resourceMemory   = 0x00000200
	resourcePrefetch = 0x00002000
	resourceWide     = 0x00100000
)

// parseResource reads the sysfs file "resource": a line of start, end and
// flags per BAR, of which the first six are a function's own. Windows without
// an address are left out.
func parseResource(text string) ([]BAR, error) {
	var bars []BAR
	for i, line := range strings.Split(text, "\n") {
		if i >= 6 || text == "" {
			break
		}
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return nil, fmt.Errorf("resource line %d is %q: want start, end and flags", i, line)
		}
		var n [3]uint64
		for j, field := range fields {
			var err error
			if n[j], err = strconv.ParseUint(strings.TrimPrefix(field, "0x"), 16, 64); err != nil {
				return nil, fmt.Errorf("resource line %d: %w", i, err)
			}
		}
		start, end, flags := n[0], n[1], n[2]
		if flags&(resourceIO|resourceMemory) == 0 || start == 0 {
			continue
		}
		if end < start {
			return nil, fmt.Errorf("resource line %d ends before it starts", i)
		}
		bars = append(bars, BAR{
			Index: i, Start: start, Size: end - start + 1,
			Prefetchable: flags&resourcePrefetch != 0, Wide: flags&resourceWide != 0, IO: flags&resourceIO != 0,
		})
	}
	return bars, nil
}
