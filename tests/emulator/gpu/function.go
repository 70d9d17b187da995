package gpu

import (
	"encoding/binary"
	"syscall"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/tests/emulator/gpu/vfiouser"
)

// Models are the devices, by the name that a command line uses.
func Models() map[string]gputest.Model {
	return map[string]gputest.Model{
		"h100": gputest.H100(), "b200": gputest.B200(), "rtx-pro-6000": gputest.RTXPRO6000(), "nvswitch": gputest.NVSwitch(),
	}
}

// Function shows an emulator as a PCI function. The memory behind its second
// and third BAR reads as zero and keeps nothing.
type Function struct{ *gputest.Emulator }

const configSize = 4096

// Region implements vfiouser.Device: BARs 0, 2 and 4 are 64 bits wide.
func (f Function) Region(index int) uint64 {
	switch index {
	case 0, 2, 4:
		return f.Model().BAR[index/2]
	case vfiouser.RegionConfig:
		return configSize
	}
	return 0
}

// Read implements vfiouser.Device.
func (f Function) Read(index int, offset uint64, p []byte) error {
	switch index {
	case 0:
		return inRegisters(offset, p, func(at uint32, b []byte) error {
			var word [4]byte
			binary.LittleEndian.PutUint32(word[:], f.ReadBAR0(at&^3))
			copy(b, word[at&3:])
			return nil
		})
	case vfiouser.RegionConfig:
		return inRegisters(offset, p, func(at uint32, b []byte) error {
			if len(b) == 3 {
				return syscall.EINVAL
			}
			value, err := f.ReadConfig(uint16(at), len(b))
			for i := range b {
				b[i] = byte(value >> (8 * i))
			}
			return err
		})
	}
	clear(p)
	return nil
}

// Write implements vfiouser.Device. Registers take whole words only.
func (f Function) Write(index int, offset uint64, p []byte) error {
	switch index {
	case 0:
		return inRegisters(offset, p, func(at uint32, b []byte) error {
			if len(b) != 4 {
				return syscall.EINVAL
			}
			f.WriteBAR0(at, binary.LittleEndian.Uint32(b))
			return nil
		})
	case vfiouser.RegionConfig:
		return inRegisters(offset, p, func(at uint32, b []byte) error {
			if len(b) == 3 {
				return syscall.EINVAL
			}
			var value uint32
			for i := range b {
				value |= uint32(b[i]) << (8 * i)
			}
			return f.WriteConfig(uint16(at), len(b), value)
		})
	}
	return nil
}

// Reset implements vfiouser.Device: to the bus, every reset is one of the
// bridge above. A function's own reset is a write to its configuration space.
func (f Function) Reset() error {
	f.SBR()
	return nil
}

// inRegisters splits an access where words of 32 bits begin.
func inRegisters(offset uint64, p []byte, do func(at uint32, b []byte) error) error {
	for len(p) > 0 {
		n := min(4-int(offset&3), len(p))
		if err := do(uint32(offset), p[:n]); err != nil {
			return err
		}
		offset, p = offset+uint64(n), p[n:]
	}
	return nil
}
