package vfio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// System is what Open needs of the kernel; Kernel is the real one.
type System interface {
	Open(path string) (fd int, err error)
	Close(fd int) error
	// Ioctl passes a pointer to argument, which the kernel may change.
	Ioctl(fd int, request uint, argument []byte) (int, error)
	// IoctlValue passes the argument itself.
	IoctlValue(fd int, request uint, argument uintptr) (int, error)
	Pread(fd int, p []byte, offset int64) (int, error)
	Pwrite(fd int, p []byte, offset int64) (int, error)
}

// ioctl numbers of include/uapi/linux/vfio.h: type ';', base 100.
const (
	ioctlAPIVersion     = 0x3b64
	ioctlExtension      = 0x3b65
	ioctlSetIOMMU       = 0x3b66
	ioctlGroupStatus    = 0x3b67
	ioctlGroupContainer = 0x3b68
	ioctlGroupDevice    = 0x3b6a
	ioctlDeviceInfo     = 0x3b6b
	ioctlRegionInfo     = 0x3b6c
	ioctlReset          = 0x3b6f
	ioctlBindIOMMUFD    = 0x3b76

	type1v2      = 3
	groupViable  = 1
	deviceResets = 1
	devicePCI    = 2
	regionBAR0   = 0
	regionConfig = 7
)

// Device is a function that this process alone has open. It is one access
// path to registers and configuration space; while it is open, no guest can
// have the function. Opening and closing each reset the function, so that
// whatever is staged in it becomes active. Not safe for concurrent use.
type Device struct {
	address      Address
	system       System
	fd           int
	others       []int // container, group or IOMMU, closed after fd
	bar0, config region
	resets       bool
	stuck        bool
}

type region struct{ offset, size int64 }

// Open opens a function that is bound to vfio-pci: through its character
// device and iommufd where the kernel has both, else through its group.
// vfio.busy when somebody, a guest for instance, has it.
func (h Host) Open(system System, a Address) (*Device, error) {
	f, err := h.Function(a)
	if err != nil {
		return nil, err
	}
	if f.Driver != driver {
		return nil, contract.Refuse("vfio.not-bound", "bind it first", "%s is on %s, not on %s", a, orNone(f.Driver), driver)
	}
	d := &Device{address: a, system: system, fd: -1}
	path := d.openGroup
	if f.VFIODevice != "" {
		path = d.openCharacterDevice
	}
	if err := path(h.Dev, f); err != nil {
		return nil, errors.Join(d.failed("opening", err), d.Close())
	}
	if err := d.inspect(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Device) failed(what string, err error) error {
	if errors.Is(err, unix.EBUSY) {
		return contract.Refuse("vfio.busy", "stop the guest or the process that has it", "%s: somebody else has it open", d.address).Because(err)
	}
	if errors.Is(err, unix.EPERM) {
		// vfio_iommu_type1_attach_group and iommufd_device_bind say so of a
		// device whose interrupts nobody checks: its guest could forge the host's.
		return contract.Refuse("vfio.interrupts-not-isolated", "switch interrupt remapping on, in the firmware's IOMMU settings and on the kernel's command line; the kernel's log says more",
			"%s: the kernel gives it to no guest, because nothing keeps its interrupts apart", d.address).Because(err)
	}
	if _, typed := errors.AsType[*contract.Refusal](err); typed {
		return err
	}
	return fmt.Errorf("%s %s through VFIO: %w", what, d.address, err)
}

// open opens a file that Close closes.
func (d *Device) open(parts ...string) (int, error) {
	path := filepath.Join(parts...)
	fd, err := d.system.Open(path)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", path, err)
	}
	d.others = append(d.others, fd)
	return fd, nil
}

func (d *Device) openCharacterDevice(dev string, f Function) error {
	iommu, err := d.open(dev, "iommu")
	if errors.Is(err, unix.ENOENT) {
		return d.openGroup(dev, f)
	}
	if err != nil {
		return err
	}
	device, err := d.system.Open(filepath.Join(dev, "vfio/devices", f.VFIODevice))
	if err != nil {
		return err
	}
	d.fd = device
	bind := make([]byte, 16) // argsz, flags, iommufd, out_devid
	binary.NativeEndian.PutUint32(bind, 16)
	binary.NativeEndian.PutUint32(bind[8:], uint32(iommu))
	_, err = d.system.Ioctl(device, ioctlBindIOMMUFD, bind)
	if errors.Is(err, unix.EINVAL) {
		// What is asked for never varies: the kernel says so of a device that is
		// open through its character device (vfio_df_open), and EBUSY of one
		// that is open through its group.
		return fmt.Errorf("%w: %w", unix.EBUSY, err)
	}
	return err
}

func (d *Device) openGroup(dev string, f Function) error {
	container, err := d.open(dev, "vfio/vfio")
	if err != nil {
		return err
	}
	if version, err := d.system.IoctlValue(container, ioctlAPIVersion, 0); err != nil || version != 0 {
		return errors.Join(err, fmt.Errorf("VFIO API version %d, want 0", version))
	}
	if has, err := d.system.IoctlValue(container, ioctlExtension, type1v2); err != nil || has == 0 {
		return errors.Join(err, errors.New("no type 1 IOMMU: load vfio_iommu_type1"))
	}
	group, err := d.open(dev, "vfio", f.Group)
	if err != nil {
		return err
	}
	status := make([]byte, 8) // argsz, flags
	binary.NativeEndian.PutUint32(status, 8)
	if _, err := d.system.Ioctl(group, ioctlGroupStatus, status); err != nil {
		return err
	}
	if binary.NativeEndian.Uint32(status[4:])&groupViable == 0 {
		return contract.Refuse("vfio.group-shared", "bind every device of the group to vfio-pci, or none",
			"%s: a device of its IOMMU group %s is on a host driver", d.address, f.Group)
	}
	pointer := make([]byte, 4)
	binary.NativeEndian.PutUint32(pointer, uint32(container))
	if _, err := d.system.Ioctl(group, ioctlGroupContainer, pointer); err != nil {
		return err
	}
	if _, err := d.system.IoctlValue(container, ioctlSetIOMMU, type1v2); err != nil {
		return err
	}
	device, err := d.system.Ioctl(group, ioctlGroupDevice, append([]byte(d.address), 0))
	if err != nil {
		return err
	}
	d.fd = device
	return nil
}

