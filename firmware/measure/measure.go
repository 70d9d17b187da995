// Package measure predicts the SEV-SNP launch digest (report field
// MEASUREMENT) of a guest that QEMU starts on upstream KVM. It is pure: the
// same inputs give the same digest everywhere, which is what lets tenant,
// node and verifier agree without trusting each other. Nothing here does I/O.
//
// Algorithm: AMD 56860 (SNP firmware ABI) PAGE_INFO chaining, in the order of
// QEMU's sev.c (9.1 and later): firmware pages, metadata sections in file
// order, one VMSA per vCPU. Only QEMU's flow is modelled: clouds that launch
// differently (EC2 measures the CPUID page last, GCE leaves memory sections
// unmeasured, both fill the VMSA otherwise) have other digests.
package measure

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"

	"github.com/confidential-node/agent/firmware/ovmf"
)

// Digest sizes and bounds.
const (
	// Size of a launch digest: SHA-384.
	Size = sha512.Size384
	// MaxVCPUs QEMU's q35 starts.
	MaxVCPUs = 512
)

// Page types of PAGE_INFO (AMD 56860, SNP_LAUNCH_UPDATE).
const (
	pageNormal  = 1
	pageVMSA    = 2
	pageZero    = 3
	pageSecrets = 5
	pageCPUID   = 6
)

// gpaVMSA is where KVM says every VMSA lies, on every generation.
const gpaVMSA = 0xFFFFFFFFF000

// KernelDigests are the inputs of the kernel hashes table.
type KernelDigests struct {
	// Kernel and Initrd are SHA-256 of the whole files; no initrd is the
	// digest of the empty string.
	Kernel, Initrd [sha256.Size]byte
	// Cmdline is the command line without its terminating NUL.
	Cmdline string
}

// Input is everything the launch digest covers.
type Input struct {
	// Firmware is the whole OVMF image.
	Firmware []byte
	// Kernel is nil when QEMU is given no kernel.
	Kernel *KernelDigests
	// VCPUs present at start, 1 to MaxVCPUs.
	VCPUs int
	// CPUModel is QEMU's name, see CPUSignature.
	CPUModel string
	// GuestFeatures is SEV_FEATURES of the VMSA; 0x1 on QEMU 9.1 and later.
	GuestFeatures uint64
}

// Digest predicts the launch digest.
func Digest(in Input) ([Size]byte, error) {
	signature, err := CPUSignature(in.CPUModel)
	if err != nil {
		return [Size]byte{}, err
	}
	var table *[ovmf.HashTableSize]byte
	if in.Kernel != nil {
		t := HashTable(in.Kernel.Kernel, in.Kernel.Initrd, in.Kernel.Cmdline)
		table = &t
	}
	return DigestWithTable(in.Firmware, table, in.VCPUs, signature, in.GuestFeatures)
}

// DigestWithTable is Digest for a caller that knows the table's bytes and the
// CPUID signature instead of what they were made from. A nil table means that
// QEMU was given no kernel.
func DigestWithTable(firmware []byte, table *[ovmf.HashTableSize]byte, vcpus int, signature uint32, features uint64) ([Size]byte, error) {
	parsed, err := ovmf.Parse(firmware)
	if err != nil {
		return [Size]byte{}, err
	}
	if vcpus < 1 || vcpus > MaxVCPUs {
		return [Size]byte{}, fmt.Errorf("measuring: %d vCPUs are not within 1..%d", vcpus, MaxVCPUs)
	}
	if table != nil {
		if err := parsed.SupportsKernelHashes(); err != nil {
			return [Size]byte{}, fmt.Errorf("measuring: %w", err)
		}
	}
	var d launch
	d.normal(firmware, parsed.GPA())
	d.sections(parsed, table)
	d.vmsas(vcpus, parsed.ResetEIP, signature, features)
	return d.digest, nil
}

// launch is a digest in the making.
type launch struct{ digest [Size]byte }

