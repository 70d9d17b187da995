package psp

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// Ioctler is the system call behind every command. arg is the address of a
// buffer that stays where it is during the call, or a plain number.
type Ioctler interface {
	Ioctl(file *os.File, request uint, arg uintptr) (int, error)
}

// Linux is the kernel this process runs on.
type Linux struct{}

// Ioctl calls ioctl(2).
func (Linux) Ioctl(file *os.File, request uint, arg uintptr) (int, error) {
	result, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), uintptr(request), arg)
	if errno != 0 {
		return 0, errno
	}
	return int(result), nil
}

// Device asks the security processor; it changes nothing.
type Device struct {
	file   *os.File
	kernel Ioctler
}

// Open opens the device below root.
func Open(root string, kernel Ioctler) (*Device, error) {
	name := filepath.Join(root, DevicePath)
	file, err := os.OpenFile(name, os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, contract.Refuse("psp.no-device", "run `modprobe ccp`; if the device stays away, enable SEV in the BIOS and look for \"ccp\" in the kernel log",
			"there is no %s", name).Because(err)
	case errors.Is(err, os.ErrPermission):
		return nil, contract.Refuse("psp.no-permission", "run this as root, and allow the device in the service's or AppArmor's rules",
			"%s may not be opened", name).Because(err)
	case err != nil:
		return nil, fmt.Errorf("opening the SEV device: %w", err)
	}
	return &Device{file: file, kernel: kernel}, nil
}

// Close closes the device.
func (d *Device) Close() error { return d.file.Close() }

// PlatformStatus asks for the SEV side of the firmware. It works in every
// state.
func (d *Device) PlatformStatus() (PlatformStatus, error) {
	data := make([]byte, PlatformStatusSize)
	if err := d.issue(PlatformStatusCommand, data); err != nil {
		return PlatformStatus{}, err
	}
	return DecodePlatformStatus(data)
}

// SNPPlatformStatus asks for the SNP side. Kernels up to 6.13 refuse while
// SNP is not initialised; 6.14 to 6.18 initialise it for the answer and shut
// it down again, so do not ask where SNP is known to be off.
func (d *Device) SNPPlatformStatus() (SNPStatus, error) {
	data := make([]byte, SNPStatusSize)
	if err := d.issue(SNPPlatformStatusCommand, data); err != nil {
		return SNPStatus{}, err
	}
	return DecodeSNPStatus(data)
}

// maxSockets bounds what GET_ID2 may ask room for. EPYC boards have two.
const maxSockets = 8

// ChipIDs returns the chip id of each socket, as it stands in reports. It
// needs no guest. Turin's ids are eight bytes, followed by zeros.
func (d *Device) ChipIDs() ([][ChipIDSize]byte, error) {
	// Asked with no room, the firmware refuses with the length it needs.
	request := GetID2{}.Encode()
	err := d.issue(GetID2Command, request[:])
	refused, ok := errors.AsType[*FirmwareError](err)
	if err != nil && (!ok || refused.Code != InvalidLength) {
		return nil, err
	}
	needed, err := DecodeGetID2(request[:])
	if err != nil {
		return nil, err
	}
	if needed.Length == 0 || needed.Length%ChipIDSize != 0 || needed.Length > maxSockets*ChipIDSize {
		return nil, fmt.Errorf("GET_ID2: the firmware wants %d bytes for the chip ids, no multiple of %d up to %d", needed.Length, ChipIDSize, maxSockets*ChipIDSize)
	}
	room := make([]byte, needed.Length)
	var pins runtime.Pinner
	defer pins.Unpin()
	pins.Pin(&room[0])
	request = GetID2{Address: addressOf(room), Length: needed.Length}.Encode()
	if err := d.issue(GetID2Command, request[:]); err != nil {
		return nil, err
	}
	written, err := DecodeGetID2(request[:])
	if err != nil {
		return nil, err
	}
	if written.Length > needed.Length || written.Length%ChipIDSize != 0 {
		return nil, fmt.Errorf("GET_ID2: the firmware claims to have written %d bytes into %d", written.Length, needed.Length)
	}
	var ids [][ChipIDSize]byte
	for rest := room[:written.Length]; len(rest) > 0; rest = rest[ChipIDSize:] {
		ids = append(ids, [ChipIDSize]byte(rest))
	}
	return ids, nil
}

// addressOf needs b to be pinned by the caller.
func addressOf(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }

// issue runs one command whose structure is data, in and out.
func (d *Device) issue(command Command, data []byte) error {
	var pins runtime.Pinner
	defer pins.Unpin()
	in := Issue{Command: command}
	if len(data) > 0 {
		pins.Pin(&data[0])
		in.Data = addressOf(data)
	}
	buffer := in.Encode()
	pins.Pin(&buffer)
	_, errno := d.kernel.Ioctl(d.file, IssueCommand, uintptr(unsafe.Pointer(&buffer)))
	out, err := DecodeIssue(buffer[:])
	if err != nil {
		return err
	}
	switch {
	case errno == nil && Code(out.Error) == Success:
		return nil
	case Code(out.Error) != Success:
		return &FirmwareError{Command: command, Code: Code(out.Error), Errno: errno}
	}
	return fmt.Errorf("%s: %w", command, errno)
}
