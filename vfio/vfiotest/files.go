package vfiotest

import (
	"encoding/binary"
	"errors"
	"maps"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// file is an open VFIO device file.
type file struct {
	kind  string // "container", "iommu", "group", "device"
	group string
	// container
	groups int
	iommu  bool
	// group
	container *file
	// device
	device *Device
	bound  bool // usable: through a group, or bound to an iommufd
}

const regionShift = 40

// Open implements vfio.System.
func (k *Kernel) Open(path string) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	name, err := filepath.Rel(filepath.Join(k.dir, "dev"), path)
	if err != nil {
		return -1, err
	}
	f := &file{}
	switch {
	case name == "iommu":
		if err := k.failing["iommufd"]; err != nil {
			return -1, err
		}
		f.kind = "iommu"
	case name == "vfio/vfio":
		f.kind = "container"
	case strings.HasPrefix(name, "vfio/devices/"):
		f.kind = "device"
		if f.device = k.byVFIOName(filepath.Base(name)); f.device == nil {
			return -1, unix.ENOENT
		}
		f.group = f.device.Group
	default:
		f.kind, f.group = "group", filepath.Base(name)
		if len(k.members(f.group, "vfio-pci")) == 0 {
			return -1, unix.ENOENT
		}
		if k.groups[f.group] > 0 {
			return -1, unix.EBUSY
		}
		k.groups[f.group]++
	}
	k.nextFD++
	k.files[k.nextFD] = f
	return k.nextFD, nil
}

// WithoutIOMMUFD makes the machine one of before iommufd.
func (k *Kernel) WithoutIOMMUFD() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failing["iommufd"] = unix.ENOENT
}

// WithoutInterruptRemapping has the kernel give out no device: it could not
// keep the interrupts of a guest's devices apart from the host's.
func (k *Kernel) WithoutInterruptRemapping() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unsafeInterrupts = true
}

func (k *Kernel) byVFIOName(name string) *Device {
	for _, d := range k.devices {
		if d.vfioName == name {
			return d
		}
	}
	return nil
}

// members returns a group's devices, those on a driver only unless it is "".
func (k *Kernel) members(group, driver string) (members []*Device) {
	for _, d := range k.devices {
		if d.Group == group && (driver == "" || d.driver == driver) {
			members = append(members, d)
		}
	}
	return members
}

// openGroups counts the group files that are open.
func (k *Kernel) openGroups(group string) (n int) {
	for _, f := range k.files {
		if f.kind == "group" && f.group == group {
			n++
		}
	}
	return n
}

func (k *Kernel) viable(group string) bool {
	for _, d := range k.members(group, "") {
		kind := d.Class >> 8
		if d.driver != "" && d.driver != "vfio-pci" && kind != 0x0604 && kind != 0x0600 {
			return false
		}
	}
	return true
}

// Close implements vfio.System. The last close of a device resets it.
func (k *Kernel) Close(fd int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.close(fd)
}

// ProcessDied closes every file, as the kernel does when a process ends.
func (k *Kernel) ProcessDied() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for fd := range maps.Clone(k.files) {
		errs = append(errs, k.close(fd))
	}
	return errors.Join(errs...)
}

func (k *Kernel) close(fd int) error {
	f := k.files[fd]
	if f == nil {
		return unix.EBADF
	}
	delete(k.files, fd)
	switch {
	case f.kind == "group":
		k.groups[f.group]--
	case f.kind == "device" && f.bound:
		k.groups[f.group]--
		f.device.holders--
		close(f.device.released)
		f.device.released = make(chan struct{})
		if f.device.Hardware != nil {
			f.device.Hardware.FLR()
		}
	}
	return nil
}

// Held returns how many device files are open: a test's own leak check.
func (k *Kernel) Held() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.files)
}

// IoctlValue implements vfio.System.
func (k *Kernel) IoctlValue(fd int, request uint, argument uintptr) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.files[fd]
	switch {
	case f == nil:
		return 0, unix.EBADF
	case f.kind == "container" && request == 0x3b64:
		return 0, nil
	case f.kind == "container" && request == 0x3b65:
		if argument == 1 || argument == 3 {
			return 1, nil
		}
		return 0, nil
	case f.kind == "container" && request == 0x3b66:
		if f.groups == 0 || f.iommu {
			return 0, unix.EINVAL
		}
		if k.unsafeInterrupts {
			return 0, unix.EPERM
		}
		f.iommu = true
		return 0, nil
	case f.kind == "device" && f.bound && request == 0x3b6f:
		if f.device.hangs {
			released := f.device.released
			k.mu.Unlock()
			<-released
			k.mu.Lock()
			return 0, unix.EIO
		}
		if takes := f.device.ResetTakes; takes > 0 {
			k.mu.Unlock()
			<-time.After(takes)
			k.mu.Lock()
		}
		f.device.Hardware.FLR()
		return 0, f.device.Hardware.WriteConfig(4, 2, 2)
	}
	return 0, unix.ENOTTY
}

