package vfio

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kernel is the running kernel as a System.
type Kernel struct{}

// Open opens a device file for reading and writing.
func (Kernel) Open(path string) (int, error) { return unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0) }

// Close closes a descriptor.
func (Kernel) Close(fd int) error { return unix.Close(fd) }

// Ioctl implements System.
func (Kernel) Ioctl(fd int, request uint, argument []byte) (int, error) {
	result, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&argument[0])))
	runtime.KeepAlive(argument)
	if errno != 0 {
		return 0, errno
	}
	return int(result), nil
}

// IoctlValue implements System.
func (Kernel) IoctlValue(fd int, request uint, argument uintptr) (int, error) {
	result, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), argument)
	if errno != 0 {
		return 0, errno
	}
	return int(result), nil
}

// Pread implements System.
func (Kernel) Pread(fd int, p []byte, offset int64) (int, error) { return unix.Pread(fd, p, offset) }

// Pwrite implements System.
func (Kernel) Pwrite(fd int, p []byte, offset int64) (int, error) { return unix.Pwrite(fd, p, offset) }
