// Package vfiotest plays the kernel's part for package vfio: a sysfs tree in a
// folder whose control files obey the kernel's rules and errnos, and the VFIO
// device files with their ioctls. It keeps the rules that matter: overrides
// before matching, one driver per device, one opener per group, groups that
// are viable or not, functions reset at open and close, unbinding that waits
// for who holds the device.
//
// Reading goes through real files; writing and ioctls come through the seams
// of package vfio. A Kernel is safe for concurrent use.
package vfiotest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vfio"
)

// Hardware is the device behind a function: registers, configuration space and
// reset. gputest.Emulator is one.
type Hardware interface {
	ReadBAR0(offset uint32) uint32
	WriteBAR0(offset, value uint32)
	ReadConfig(offset uint16, size int) (uint32, error)
	WriteConfig(offset uint16, size int, value uint32) error
	FLR()
	SBR()
}

// Device is one function to add to the tree.
type Device struct {
	Address                    vfio.Address
	Vendor, Device             uint16
	SubVendor, SubDevice       uint16
	Class                      uint32
	Group                      string
	Driver                     string // that has it at boot
	Bridge                     vfio.Address
	NUMANode                   int
	BAR                        [3]uint64 // sizes of regions 0, 2, 4, 64-bit
	ResetMethods               []string
	ResetTakes                 time.Duration // of a reset through VFIO
	Hardware                   Hardware
	hangs                      bool
	override, driver, vfioName string
	holders                    int
	released                   chan struct{}
}

// Kernel is the machine.
type Kernel struct {
	dir string

	mu      sync.Mutex
	devices map[vfio.Address]*Device
	drivers map[string]func(*Device) bool
	files   map[int]*file
	nextFD  int
	nextDev int
	groups  map[string]int // open group or device files by group
	failing map[string]error
	// unsafeInterrupts: the IOMMU remaps no interrupts.
	unsafeInterrupts bool
}

// New builds a machine without devices below dir. It knows the drivers
// pcieport, vfio-pci, nvidia, nouveau and snd_hda_intel.
func New(dir string) (*Kernel, error) {
	k := &Kernel{
		dir: dir, devices: map[vfio.Address]*Device{}, files: map[int]*file{}, nextFD: 100, groups: map[string]int{}, failing: map[string]error{},
		drivers: map[string]func(*Device) bool{
			"pcieport":      func(d *Device) bool { return d.Class>>8 == 0x0604 },
			"vfio-pci":      func(d *Device) bool { return d.override == "vfio-pci" },
			"nvidia":        func(d *Device) bool { return d.Vendor == 0x10de && d.Class>>16 == 3 },
			"nouveau":       func(d *Device) bool { return d.Vendor == 0x10de && d.Class>>16 == 3 },
			"snd_hda_intel": func(d *Device) bool { return d.Class>>8 == 0x0403 },
		},
	}
	for _, path := range []string{"sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/kernel/iommu_groups", "dev/vfio/devices", "proc"} {
		if err := os.MkdirAll(filepath.Join(dir, path), 0o755); err != nil {
			return nil, err
		}
	}
	for name := range k.drivers {
		if err := os.Mkdir(filepath.Join(dir, "sys/bus/pci/drivers", name), 0o755); err != nil {
			return nil, err
		}
	}
	return k, errFirst(k.put("dev/vfio/vfio", ""), k.put("dev/iommu", ""))
}

func errFirst(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Host returns the roots and the writer of this machine.
func (k *Kernel) Host() vfio.Host {
	return vfio.Host{
		Sysfs: filepath.Join(k.dir, "sys"), Dev: filepath.Join(k.dir, "dev"), Proc: filepath.Join(k.dir, "proc"), Writer: k,
	}
}

// Unload removes a driver.
func (k *Kernel) Unload(driver string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.drivers, driver)
	return os.RemoveAll(filepath.Join(k.dir, "sys/bus/pci/drivers", driver))
}

// Fail lets every write to a control file with this name end in err, nil for
// the kernel's own answer.
func (k *Kernel) Fail(name string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failing[name] = err
}

// Hang lets the device's resets and unbinding never end, until Release.
func (k *Kernel) Hang(a vfio.Address) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.devices[a].hangs = true
}

