// Package psp talks to the AMD security processor through /dev/sev: the
// commands that ask, on Device, and the few that change the platform, on
// Operator. It owns the byte layouts of those commands and what the firmware's
// error codes mean. It decides nothing about the host; package host does.
//
// Documents: "UAPI" is Linux include/uapi/linux/psp-sev.h as of 7.0; "56860"
// is AMD's SEV Secure Nested Paging Firmware ABI Specification, revision 1.58.
// All integers are little endian, all structures packed.
//
// A Device may be used by one goroutine at a time; the kernel serialises
// commands of different descriptors itself.
package psp

import (
	"encoding/binary"
	"fmt"
)

// DevicePath is the device below the root.
const DevicePath = "dev/sev"

// IssueCommand is the device's only ioctl: _IOWR('S', 0, struct sev_issue_cmd)
// with its 16 packed bytes (UAPI, SEV_ISSUE_CMD).
const IssueCommand = 0xC0105300

// Command is a number of the platform commands (UAPI, first enum).
type Command uint32

// Commands that this package issues.
const (
	PlatformStatusCommand    Command = 1
	GetID2Command            Command = 8
	SNPPlatformStatusCommand Command = 9
	SNPCommitCommand         Command = 10
	SNPSetConfigCommand      Command = 11
	SNPVLEKLoadCommand       Command = 12
)

func (c Command) String() string {
	switch c {
	case PlatformStatusCommand:
		return "PLATFORM_STATUS"
	case GetID2Command:
		return "GET_ID2"
	case SNPPlatformStatusCommand:
		return "SNP_PLATFORM_STATUS"
	case SNPCommitCommand:
		return "SNP_COMMIT"
	case SNPSetConfigCommand:
		return "SNP_SET_CONFIG"
	case SNPVLEKLoadCommand:
		return "SNP_VLEK_LOAD"
	}
	return fmt.Sprintf("command %d", uint32(c))
}

// Sizes of the structures (UAPI).
const (
	IssueSize          = 16  // struct sev_issue_cmd
	PlatformStatusSize = 12  // struct sev_user_data_status
	GetID2Size         = 12  // struct sev_user_data_get_id2
	SNPStatusSize      = 32  // struct sev_user_data_snp_status
	ConfigSize         = 64  // struct sev_user_data_snp_config
	VLEKLoadSize       = 16  // struct sev_user_data_snp_vlek_load
	HashstickSize      = 432 // struct sev_user_data_snp_wrapped_vlek_hashstick
	// ChipIDSize is one socket's part of GET_ID2's answer (56860, GET_ID).
	ChipIDSize = 64
)

func wantSize(what string, b []byte, size int) error {
	if len(b) != size {
		return fmt.Errorf("decoding %s: %d bytes, want %d", what, len(b), size)
	}
	return nil
}

// Issue is struct sev_issue_cmd. The address lies at offset 4, unaligned.
type Issue struct {
	Command Command
	Data    uint64 // address of the command's structure, 0 for none
	Error   uint32 // out: the firmware's code
}

// Encode returns the structure's bytes.
func (i Issue) Encode() [IssueSize]byte {
	var b [IssueSize]byte
	binary.LittleEndian.PutUint32(b[0:], uint32(i.Command))
	binary.LittleEndian.PutUint64(b[4:], i.Data)
	binary.LittleEndian.PutUint32(b[12:], i.Error)
	return b
}

// DecodeIssue is the inverse of Encode.
func DecodeIssue(b []byte) (Issue, error) {
	if err := wantSize("sev_issue_cmd", b, IssueSize); err != nil {
		return Issue{}, err
	}
	return Issue{
		Command: Command(binary.LittleEndian.Uint32(b[0:])),
		Data:    binary.LittleEndian.Uint64(b[4:]),
		Error:   binary.LittleEndian.Uint32(b[12:]),
	}, nil
}

// PlatformState is the state of the SEV firmware (AMD 55766, table
// PLATFORM_STATUS) or, with its first two values, of the SNP firmware (56860,
// SNP_PLATFORM_STATUS, STATE).
type PlatformState uint8

