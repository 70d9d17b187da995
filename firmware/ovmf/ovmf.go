// Package ovmf reads what SEV-SNP needs to know of an OVMF firmware image: the
// GUIDed footer table and the SEV metadata sections, in file order. It parses
// bytes and nothing else; the bytes may come from outside, so every length is
// bounded before use and anything unknown is refused. All functions are pure.
//
// Layout: edk2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm and
// OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm (edk2-stable202605).
package ovmf

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// Limits of an image.
const (
	// PageSize is the unit of measurement.
	PageSize = 4096
	// MaxSize bounds an image; QEMU maps it below 4 GiB and no OVMF build
	// comes near.
	MaxSize = 16 << 20
	// maxSections bounds the metadata table; edk2 has seven.
	maxSections = 64
)

// Offsets from the end of the image (ResetVectorVtf0.asm).
const (
	resetVectorSize = 32
	footerSize      = 18 // u16 length + GUID
	entryHeaderSize = 18
)

// GUIDs of the footer table, stored mixed-endian.
const (
	guidFooter      = "96b582de-1fb2-45f7-baea-a366c55a082d"
	guidResetBlock  = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
	guidHashTable   = "7255371f-3a3b-4b04-927b-1da6efa8d454"
	guidSEVMetadata = "dc886566-984a-4798-a75e-5585a7bf67cc"
)

// SectionType is the kind of a metadata section (OvmfSevMetadata.asm).
type SectionType uint32

// Section types QEMU knows.
const (
	SectionSNPMemory    SectionType = 1
	SectionSecrets      SectionType = 2
	SectionCPUID        SectionType = 3
	SectionSVSMCAA      SectionType = 4
	SectionKernelHashes SectionType = 0x10
)

// Section is a range of guest memory that is part of the launch.
type Section struct {
	GPA, Size uint32
	Type      SectionType
}

// Area is a range of guest memory.
type Area struct{ Base, Size uint32 }

// HashTableSize is the padded size of the kernel hashes table.
const HashTableSize = 176

// Firmware is a parsed image.
type Firmware struct {
	// Size of the image in bytes; it is mapped so that it ends at 4 GiB.
	Size int
	// ResetEIP is where application processors start.
	ResetEIP uint32
	// HashTable is where the kernel hashes go; nil when the build has no
	// support for them.
	HashTable *Area
	// Sections in file order, which is the order they are measured in.
	Sections []Section
}

// ErrNotSEV means the image is no SEV-SNP aware OVMF.
var ErrNotSEV = errors.New("not an OVMF image with SEV-SNP metadata; use the AmdSev build (Debian package ovmf-amdsev)")

// ErrNoKernelHashes means a build without kernel hashes, for instance OvmfX64.
var ErrNoKernelHashes = errors.New("firmware cannot verify a kernel: it has no hash table area; use the AmdSev build of OVMF (Debian package ovmf-amdsev), OvmfPkgX64 has none")

// GPA returns the address the image starts at.
func (f *Firmware) GPA() uint64 { return 1<<32 - uint64(f.Size) }

// SupportsKernelHashes returns ErrNoKernelHashes unless the image is a build
// that verifies kernel, initrd and command line against measured hashes.
func (f *Firmware) SupportsKernelHashes() error {
	if f.HashTable == nil {
		return ErrNoKernelHashes
	}
	for _, s := range f.Sections {
		if s.Type == SectionKernelHashes {
			return nil
		}
	}
	return ErrNoKernelHashes
}

// Parse reads an image. It refuses sizes, lengths, versions and section types
// it does not know.
func Parse(image []byte) (*Firmware, error) {
	if len(image) == 0 || len(image)%PageSize != 0 || len(image) > MaxSize {
		return nil, fmt.Errorf("parsing firmware: size %d is not a multiple of %d up to %d", len(image), PageSize, MaxSize)
	}
	table, err := footerTable(image)
	if err != nil {
		return nil, err
	}
	f := &Firmware{Size: len(image)}
	reset, ok := table[guidResetBlock]
	if !ok || len(reset) != 4 {
		return nil, fmt.Errorf("parsing firmware: no SEV-ES reset block: %w", ErrNotSEV)
	}
	if f.ResetEIP = binary.LittleEndian.Uint32(reset); f.ResetEIP == 0 {
		return nil, fmt.Errorf("parsing firmware: SEV-ES reset address is zero: %w", ErrNotSEV)
	}
	meta, ok := table[guidSEVMetadata]
	if !ok || len(meta) != 4 {
		return nil, fmt.Errorf("parsing firmware: no SEV metadata: %w", ErrNotSEV)
	}
	if f.Sections, err = parseSections(image, binary.LittleEndian.Uint32(meta)); err != nil {
		return nil, err
	}
	if area, ok := table[guidHashTable]; ok {
		if len(area) != 8 {
			return nil, fmt.Errorf("parsing firmware: hash table entry has %d bytes, want 8", len(area))
		}
		a := Area{binary.LittleEndian.Uint32(area), binary.LittleEndian.Uint32(area[4:])}
		if a.Base != 0 { // OvmfX64 carries the entry with base 0
			f.HashTable = &a
		}
	}
	if err := f.checkHashTable(); err != nil {
		return nil, err
	}
	return f, nil
}

