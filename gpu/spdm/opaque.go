package spdm

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// PDI is the per-device identifier, a number fused into the chip: it can also
// be read by the host without driver (gpu inventory).
type PDI uint64

func (p PDI) String() string { return fmt.Sprintf("%#016x", uint64(p)) }

// ParsePDI reads what String writes: 16 hex digits, with or without 0x.
func ParsePDI(text string) (PDI, error) {
	digits := strings.TrimPrefix(strings.ToLower(text), "0x")
	n, err := strconv.ParseUint(digits, 16, 64)
	if err != nil || len(digits) != 16 {
		return 0, fmt.Errorf("parsing PDI: %.40q is not 16 hex digits", text)
	}
	return PDI(n), nil
}

// ParsePDIs reads a list of them, or says which is none.
func ParsePDIs(list []string) ([]PDI, error) {
	var out []PDI
	for _, text := range list {
		pdi, err := ParsePDI(text)
		if err != nil {
			return nil, err
		}
		out = append(out, pdi)
	}
	return out, nil
}

// Feature is the mode of use that a GPU states, opaque field 36.
type Feature uint16

// Features.
const (
	SinglePassthrough Feature = 0
	MultiPassthrough  Feature = 1
	ProtectedPCIe     Feature = 2
)

// Opaque is what the GPU adds to its measurements (nvtrust, table of opaque
// data). What firmware leaves out is the zero value.
type Opaque struct {
	// Driver is the version of the driver in the guest, "550.90.07".
	Driver string
	// VBIOS in the form of nvidia-smi, "96.00.9F.00.01".
	VBIOS string
	// Project, ProjectSKU and ChipSKU name the board in reference manifests.
	Project, ProjectSKU, ChipSKU string
	// FWID is the identity of the firmware that holds the signing key.
	FWID *Digest
	// NVDEC0Disabled leaves measurement 35 undefined.
	NVDEC0Disabled bool
	// ProtectedPCIe is true when field 21 or 36 says so.
	ProtectedPCIe bool
	// Feature is nil in firmware that does not state it.
	Feature *Feature
	// Switches are the NVSwitches of the board, with Protected PCIe.
	Switches []PDI
	// Unknown are types of fields that this version does not read.
	Unknown []uint16
}

// Types of opaque fields.
const (
	fieldDriver        = 3
	fieldVBIOS         = 6
	fieldNVDEC0        = 11
	fieldChipSKU       = 15
	fieldProject       = 17
	fieldProjectSKU    = 18
	fieldFWID          = 20
	fieldProtectedPCIe = 21
	fieldSwitches      = 22
	fieldFeature       = 36
	// lastField is the highest type that is known; those of them that are not
	// read describe the board and decide nothing here.
	lastField = fieldFeature

	enabled  = 0xaa
	disabled = 0x55
)

func parseOpaque(data []byte) (Opaque, error) {
	var o Opaque
	seen := map[uint16]bool{}
	for len(data) > 0 {
		if len(data) < 4 || len(data)-4 < int(binary.LittleEndian.Uint16(data[2:])) {
			return o, errors.New("GPU report: opaque data ends within a field")
		}
		kind, size := binary.LittleEndian.Uint16(data), int(binary.LittleEndian.Uint16(data[2:]))
		if seen[kind] {
			return o, fmt.Errorf("GPU report: opaque field %d twice", kind)
		}
		seen[kind] = true
		if err := o.set(kind, data[4:4+size]); err != nil {
			return o, fmt.Errorf("GPU report: opaque field %d: %w", kind, err)
		}
		data = data[4+size:]
	}
	return o, nil
}

func (o *Opaque) set(kind uint16, value []byte) (err error) {
	switch kind {
	case fieldDriver:
		o.Driver, err = text(value)
	case fieldVBIOS:
		o.VBIOS, err = vbios(value)
	case fieldNVDEC0:
		var on bool
		on, err = flag(value)
		o.NVDEC0Disabled = !on
	case fieldChipSKU:
		o.ChipSKU, err = text(value)
	case fieldProject:
		o.Project, err = text(value)
	case fieldProjectSKU:
		o.ProjectSKU, err = text(value)
	case fieldFWID:
		if len(value) != DigestSize {
			return wrongSize(value, DigestSize)
		}
		o.FWID = new(Digest(value))
	case fieldProtectedPCIe:
		var on bool
		on, err = flag(value)
		o.ProtectedPCIe = o.ProtectedPCIe || on
	case fieldSwitches:
		err = o.switches(value)
	case fieldFeature:
		if len(value) != 2 {
			return wrongSize(value, 2)
		}
		o.Feature = new(Feature(binary.LittleEndian.Uint16(value)))
		if *o.Feature > ProtectedPCIe {
			return fmt.Errorf("mode %d is not known", *o.Feature)
		}
		o.ProtectedPCIe = o.ProtectedPCIe || *o.Feature == ProtectedPCIe
	default:
		if kind == 0 || kind > lastField {
			o.Unknown = append(o.Unknown, kind)
		}
	}
	return err
}

func wrongSize(value []byte, want int) error {
	return fmt.Errorf("%d bytes, want %d", len(value), want)
}

// text reads a name of ASCII letters, digits, dots and dashes, padded with zeros.
func text(value []byte) (string, error) {
	value = bytes.TrimRight(value, "\x00")
	for _, c := range value {
		letter := (c|0x20 >= 'a' && c|0x20 <= 'z') || (c >= '0' && c <= '9')
		if !letter && c != '.' && c != '-' && c != '_' {
			return "", fmt.Errorf("%q is no name", value)
		}
	}
	return string(value), nil
}

func flag(value []byte) (bool, error) {
	if len(value) != 1 {
		return false, wrongSize(value, 1)
	}
	switch value[0] {
	case enabled:
		return true, nil
	case disabled:
		return false, nil
	}
	return false, fmt.Errorf("%#02x is neither %#02x nor %#02x", value[0], enabled, disabled)
}

// vbios reads eight bytes: four in little-endian order, one, three of padding.
func vbios(value []byte) (string, error) {
	if len(value) != 8 {
		return "", wrongSize(value, 8)
	}
	v := bytes.ToUpper([]byte(hex.EncodeToString([]byte{value[3], value[2], value[1], value[0], value[4]})))
	return string(bytes.Join([][]byte{v[0:2], v[2:4], v[4:6], v[6:8], v[8:10]}, []byte("."))), nil
}

func (o *Opaque) switches(value []byte) error {
	if len(value)%8 != 0 {
		return fmt.Errorf("%d bytes are no list of 8-byte PDIs", len(value))
	}
	for ; len(value) > 0; value = value[8:] {
		if pdi := PDI(binary.LittleEndian.Uint64(value)); pdi != 0 {
			o.Switches = append(o.Switches, pdi)
		}
	}
	return nil
}
