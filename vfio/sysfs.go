package vfio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// Registers is a function through sysfs, for kernels or moments without VFIO:
// no driver may be bound. Nothing but the caller's care keeps a guest from
// having the function at the same time, and a locked-down kernel refuses it.
// Not safe for concurrent use.
type Registers struct {
	host    Host
	address Address
	config  *os.File
	bar0    []byte
}

// OpenRegisters opens a function that has no driver, or sleeps on vfio-pci,
// and that nobody holds. vfio.locked-down when the kernel keeps even root out.
func (h Host) OpenRegisters(a Address) (*Registers, error) {
	f, err := h.Function(a)
	if err != nil {
		return nil, err
	}
	if f.Driver != "" && f.Driver != driver {
		return nil, contract.Refuse("vfio.driver-bound", "bind it to vfio-pci first", "%s is driven by %s", a, f.Driver)
	}
	if err := h.inUse(f); err != nil {
		return nil, err
	}
	if len(f.BARs) == 0 || f.BARs[0].Index != 0 || f.BARs[0].IO {
		return nil, contract.Refuse("vfio.no-registers", "look at the kernel log: the BIOS or the kernel found no room for its BARs",
			"%s has no BAR0", a)
	}
	r := &Registers{host: h, address: a}
	if r.config, err = os.OpenFile(h.path(a, "config"), os.O_RDWR|unix.O_SYNC, 0); err != nil {
		return nil, lockedDown(a, err)
	}
	file, err := os.OpenFile(h.path(a, "resource0"), os.O_RDWR, 0)
	if err == nil {
		r.bar0, err = unix.Mmap(int(file.Fd()), 0, int(f.BARs[0].Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		return nil, errors.Join(lockedDown(a, err), r.config.Close())
	}
	return r, nil
}

func lockedDown(a Address, err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		return contract.Refuse("vfio.locked-down", "bind the device to vfio-pci: VFIO is allowed under Secure Boot",
			"%s: the kernel keeps its registers from user space", a).Because(err)
	}
	return err
}

// Close ends the access.
func (r *Registers) Close() error {
	return errors.Join(unix.Munmap(r.bar0), r.config.Close())
}

// touch does one 32-bit access. A mapping of a device that has gone raises
// SIGBUS, which becomes an error here and not the agent's end.
func (r *Registers) touch(offset uint32, do func(register *uint32)) (err error) {
	if int64(offset)+4 > int64(len(r.bar0)) || offset%4 != 0 {
		return fmt.Errorf("%s: register %#x is outside BAR0, or not aligned", r.address, offset)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%s: register %#x faults: %v", r.address, offset, fault)
		}
	}()
	do((*uint32)(unsafe.Pointer(&r.bar0[offset])))
	return nil
}

// Read32 reads a register of BAR0.
func (r *Registers) Read32(offset uint32) (value uint32, err error) {
	err = r.touch(offset, func(register *uint32) { value = atomic.LoadUint32(register) })
	return value, err
}

// Write32 writes a register of BAR0.
func (r *Registers) Write32(offset, value uint32) error {
	return r.touch(offset, func(register *uint32) { atomic.StoreUint32(register, value) })
}

// ReadConfig reads 1, 2 or 4 bytes of configuration space.
func (r *Registers) ReadConfig(offset uint16, size int) (uint32, error) {
	p := make([]byte, 4)
	if err := width(size); err != nil {
		return 0, err
	}
	_, err := r.config.ReadAt(p[:size], int64(offset))
	return binary.LittleEndian.Uint32(p), err
}

// WriteConfig writes 1, 2 or 4 bytes of configuration space.
func (r *Registers) WriteConfig(offset uint16, size int, value uint32) error {
	if err := width(size); err != nil {
		return err
	}
	_, err := r.config.WriteAt(binary.LittleEndian.AppendUint32(nil, value)[:size], int64(offset))
	return err
}

// Reset resets the function by the kernel's own choice of method.
func (r *Registers) Reset(ctx context.Context) error {
	return r.host.ResetFunction(ctx, r.address, "")
}
