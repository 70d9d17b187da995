package hosttest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

// Registers that the machine has.
const (
	msrSYSCFG  = 0xC0010010
	msrRMPBase = 0xC0010132
	msrRMPEnd  = 0xC0010133
	msrRMPCfg  = 0xC0010136
)

// ReadAt is pread(2) on the CPUID and MSR devices.
func (m *Machine) ReadAt(file *os.File, p []byte, offset int64) (int, error) {
	switch m.device(file) {
	case "dev/cpu/0/cpuid":
		return m.cpuid(p, uint32(offset))
	case "dev/cpu/0/msr":
		return m.msr(p, uint32(offset))
	}
	return file.ReadAt(p, offset)
}

func (m *Machine) device(file *os.File) string { return strings.TrimPrefix(file.Name(), m.Root+"/") }

// cpuid follows arch/x86/kernel/cpuid.c: whole leaves only.
func (m *Machine) cpuid(p []byte, leaf uint32) (int, error) {
	if len(p)%16 != 0 {
		return 0, unix.EINVAL
	}
	s := m.setup
	var r [4]uint32
	switch leaf {
	case 0x80000000:
		r[0] = 0x80000028
	case 0x8000001F:
		if s.VirtualMachine {
			break
		}
		r = [4]uint32{0b1111, 51 | 5<<6 | 4<<12, s.MaxASID, s.MinSEVASID}
		if !s.NoSNP {
			r[0] |= 1<<4 | 1<<5 | 1<<8
		}
		if s.CanSegmentRMP {
			r[0] |= 1 << 23
		}
	case 0x80000025:
		if s.CanSegmentRMP {
			r = [4]uint32{36 | 42<<6, 8, 0, 0}
		}
	}
	for i, v := range r {
		binary.LittleEndian.PutUint32(p[4*i:], v)
	}
	return len(p), nil
}

// msr follows arch/x86/kernel/msr.c: 8 bytes at a time, and EIO for a
// register that the processor does not have.
func (m *Machine) msr(p []byte, number uint32) (int, error) {
	if len(p) != 8 {
		return 0, unix.EINVAL
	}
	s := m.setup
	var v uint64
	switch {
	case number == msrSYSCFG:
		v = 0x740000
		if !s.EncryptionOff {
			v |= 1 << 23
		}
		if m.hostSNP {
			v |= 1<<24 | 1<<25
		}
	case number == msrRMPBase && !s.NoSNP:
		v = m.rmpBase()
	case number == msrRMPEnd && !s.NoSNP:
		v = m.rmpEnd()
	case number == msrRMPCfg && s.CanSegmentRMP:
		if s.RMPSegments > 0 {
			v = 1 | uint64(s.RMPSegmentBits)<<8
		}
	default:
		return 0, unix.EIO
	}
	binary.LittleEndian.PutUint64(p, v)
	return len(p), nil
}

// Ioctl is ioctl(2) on /dev/kvm and /dev/sev.
func (m *Machine) Ioctl(file *os.File, request uint, arg uintptr) (int, error) {
	switch m.device(file) {
	case "dev/kvm":
		return m.kvm(request, arg)
	case "dev/sev":
		return 0, m.sev(file, request, uint64(arg))
	}
	return 0, unix.ENOTTY
}

func (m *Machine) kvm(request uint, capability uintptr) (int, error) {
	const checkExtension, capVMTypes = 0xAE03, 235
	if request != checkExtension {
		return 0, unix.ENOTTY
	}
	if capability != capVMTypes {
		return 0, nil // an extension that is not there
	}
	types := 1
	if m.kvmSEV {
		types |= 1 << 2
	}
	if m.kvmES {
		types |= 1 << 3
	}
	if m.kvmSNP {
		types |= 1 << 4
	}
	return types, nil
}

// user reads and writes memory by address, as copy_from_user and copy_to_user
// do: a wrong address is EFAULT.
func fromUser(address uint64, b []byte) error { return copyUser(unix.ProcessVMReadv, address, b) }
func toUser(address uint64, b []byte) error   { return copyUser(unix.ProcessVMWritev, address, b) }

func copyUser(call func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error), address uint64, b []byte) error {
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	n, err := call(os.Getpid(), local, []unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = unix.EFAULT
	}
	return err
}

// refused is a firmware code on its way to the caller.
type refused psp.Code

func (r refused) Error() string { return "firmware refused" }