// Platform states.
const (
	Uninitialized PlatformState = 0
	Initialized   PlatformState = 1
	Working       PlatformState = 2 // SEV only: guests are active
)

func (s PlatformState) String() string {
	switch s {
	case Uninitialized:
		return "uninitialized"
	case Initialized:
		return "initialized"
	case Working:
		return "working"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// PlatformStatus is struct sev_user_data_status: the firmware behind SEV and
// SEV-ES, which is the same firmware.
type PlatformStatus struct {
	APIMajor uint8         `json:"api_major"`
	APIMinor uint8         `json:"api_minor"`
	State    PlatformState `json:"state"`
	// Flags: bit 0 owned, bit 8 SEV-ES initialised.
	Flags  uint32 `json:"flags"`
	Build  uint8  `json:"build"`
	Guests uint32 `json:"guests"`
}

// Encode returns the structure's bytes.
func (s PlatformStatus) Encode() [PlatformStatusSize]byte {
	b := [PlatformStatusSize]byte{s.APIMajor, s.APIMinor, byte(s.State)}
	binary.LittleEndian.PutUint32(b[3:], s.Flags)
	b[7] = s.Build
	binary.LittleEndian.PutUint32(b[8:], s.Guests)
	return b
}

// DecodePlatformStatus is the inverse of Encode.
func DecodePlatformStatus(b []byte) (PlatformStatus, error) {
	if err := wantSize("sev_user_data_status", b, PlatformStatusSize); err != nil {
		return PlatformStatus{}, err
	}
	s := PlatformStatus{
		APIMajor: b[0], APIMinor: b[1], State: PlatformState(b[2]), Flags: binary.LittleEndian.Uint32(b[3:]),
		Build: b[7], Guests: binary.LittleEndian.Uint32(b[8:]),
	}
	if s.State > Working {
		return PlatformStatus{}, fmt.Errorf("decoding sev_user_data_status: state %d is not defined", b[2])
	}
	return s, nil
}

// GetID2 is struct sev_user_data_get_id2.
type GetID2 struct {
	Address uint64
	Length  uint32 // in: room at Address; out: what is needed or was written
}

// Encode returns the structure's bytes.
func (g GetID2) Encode() [GetID2Size]byte {
	var b [GetID2Size]byte
	binary.LittleEndian.PutUint64(b[0:], g.Address)
	binary.LittleEndian.PutUint32(b[8:], g.Length)
	return b
}

// DecodeGetID2 is the inverse of Encode.
func DecodeGetID2(b []byte) (GetID2, error) {
	if err := wantSize("sev_user_data_get_id2", b, GetID2Size); err != nil {
		return GetID2{}, err
	}
	return GetID2{Address: binary.LittleEndian.Uint64(b[0:]), Length: binary.LittleEndian.Uint32(b[8:])}, nil
}

// VLEKLoad is struct sev_user_data_snp_vlek_load; its length field is fixed
// and the only defined version of the wrapped hashstick is 0.
type VLEKLoad struct{ Address uint64 }

// Encode returns the structure's bytes.
func (v VLEKLoad) Encode() [VLEKLoadSize]byte {
	var b [VLEKLoadSize]byte
	binary.LittleEndian.PutUint32(b[0:], VLEKLoadSize)
	binary.LittleEndian.PutUint64(b[8:], v.Address)
	return b
}

// DecodeVLEKLoad is the inverse of Encode.
func DecodeVLEKLoad(b []byte) (VLEKLoad, error) {
	if err := wantSize("sev_user_data_snp_vlek_load", b, VLEKLoadSize); err != nil {
		return VLEKLoad{}, err
	}
	if length := binary.LittleEndian.Uint32(b[0:]); length != VLEKLoadSize {
		return VLEKLoad{}, fmt.Errorf("decoding sev_user_data_snp_vlek_load: its length field says %d, want %d", length, VLEKLoadSize)
	}
	if b[4]|b[5]|b[6]|b[7] != 0 {
		return VLEKLoad{}, fmt.Errorf("decoding sev_user_data_snp_vlek_load: version and reserved bytes are %x, want zeros", b[4:8])
	}
	return VLEKLoad{Address: binary.LittleEndian.Uint64(b[8:])}, nil
}