// footerTable walks the table backward from the end of the image.
func footerTable(image []byte) (map[string][]byte, error) {
	end := len(image) - resetVectorSize
	if guidAt(image, end-16) != guidFooter {
		return nil, fmt.Errorf("parsing firmware: no footer table: %w", ErrNotSEV)
	}
	total := int(binary.LittleEndian.Uint16(image[end-footerSize:]))
	if total < footerSize || total > end {
		return nil, fmt.Errorf("parsing firmware: footer table length %d does not fit", total)
	}
	start, pos := end-total, end-footerSize
	table := map[string][]byte{}
	for pos > start {
		if pos-start < entryHeaderSize {
			return nil, errors.New("parsing firmware: footer table ends inside an entry")
		}
		length := int(binary.LittleEndian.Uint16(image[pos-entryHeaderSize:]))
		if length < entryHeaderSize || length > pos-start {
			return nil, fmt.Errorf("parsing firmware: footer entry length %d does not fit", length)
		}
		id := guidAt(image, pos-16)
		if _, twice := table[id]; twice {
			return nil, fmt.Errorf("parsing firmware: footer entry %s appears twice", id)
		}
		table[id] = image[pos-length : pos-entryHeaderSize]
		pos -= length
	}
	return table, nil
}

func parseSections(image []byte, offset uint32) ([]Section, error) {
	const header, descriptor, version = 16, 12, 1
	if uint64(offset) > uint64(len(image)) || offset < header {
		return nil, fmt.Errorf("parsing firmware: SEV metadata offset %d is outside the image", offset)
	}
	meta := image[len(image)-int(offset):]
	length, count := binary.LittleEndian.Uint32(meta[4:]), binary.LittleEndian.Uint32(meta[12:])
	switch {
	case string(meta[:4]) != "ASEV":
		return nil, fmt.Errorf("parsing firmware: SEV metadata has no signature: %w", ErrNotSEV)
	case binary.LittleEndian.Uint32(meta[8:]) != version:
		return nil, fmt.Errorf("parsing firmware: SEV metadata version %d is not supported, want %d", binary.LittleEndian.Uint32(meta[8:]), version)
	case count > maxSections || length != header+descriptor*count || uint64(length) > uint64(len(meta)):
		return nil, fmt.Errorf("parsing firmware: SEV metadata of %d bytes with %d sections is malformed", length, count)
	}
	sections := make([]Section, count)
	hashes := 0
	for i := range sections {
		d := meta[header+descriptor*i:]
		s := Section{binary.LittleEndian.Uint32(d), binary.LittleEndian.Uint32(d[4:]), SectionType(binary.LittleEndian.Uint32(d[8:]))}
		if s.GPA%PageSize != 0 || s.Size%PageSize != 0 || s.Size == 0 || uint64(s.GPA)+uint64(s.Size) > 1<<32 {
			return nil, fmt.Errorf("parsing firmware: section %d (%#x+%#x) is not page aligned below 4 GiB", i, s.GPA, s.Size)
		}
		switch s.Type {
		case SectionSNPMemory, SectionSecrets, SectionCPUID, SectionSVSMCAA:
		case SectionKernelHashes:
			if hashes++; hashes > 1 || s.Size != PageSize {
				return nil, errors.New("parsing firmware: more than one page of kernel hashes")
			}
		default:
			return nil, fmt.Errorf("parsing firmware: section %d has unknown type %#x", i, uint32(s.Type))
		}
		sections[i] = s
	}
	return sections, nil
}

// checkHashTable makes sure that the area lies in the page that is measured.
func (f *Firmware) checkHashTable() error {
	if f.HashTable == nil {
		return nil
	}
	base := f.HashTable.Base
	if f.HashTable.Size < HashTableSize || base%PageSize+HashTableSize > PageSize {
		return fmt.Errorf("parsing firmware: hash table area %#x+%#x is too small", base, f.HashTable.Size)
	}
	for _, s := range f.Sections {
		if s.Type == SectionKernelHashes && s.GPA != base&^(PageSize-1) {
			return fmt.Errorf("parsing firmware: hash table at %#x is outside the kernel hashes page %#x", base, s.GPA)
		}
	}
	return nil
}

// guidAt decodes a mixed-endian GUID; "" when it does not fit.
func guidAt(image []byte, at int) string {
	if at < 0 || at+16 > len(image) {
		return ""
	}
	b := image[at : at+16]
	return uuid.UUID{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]}.String()
}