// sev follows sev_ioctl of drivers/crypto/ccp/sev-dev.c (6.11 to 6.13: status
// needs SNP to be initialized). Commands that destroy something fail the test.
func (m *Machine) sev(file *os.File, request uint, arg uint64) error {
	if request != psp.IssueCommand {
		return unix.EINVAL
	}
	var raw [psp.IssueSize]byte
	if err := fromUser(arg, raw[:]); err != nil {
		return err
	}
	issue, err := psp.DecodeIssue(raw[:])
	if err != nil {
		return unix.EINVAL
	}
	flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	err = m.command(issue, flags&unix.O_ACCMODE != unix.O_RDONLY)
	if code, ok := errors.AsType[refused](err); ok {
		issue.Error, err = uint32(code), unix.EIO
	}
	raw = issue.Encode()
	return errors.Join(toUser(arg, raw[:]), err)
}

func (m *Machine) command(issue psp.Issue, writable bool) error {
	up := m.firmware.State == psp.Initialized
	switch issue.Command {
	case psp.PlatformStatusCommand:
		answer := psp.PlatformStatus{APIMajor: m.firmware.APIMajor, APIMinor: m.firmware.APIMinor, Build: uint8(m.firmware.Build), State: m.firmware.State, Guests: m.setup.ESGuests}.Encode()
		return toUser(issue.Data, answer[:])
	case psp.GetID2Command:
		return m.getID(issue.Data)
	case psp.SNPPlatformStatusCommand:
		if !up || issue.Data == 0 {
			return unix.EINVAL
		}
		answer := m.firmware.Encode()
		return toUser(issue.Data, answer[:])
	case psp.SNPCommitCommand:
		if !up {
			return unix.EINVAL
		}
		m.committed = true
		m.report(m.firmware.CurrentTCB)
		return nil
	case psp.SNPSetConfigCommand:
		return m.setConfig(issue.Data, up, writable)
	case psp.SNPVLEKLoadCommand:
		return m.loadVLEK(issue.Data, up, writable)
	default:
		if issue.Command < psp.GetID2Command {
			m.tb.Errorf("/dev/sev was asked for %s, which destroys or makes keys", issue.Command)
		}
		return unix.EINVAL
	}
}

// report sets the reported TCB. A VLEK is for one TCB and goes with it.
func (m *Machine) report(tcb psp.Hex) {
	if tcb != m.firmware.ReportedTCB {
		m.firmware.ReportedTCB, m.firmware.VLEKLoaded = tcb, false
	}
}

func (m *Machine) getID(address uint64) error {
	var raw [psp.GetID2Size]byte
	if err := fromUser(address, raw[:]); err != nil {
		return err
	}
	request, err := psp.DecodeGetID2(raw[:])
	if err != nil {
		return unix.EINVAL
	}
	var ids []byte
	for _, id := range m.setup.ChipIDs {
		ids = append(ids, id[:]...)
	}
	short := request.Address == 0 || int(request.Length) < len(ids)
	request.Length = uint32(len(ids))
	raw = request.Encode()
	if err := toUser(address, raw[:]); err != nil {
		return err
	}
	if short {
		return refused(psp.InvalidLength)
	}
	return toUser(request.Address, ids)
}

const invalidParameter psp.Code = 0x16

func (m *Machine) setConfig(address uint64, up, writable bool) error {
	if address == 0 || !up {
		return unix.EINVAL
	}
	if !writable {
		return unix.EPERM
	}
	var raw [psp.ConfigSize]byte
	if err := fromUser(address, raw[:]); err != nil {
		return err
	}
	config, err := psp.DecodeConfig(raw[:])
	if err != nil {
		return refused(invalidParameter)
	}
	tcb := config.ReportedTCB
	if tcb == 0 {
		tcb = m.firmware.CurrentTCB
	}
	for shift := 0; shift < 64; shift += 8 {
		if uint8(tcb>>shift) > uint8(m.firmware.CurrentTCB>>shift) {
			return refused(invalidParameter)
		}
	}
	m.report(tcb)
	m.firmware.MaskChipID, m.firmware.MaskChipKey = config.MaskChipID, config.MaskChipKey
	return nil
}

const badMeasurement psp.Code = 0x0B

func (m *Machine) loadVLEK(address uint64, up, writable bool) error {
	if address == 0 || !up {
		return unix.EINVAL
	}
	if !writable {
		return unix.EPERM
	}
	var raw [psp.VLEKLoadSize]byte
	if err := fromUser(address, raw[:]); err != nil {
		return err
	}
	load, err := psp.DecodeVLEKLoad(raw[:])
	if err != nil {
		return unix.EINVAL
	}
	var stick [psp.HashstickSize]byte
	if err := fromUser(load.Address, stick[:]); err != nil {
		return err
	}
	if !bytes.Equal(stick[:], m.setup.VLEK) {
		return refused(badMeasurement) // not wrapped for this chip
	}
	m.firmware.VLEKLoaded = true
	return nil
}

// Committed says whether SNP_COMMIT was given.
func (m *Machine) Committed() bool { return m.committed }

// Firmware is the SNP firmware's state.
func (m *Machine) Firmware() psp.SNPStatus { return m.firmware }
