package snp

import (
	"fmt"
	"strings"
)

// Policy is the guest policy (AMD 56860, table "Guest policy"). Its lowest 16
// bits are the least firmware ABI, minor then major.
type Policy uint64

// Bits of the guest policy.
const (
	PolicySMT            Policy = 1 << 16
	PolicyReservedOne    Policy = 1 << 17 // must be 1
	PolicyMigrationAgent Policy = 1 << 18
	PolicyDebug          Policy = 1 << 19
	PolicyCXL            Policy = 1 << 21

	// policyKnown is up to PAGE_SWAP_DISABLE (bit 25, ABI 1.58).
	policyKnown Policy = 1<<26 - 1
)

// PlatformInfo is what the platform says of itself (AMD 56860, PLATFORM_INFO).
type PlatformInfo uint64

// Bits of PLATFORM_INFO.
const (
	PlatformSMT              PlatformInfo = 1 << 0
	PlatformTSME             PlatformInfo = 1 << 1
	PlatformECC              PlatformInfo = 1 << 2
	PlatformRAPLDisabled     PlatformInfo = 1 << 3
	PlatformCiphertextHiding PlatformInfo = 1 << 4
	// PlatformAliasCheck: no memory alias was found since the last reset
	// (AMD-SB-3015).
	PlatformAliasCheck PlatformInfo = 1 << 5
	// PlatformIOMMUWriteSafe as AMD-SB-3016 has it; first seen on Turin.
	PlatformIOMMUWriteSafe PlatformInfo = 1 << 6
	PlatformTIO            PlatformInfo = 1 << 7
)

// platformNames are the names of the bits, from the lowest.
func platformNames() []string {
	return []string{"smt", "tsme", "ecc", "rapl-disabled", "ciphertext-hiding", "alias-check", "iommu-write-safe", "tio"}
}

// String is the form ParsePlatformInfo reads, with bits that have no name
// behind it in hex.
func (p PlatformInfo) String() string {
	var set []string
	for i, name := range platformNames() {
		if p&(1<<i) != 0 {
			set = append(set, name)
		}
	}
	if rest := p.unknown(); rest != 0 {
		set = append(set, fmt.Sprintf("%#x", uint64(rest)))
	}
	return strings.Join(set, ",")
}

func (p PlatformInfo) unknown() PlatformInfo {
	return p >> len(platformNames()) << len(platformNames())
}

// ParsePlatformInfo decodes names of bits that are separated by commas.
func ParsePlatformInfo(text string) (PlatformInfo, error) {
	var p PlatformInfo
	for name := range strings.SplitSeq(text, ",") {
		bit := PlatformInfo(0)
		for i, known := range platformNames() {
			if name == known {
				bit = 1 << i
			}
		}
		if bit == 0 || p&bit != 0 {
			return 0, fmt.Errorf("platform fact %q is none of %s, or is given twice", name, strings.Join(platformNames(), ", "))
		}
		p |= bit
	}
	return p, nil
}