// extend appends one page (PAGE_INFO, 112 bytes).
func (l *launch) extend(pageType byte, gpa uint64, contents [Size]byte) {
	const infoSize = 0x70
	var info [infoSize]byte
	copy(info[0:], l.digest[:])
	copy(info[0x30:], contents[:])
	binary.LittleEndian.PutUint16(info[0x60:], infoSize)
	info[0x62] = pageType
	binary.LittleEndian.PutUint64(info[0x68:], gpa)
	l.digest = sha512.Sum384(info[:])
}

func (l *launch) normal(data []byte, gpa uint64) {
	for off := 0; off < len(data); off += ovmf.PageSize {
		l.extend(pageNormal, gpa+uint64(off), sha512.Sum384(data[off:off+ovmf.PageSize]))
	}
}

func (l *launch) sections(f *ovmf.Firmware, table *[ovmf.HashTableSize]byte) {
	for _, s := range f.Sections {
		kind := byte(pageZero)
		switch s.Type {
		case ovmf.SectionSecrets:
			kind = pageSecrets
		case ovmf.SectionCPUID:
			kind = pageCPUID
		case ovmf.SectionKernelHashes:
			if table != nil {
				page := hashPage(table, f.HashTable.Base)
				l.normal(page[:], uint64(s.GPA))
				continue
			}
		case ovmf.SectionSNPMemory, ovmf.SectionSVSMCAA:
		}
		for off := uint32(0); off < s.Size; off += ovmf.PageSize {
			l.extend(kind, uint64(s.GPA+off), [Size]byte{})
		}
	}
}

func (l *launch) vmsas(vcpus int, resetEIP, signature uint32, features uint64) {
	const bootEIP = 0xFFFFFFF0
	boot := vmsa(bootEIP, signature, features)
	l.extend(pageVMSA, gpaVMSA, sha512.Sum384(boot[:]))
	if vcpus == 1 {
		return
	}
	other := vmsa(resetEIP, signature, features)
	sum := sha512.Sum384(other[:])
	for range vcpus - 1 {
		l.extend(pageVMSA, gpaVMSA, sum)
	}
}

// GUIDs of the kernel hashes table (QEMU sev.c), stored mixed-endian.
const (
	guidHashes  = "9438d606-4f22-4cc9-b479-a793d411fd21"
	guidCmdline = "97d02dd8-bd20-4c94-aa78-e7714d36ab2a"
	guidInitrd  = "44baf731-3a2f-4bd7-9af1-41e29169781d"
	guidKernel  = "4de79437-abd2-427f-b835-d5b172d2045b"
)

// HashTable encodes the kernel hashes table as QEMU does: GUID, length 168,
// then command line (with its NUL), initrd and kernel, padded to 176 bytes.
func HashTable(kernel, initrd [sha256.Size]byte, cmdline string) [ovmf.HashTableSize]byte {
	const headerSize, entrySize, entries = 18, 50, 3
	var out [ovmf.HashTableSize]byte
	putGUID(out[:], guidHashes)
	binary.LittleEndian.PutUint16(out[16:], headerSize+entries*entrySize)
	text := sha256.Sum256(append([]byte(cmdline), 0))
	for i, e := range []struct {
		guid string
		sum  [sha256.Size]byte
	}{{guidCmdline, text}, {guidInitrd, initrd}, {guidKernel, kernel}} {
		entry := out[headerSize+i*entrySize:]
		putGUID(entry, e.guid)
		binary.LittleEndian.PutUint16(entry[16:], entrySize)
		copy(entry[18:], e.sum[:])
	}
	return out
}

func hashPage(table *[ovmf.HashTableSize]byte, base uint32) (page [ovmf.PageSize]byte) {
	copy(page[base%ovmf.PageSize:], table[:])
	return page
}

func putGUID(dst []byte, guid string) {
	b := uuid.MustParse(guid)
	copy(dst, []byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]})
	copy(dst[8:16], b[8:])
}