// Release ends what Hang began.
func (k *Kernel) Release() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, d := range k.devices {
		if d.hangs {
			d.hangs = false
			close(d.released)
			d.released = make(chan struct{})
		}
	}
}

// Ioctl implements vfio.System.
func (k *Kernel) Ioctl(fd int, request uint, p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.files[fd]
	if f == nil {
		return 0, unix.EBADF
	}
	word := binary.NativeEndian
	switch {
	case f.kind == "group" && request == 0x3b67:
		flags := uint32(0)
		if k.viable(f.group) {
			flags = 1
		}
		word.PutUint32(p[4:], flags)
		return 0, nil
	case f.kind == "group" && request == 0x3b68:
		container := k.files[int(word.Uint32(p))]
		if container == nil || container.kind != "container" || !k.viable(f.group) {
			return 0, unix.EINVAL
		}
		container.groups++
		f.container = container
		return 0, nil
	case f.kind == "group" && request == 0x3b6a:
		return k.groupDevice(f, strings.TrimRight(string(p), "\x00"))
	case f.kind == "device" && request == 0x3b76:
		iommu := k.files[int(word.Uint32(p[8:]))]
		switch {
		case word.Uint32(p) != 16 || iommu == nil || iommu.kind != "iommu":
			return 0, unix.EINVAL
		case f.device.holders > 0 && k.openGroups(f.group) == 0:
			return 0, unix.EINVAL // one opener through the character device
		case k.groups[f.group] > 0 || !k.viable(f.group):
			return 0, unix.EBUSY
		case k.unsafeInterrupts:
			return 0, unix.EPERM
		}
		k.take(f)
		return 0, nil
	case f.kind == "device" && f.bound && request == 0x3b6b:
		word.PutUint32(p[4:], 1|2)
		word.PutUint32(p[8:], 9)
		word.PutUint32(p[12:], 5)
		return 0, nil
	case f.kind == "device" && f.bound && request == 0x3b6c:
		index := word.Uint32(p[8:])
		size := uint64(4096)
		switch index {
		case 0, 2, 4:
			size = f.device.BAR[index/2]
		case 1, 3, 5, 6:
			size = 0
		}
		word.PutUint64(p[16:], size)
		word.PutUint64(p[24:], uint64(index)<<regionShift)
		return 0, nil
	}
	return 0, unix.ENOTTY
}

func (k *Kernel) groupDevice(f *file, name string) (int, error) {
	if f.container == nil || !f.container.iommu {
		return 0, unix.EINVAL
	}
	for _, d := range k.members(f.group, "vfio-pci") {
		if string(d.Address) == name {
			k.nextFD++
			opened := &file{kind: "device", group: f.group, device: d}
			k.take(opened)
			k.files[k.nextFD] = opened
			return k.nextFD, nil
		}
	}
	return 0, unix.ENODEV
}

// take makes a device file the holder of its device, which resets it.
func (k *Kernel) take(f *file) {
	f.bound = true
	k.groups[f.group]++
	f.device.holders++
	if f.device.Hardware != nil {
		f.device.Hardware.FLR()
	}
}

// Pread implements vfio.System.
func (k *Kernel) Pread(fd int, p []byte, offset int64) (int, error) {
	d, region, at, err := k.window(fd, offset)
	switch {
	case err != nil:
		return 0, err
	case region == 7:
		value, err := d.Hardware.ReadConfig(uint16(at), len(p))
		copy(p, binary.LittleEndian.AppendUint32(nil, value))
		return len(p), err
	case region == 0 && len(p) == 4:
		if command, _ := d.Hardware.ReadConfig(4, 2); command&2 == 0 {
			return 0, unix.EIO
		}
		binary.LittleEndian.PutUint32(p, d.Hardware.ReadBAR0(uint32(at)))
		return 4, nil
	}
	return 0, unix.EINVAL
}

// Pwrite implements vfio.System.
func (k *Kernel) Pwrite(fd int, p []byte, offset int64) (int, error) {
	d, region, at, err := k.window(fd, offset)
	switch {
	case err != nil:
		return 0, err
	case region == 7:
		var value [4]byte
		copy(value[:], p)
		return len(p), d.Hardware.WriteConfig(uint16(at), len(p), binary.LittleEndian.Uint32(value[:]))
	case region == 0 && len(p) == 4:
		if command, _ := d.Hardware.ReadConfig(4, 2); command&2 == 0 {
			return 0, unix.EIO
		}
		d.Hardware.WriteBAR0(uint32(at), binary.LittleEndian.Uint32(p))
		return 4, nil
	}
	return 0, unix.EINVAL
}

func (k *Kernel) window(fd int, offset int64) (*Device, int64, int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.files[fd]
	if f == nil || f.kind != "device" || !f.bound {
		return nil, 0, 0, unix.EBADF
	}
	return f.device, offset >> regionShift, offset & (1<<regionShift - 1), nil
}