// Add plugs a function in.
func (k *Kernel) Add(d Device) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	d.driver = d.Driver
	d.released = make(chan struct{})
	k.devices[d.Address] = &d
	place := filepath.Join("sys/devices/pci0000:00", string(d.Bridge), string(d.Address))
	if d.Bridge == "" {
		place = filepath.Join("sys/devices/pci0000:00", string(d.Address))
	}
	if err := os.MkdirAll(filepath.Join(k.dir, place, "power"), 0o755); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join(k.dir, place), filepath.Join(k.dir, "sys/bus/pci/devices", string(d.Address))); err != nil {
		return err
	}
	var resource strings.Builder
	start := uint64(0x10000000000)
	for i := range 6 {
		size := uint64(0)
		if i%2 == 0 {
			size = d.BAR[i/2]
		}
		if size == 0 {
			resource.WriteString("0x0000000000000000 0x0000000000000000 0x0000000000000000\n")
			continue
		}
		fmt.Fprintf(&resource, "%#016x %#016x %#016x\n", start, start+size-1, 0x14220c)
		start += size
	}
	attributes := map[string]string{
		"vendor": fmt.Sprintf("0x%04x", d.Vendor), "device": fmt.Sprintf("0x%04x", d.Device),
		"subsystem_vendor": fmt.Sprintf("0x%04x", d.SubVendor), "subsystem_device": fmt.Sprintf("0x%04x", d.SubDevice),
		"class": fmt.Sprintf("0x%06x", d.Class), "revision": "0xa1", "numa_node": fmt.Sprint(d.NUMANode),
		"resource": resource.String(), "reset_method": strings.Join(d.ResetMethods, " "), "power_state": "D0",
		"power/control": "on", "d3cold_allowed": "1", "driver_override": "(null)", "unbind": "", "reset": "",
		"current_link_speed": "32.0 GT/s PCIe", "current_link_width": "16", "max_link_speed": "32.0 GT/s PCIe", "max_link_width": "16",
	}
	for name, value := range attributes {
		if err := k.put(filepath.Join(place, name), value+"\n"); err != nil {
			return err
		}
	}
	if d.Group != "" {
		group := filepath.Join(k.dir, "sys/kernel/iommu_groups", d.Group)
		if err := errFirst(os.MkdirAll(group, 0o755), os.Symlink(group, filepath.Join(k.dir, place, "iommu_group"))); err != nil {
			return err
		}
	}
	return k.attach(&d, d.Driver)
}

// Remove unplugs a function.
func (k *Kernel) Remove(a vfio.Address) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.devices, a)
	link := filepath.Join(k.dir, "sys/bus/pci/devices", string(a))
	place, err := os.Readlink(link)
	return errFirst(err, os.RemoveAll(place), os.Remove(link))
}

// AddNode has a NUMA node with the CPUs of a list, "0-3,8".
func (k *Kernel) AddNode(node int, cpus string) error {
	dir := fmt.Sprintf("sys/devices/system/node/node%d", node)
	return errFirst(os.MkdirAll(filepath.Join(k.dir, dir), 0o755), k.put(dir+"/cpulist", cpus))
}

func (k *Kernel) put(path, text string) error {
	return os.WriteFile(filepath.Join(k.dir, path), []byte(text), 0o644)
}

func (k *Kernel) devicePath(d *Device, name string) string {
	return filepath.Join("sys/bus/pci/devices", string(d.Address), name)
}

// attach makes the links of a driver, or none.
func (k *Kernel) attach(d *Device, driver string) error {
	link := filepath.Join(k.dir, k.devicePath(d, "driver"))
	_ = os.Remove(link)
	if d.vfioName != "" {
		_ = os.RemoveAll(filepath.Join(k.dir, k.devicePath(d, "vfio-dev")))
		_ = os.Remove(filepath.Join(k.dir, "dev/vfio/devices", d.vfioName))
		_ = os.Remove(filepath.Join(k.dir, "dev/vfio", d.Group))
		d.vfioName = ""
	}
	d.driver = driver
	if driver == "" {
		return nil
	}
	if err := os.Symlink(filepath.Join(k.dir, "sys/bus/pci/drivers", driver), link); err != nil || driver != "vfio-pci" {
		return err
	}
	d.vfioName = fmt.Sprintf("vfio%d", k.nextDev)
	k.nextDev++
	return errFirst(
		os.MkdirAll(filepath.Join(k.dir, k.devicePath(d, "vfio-dev"), d.vfioName), 0o755),
		k.put(filepath.Join("dev/vfio/devices", d.vfioName), ""),
		k.put(filepath.Join("dev/vfio", d.Group), ""),
	)
}

// Write implements vfio.Writer by the kernel's rules.
func (k *Kernel) Write(ctx context.Context, path, value string) error {
	relative, err := filepath.Rel(filepath.Join(k.dir, "sys/bus/pci"), path)
	if err != nil {
		return err
	}
	err = k.write(ctx, strings.Split(relative, "/"), strings.TrimSpace(value))
	if err != nil {
		return fmt.Errorf("writing %q to %s: %w", strings.TrimSpace(value), path, err)
	}
	return nil
}