// inspect learns where registers and configuration space are.
func (d *Device) inspect() error {
	info := make([]byte, 20) // argsz, flags, num_regions, num_irqs, cap_offset
	binary.NativeEndian.PutUint32(info, 20)
	if _, err := d.system.Ioctl(d.fd, ioctlDeviceInfo, info); err != nil {
		return d.failed("looking at", err)
	}
	flags := binary.NativeEndian.Uint32(info[4:])
	if flags&devicePCI == 0 {
		return fmt.Errorf("%s is no PCI device to VFIO (flags %#x)", d.address, flags)
	}
	d.resets = flags&deviceResets != 0
	for index, r := range map[uint32]*region{regionBAR0: &d.bar0, regionConfig: &d.config} {
		info := make([]byte, 32) // argsz, flags, index, cap_offset, size, offset
		binary.NativeEndian.PutUint32(info, 32)
		binary.NativeEndian.PutUint32(info[8:], index)
		if _, err := d.system.Ioctl(d.fd, ioctlRegionInfo, info); err != nil {
			return d.failed("looking at", err)
		}
		r.size = int64(binary.NativeEndian.Uint64(info[16:]))
		r.offset = int64(binary.NativeEndian.Uint64(info[24:]))
	}
	return nil
}

// access reads or writes exactly one value of len(p) bytes.
func (d *Device) access(do func(int, []byte, int64) (int, error), r region, offset int64, p []byte) error {
	switch {
	case d.stuck:
		return contract.Refuse("vfio.stuck", "the host needs a reboot before this device can be used", "%s hangs in its reset", d.address)
	case offset < 0 || offset+int64(len(p)) > r.size || offset%int64(len(p)) != 0:
		return fmt.Errorf("%s: %d bytes at %#x are outside its %#x bytes, or not aligned", d.address, len(p), offset, r.size)
	}
	n, err := do(d.fd, p, r.offset+offset)
	if err == nil && n != len(p) {
		err = unix.EIO
	}
	if err != nil {
		return fmt.Errorf("%s at %#x: %w", d.address, offset, err)
	}
	return nil
}

// Read32 reads a register of BAR0.
func (d *Device) Read32(offset uint32) (uint32, error) {
	p := make([]byte, 4)
	err := d.access(d.system.Pread, d.bar0, int64(offset), p)
	return binary.LittleEndian.Uint32(p), err
}

// Write32 writes a register of BAR0.
func (d *Device) Write32(offset, value uint32) error {
	return d.access(d.system.Pwrite, d.bar0, int64(offset), binary.LittleEndian.AppendUint32(nil, value))
}

// ReadConfig reads 1, 2 or 4 bytes of configuration space.
func (d *Device) ReadConfig(offset uint16, size int) (uint32, error) {
	p := make([]byte, 4)
	if err := width(size); err != nil {
		return 0, err
	}
	err := d.access(d.system.Pread, d.config, int64(offset), p[:size])
	return binary.LittleEndian.Uint32(p), err
}

// WriteConfig writes 1, 2 or 4 bytes of configuration space.
func (d *Device) WriteConfig(offset uint16, size int, value uint32) error {
	if err := width(size); err != nil {
		return err
	}
	return d.access(d.system.Pwrite, d.config, int64(offset), binary.LittleEndian.AppendUint32(nil, value)[:size])
}

func width(size int) error {
	if size != 1 && size != 2 && size != 4 {
		return fmt.Errorf("an access of %d bytes to configuration space: want 1, 2 or 4", size)
	}
	return nil
}

// Reset resets the function. When the kernel does not come back before ctx
// ends, the device is stuck: it refuses everything from then on, also Close
// leaves it open, and only a reboot helps.
func (d *Device) Reset(ctx context.Context) error {
	if !d.resets {
		return contract.Refuse("vfio.no-reset", "power the host off and on instead", "%s cannot be reset by itself", d.address)
	}
	if d.stuck {
		return contract.Refuse("vfio.stuck", "the host needs a reboot before this device can be used", "%s hangs in its reset", d.address)
	}
	done := make(chan error, 1)
	go func() {
		_, err := d.system.IoctlValue(d.fd, ioctlReset, 0)
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			return d.failed("resetting", err)
		}
		return nil
	case <-ctx.Done():
		d.stuck = true
		return context.Cause(ctx)
	}
}

// Close gives the function up.
func (d *Device) Close() error {
	if d.stuck {
		return nil // close(2) would hang with the reset
	}
	var errs []error
	if d.fd >= 0 {
		errs = append(errs, d.system.Close(d.fd))
	}
	for _, fd := range slices.Backward(d.others) {
		errs = append(errs, d.system.Close(fd))
	}
	d.fd, d.others = -1, nil
	return errors.Join(errs...)
}
