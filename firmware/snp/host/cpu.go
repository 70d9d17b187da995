package host

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// Leaves of CPUID (AMD APM volume 3, appendix E.4).
const (
	leafVendor      = 0x80000000 // EAX: the highest extended leaf
	leafEncryption  = 0x8000001F // E.4.17, Encrypted Memory Capabilities
	leafRMPSegments = 0x80000025 // E.4.22, SEV-SNP segmented RMP
	cpuidSize       = 16         // EAX, EBX, ECX, EDX, as /dev/cpu/N/cpuid gives them
)

// Registers of one CPUID leaf.
type Registers struct{ EAX, EBX, ECX, EDX uint32 }

func decodeRegisters(b [cpuidSize]byte) Registers {
	at := func(i int) uint32 { return binary.LittleEndian.Uint32(b[i:]) }
	return Registers{at(0), at(4), at(8), at(12)}
}

// EncryptionLeaf is CPUID 0x8000001F.
type EncryptionLeaf struct {
	Raw    string `json:"raw"`
	SME    bool   `json:"sme"`
	SEV    bool   `json:"sev"`
	SEVES  bool   `json:"sev_es"`
	SEVSNP bool   `json:"sev_snp"`
	VMPL   bool   `json:"vmpl"`
	// SecureTSC and SegmentedRMP say what silicon could do.
	SecureTSC    bool `json:"secure_tsc"`
	SegmentedRMP bool `json:"segmented_rmp"`

	CBit            uint8 `json:"c_bit"`
	ReducedPhysBits uint8 `json:"reduced_phys_bits"`
	VMPLs           uint8 `json:"vmpls"`
	// MaxASID is the number of encrypted guests at once; MinSEVASID is the
	// lowest ASID of a guest that is neither SEV-ES nor SNP.
	MaxASID    uint32 `json:"max_asid"`
	MinSEVASID uint32 `json:"min_sev_asid"`
}

// Bits of leaf 0x8000001F, EAX (E.4.17).
const (
	encryptionSME          = 0
	encryptionSEV          = 1
	encryptionSEVES        = 3
	encryptionSEVSNP       = 4
	encryptionVMPL         = 5
	encryptionSecureTSC    = 8
	encryptionSegmentedRMP = 23
)

func (r Registers) String() string {
	return fmt.Sprintf("eax=%08x ebx=%08x ecx=%08x edx=%08x", r.EAX, r.EBX, r.ECX, r.EDX)
}

func decodeEncryptionLeaf(r Registers) EncryptionLeaf {
	has := func(bit int) bool { return r.EAX>>bit&1 != 0 }
	return EncryptionLeaf{
		Raw: r.String(),
		SME: has(encryptionSME), SEV: has(encryptionSEV), SEVES: has(encryptionSEVES), SEVSNP: has(encryptionSEVSNP),
		VMPL: has(encryptionVMPL), SecureTSC: has(encryptionSecureTSC), SegmentedRMP: has(encryptionSegmentedRMP),
		CBit: uint8(r.EBX & 0x3F), ReducedPhysBits: uint8(r.EBX >> 6 & 0x3F), VMPLs: uint8(r.EBX >> 12 & 0xF),
		MaxASID: r.ECX, MinSEVASID: r.EDX,
	}
}

// RMPSegmentsLeaf is CPUID 0x80000025. Sizes are powers of two.
type RMPSegmentsLeaf struct {
	Raw         string `json:"raw"`
	MinSizeBits uint8  `json:"min_size_bits"`
	MaxSizeBits uint8  `json:"max_size_bits"`
	// Cached is how many segments the processor caches; HardLimit says that
	// it takes no more than those.
	Cached    uint16 `json:"cached"`
	HardLimit bool   `json:"hard_limit"`
}

func decodeRMPSegmentsLeaf(r Registers) RMPSegmentsLeaf {
	return RMPSegmentsLeaf{
		Raw:         r.String(),
		MinSizeBits: uint8(r.EAX & 0x3F), MaxSizeBits: uint8(r.EAX >> 6 & 0x3F),
		Cached: uint16(r.EBX & 0x3FF), HardLimit: r.EBX>>10&1 != 0,
	}
}

// maxText bounds every text file of the kernel read here. /proc/cpuinfo of
// 512 threads is about 800 KiB, of which only the first block counts.
const maxText = 4 << 20

// parseCPUInfo reads the first processor's block of /proc/cpuinfo.
func parseCPUInfo(r io.Reader) (CPU, error) {
	var c CPU
	var errs []string
	number := func(key, value string) uint8 {
		n, err := strconv.ParseUint(value, 10, 8)
		if err != nil {
			errs = append(errs, fmt.Sprintf("%s is %q", key, value))
		}
		return uint8(n)
	}
	seen := map[string]bool{}
	lines := bufio.NewScanner(io.LimitReader(r, maxText))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() && (lines.Text() != "" || len(seen) == 0) {
		key, value, _ := strings.Cut(lines.Text(), ":")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		seen[key] = true
		switch key {
		case "vendor_id":
			c.Vendor = value
		case "model name":
			c.Brand = value
		case "cpu family":
			c.Family = number(key, value)
		case "model":
			c.Model = number(key, value)
		case "stepping":
			c.Stepping = number(key, value)
		case "microcode":
			c.Microcode = value
		case "flags":
			for flag := range strings.FieldsSeq(value) {
				switch flag {
				case "hypervisor":
					c.Hypervisor = true
				case "sme", "sev", "sev_es", "sev_snp":
					c.Flags = append(c.Flags, flag)
				}
			}
			slices.Sort(c.Flags)
		}
	}
	if err := lines.Err(); err != nil {
		return CPU{}, fmt.Errorf("parsing cpuinfo: %w", err)
	}
	for _, key := range []string{"vendor_id", "cpu family", "model", "stepping", "flags"} {
		if !seen[key] {
			errs = append(errs, "there is no "+key)
		}
	}
	if len(errs) > 0 {
		return CPU{}, fmt.Errorf("parsing cpuinfo: %s", strings.Join(errs, ", "))
	}
	return c, nil
}