func (k *Kernel) write(ctx context.Context, path []string, value string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	name := path[len(path)-1]
	if err := k.failing[name]; err != nil {
		return err
	}
	if path[0] == "drivers_probe" {
		return k.probe(vfio.Address(value))
	}
	if path[0] == "drivers" && name == "bind" {
		return k.bind(path[1], vfio.Address(value))
	}
	d := k.devices[vfio.Address(path[1])]
	if path[0] != "devices" || d == nil {
		return unix.ENOENT
	}
	switch strings.Join(path[2:], "/") {
	case "driver_override":
		if d.override = value; value == "" {
			value = "(null)"
		}
		return k.put(k.devicePath(d, "driver_override"), value+"\n")
	case "driver/unbind":
		if value != string(d.Address) || d.driver == "" {
			return unix.ENODEV
		}
		if err := k.waitFree(ctx, d); err != nil {
			return err
		}
		return k.attach(d, "")
	case "power/control":
		if value != "on" && value != "auto" {
			return unix.EINVAL
		}
		return k.put(k.devicePath(d, "power/control"), value+"\n")
	case "d3cold_allowed":
		return k.put(k.devicePath(d, "d3cold_allowed"), value+"\n")
	case "reset_method":
		for m := range strings.FieldsSeq(value) {
			if !slices.Contains(d.ResetMethods, m) {
				return unix.EINVAL
			}
		}
		return k.put(k.devicePath(d, "reset_method"), value+"\n")
	case "reset":
		return k.reset(ctx, d)
	}
	return unix.ENOENT
}

func (k *Kernel) reset(ctx context.Context, d *Device) error {
	methods, err := os.ReadFile(filepath.Join(k.dir, k.devicePath(d, "reset_method")))
	if err != nil || len(strings.Fields(string(methods))) == 0 {
		return unix.ENOTTY
	}
	if d.hangs {
		return k.hang(ctx)
	}
	if d.Hardware == nil {
		return nil
	}
	command, _ := d.Hardware.ReadConfig(4, 2)
	if strings.Fields(string(methods))[0] == "bus" {
		d.Hardware.SBR()
	} else {
		d.Hardware.FLR()
	}
	return d.Hardware.WriteConfig(4, 2, command)
}

// hang waits for the caller's patience to end, as a write in D state does.
func (k *Kernel) hang(ctx context.Context) error {
	k.mu.Unlock()
	defer k.mu.Lock()
	<-ctx.Done()
	return contract.Refuse("vfio.stuck", "reboot the host", "the write did not end").Because(context.Cause(ctx))
}

// waitFree waits until nobody holds the device: the kernel does, for ever.
func (k *Kernel) waitFree(ctx context.Context, d *Device) error {
	for d.holders > 0 || d.hangs {
		released := d.released
		k.mu.Unlock()
		select {
		case <-released:
		case <-ctx.Done():
		}
		k.mu.Lock()
		if ctx.Err() != nil {
			return contract.Refuse("vfio.stuck", "reboot the host", "the write did not end").Because(context.Cause(ctx))
		}
	}
	return nil
}

func (k *Kernel) probe(a vfio.Address) error {
	d := k.devices[a]
	if d == nil {
		return unix.ENODEV
	}
	if d.driver != "" {
		return nil
	}
	for name, matches := range k.drivers {
		if (d.override == "" || d.override == name) && (matches(d) || d.override == name) {
			return k.attach(d, name)
		}
	}
	return nil
}

func (k *Kernel) bind(driver string, a vfio.Address) error {
	d, matches := k.devices[a], k.drivers[driver]
	switch {
	case matches == nil:
		return unix.ENOENT
	case d == nil, d.override != "" && d.override != driver, d.override == "" && !matches(d):
		return unix.ENODEV
	case d.driver != "":
		return unix.EBUSY
	}
	return k.attach(d, driver)
}

// Driver returns who drives the function.
func (k *Kernel) Driver(a vfio.Address) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.devices[a].driver
}

// Process lets a process appear that has files open, by their paths below the
// machine's folder, for instance "dev/nvidia0".
func (k *Kernel) Process(pid int, command string, files ...string) error {
	dir := filepath.Join("proc", fmt.Sprint(pid))
	if err := errFirst(os.MkdirAll(filepath.Join(k.dir, dir, "fd"), 0o755), k.put(filepath.Join(dir, "comm"), command+"\n")); err != nil {
		return err
	}
	for i, path := range files {
		if err := os.Symlink(filepath.Join(k.dir, path), filepath.Join(k.dir, dir, "fd", fmt.Sprint(3+i))); err != nil {
			return err
		}
	}
	return nil
}

// Exit lets a process end.
func (k *Kernel) Exit(pid int) error {
	return os.RemoveAll(filepath.Join(k.dir, "proc", fmt.Sprint(pid)))
}
