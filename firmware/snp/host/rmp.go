package host

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

// Model-specific registers (AMD PPR of family 19h and 1Ah; Linux
// arch/x86/include/asm/msr-index.h).
const (
	msrSYSCFG  = 0xC0010010
	msrRMPBase = 0xC0010132
	msrRMPEnd  = 0xC0010133
	msrRMPCfg  = 0xC0010136 // only with segmented RMP in CPUID
	msrSize    = 8
)

// Bits of SYSCFG (AMD APM volume 2, 3.2.1).
const (
	syscfgMemoryEncryption = 1 << 23 // set by the BIOS (SMEE)
	syscfgSNP              = 1 << 24 // set by the kernel, once the RMP is ready
	syscfgVMPL             = 1 << 25
)

// RMP_BASE and RMP_END hold an address in these bits (AMD APM volume 2,
// 15.36.4).
const rmpAddressMask = 1<<52 - 1<<13

// RMP_CFG: bit 0 segmented, bits 13:8 the segment size as a power of two.
const (
	rmpCfgSegmented = 1 << 0
	rmpCfgSizeShift = 8
	rmpCfgSizeMask  = 0x3F
)

// The table's shape (AMD APM volume 2, 15.36.3; Linux arch/x86/virt/svm/sev.c).
const (
	rmpBookkeeping  = 16 << 10 // for the processor, at the table's start
	rmpEntry        = 16       // for each 4 KiB page
	pageSize        = 4 << 10
	rmpMaxSegments  = 512 // entries of the segment table
	maxPhysicalBits = 52
)

// MSRs are the registers about memory encryption, of processor 0.
type MSRs struct {
	SYSCFG  psp.Hex `json:"syscfg"`
	RMPBase psp.Hex `json:"rmp_base"`
	RMPEnd  psp.Hex `json:"rmp_end"`
	// RMPCfg is nil where the processor has no segmented RMP.
	RMPCfg *psp.Hex `json:"rmp_cfg,omitempty"`
}

// RMP modes.
const (
	RMPNone       = "none"
	RMPContiguous = "contiguous"
	RMPSegmented  = "segmented"
)

// RMP is the reverse map table against the memory it must cover.
type RMP struct {
	Mode string  `json:"mode"`
	Base psp.Hex `json:"base"`
	// Size is what the BIOS reserved, Required what all memory needs; both
	// only for a contiguous table.
	Size     uint64 `json:"size,omitempty"`
	Required uint64 `json:"required,omitempty"`
	// SegmentSize and Segments bound what a segmented table can cover; which
	// segments the BIOS filled lies in memory that nobody may read.
	SegmentSize uint64 `json:"segment_size,omitempty"`
	Segments    uint64 `json:"segments,omitempty"`
	MemoryEnd   uint64 `json:"memory_end,omitempty"`
	// Covers: "yes", "no", or "unknown".
	Covers string `json:"covers"`
	// Why is one sentence behind Covers.
	Why string `json:"why"`
}

// Answers of RMP.Covers.
const (
	CoversYes     = "yes"
	CoversNo      = "no"
	CoversUnknown = "unknown"
)

// rmpOf concludes from the registers what the table covers.
func rmpOf(m MSRs, leaf *RMPSegmentsLeaf, memoryEnd uint64) RMP {
	if m.RMPCfg != nil && *m.RMPCfg&rmpCfgSegmented != 0 {
		return segmentedRMP(m, leaf, memoryEnd)
	}
	r := RMP{Mode: RMPContiguous, Base: m.RMPBase, MemoryEnd: memoryEnd}
	if m.RMPBase&rmpAddressMask == 0 || m.RMPEnd&rmpAddressMask == 0 {
		r.Mode, r.Covers, r.Why = RMPNone, CoversNo, "the BIOS reserved no memory for the table"
		return r
	}
	if m.RMPEnd < m.RMPBase {
		r.Covers, r.Why = CoversNo, "the table ends before it begins"
		return r
	}
	r.Size = uint64(m.RMPEnd - m.RMPBase + 1)
	if memoryEnd == 0 {
		r.Covers, r.Why = CoversUnknown, "the memory map could not be read"
		return r
	}
	// The table must also cover itself.
	pages := (max(memoryEnd, uint64(m.RMPEnd)+1) + pageSize - 1) / pageSize
	r.Required = pages*rmpEntry + rmpBookkeeping
	r.Covers, r.Why = CoversYes, "the table is large enough for all memory"
	if r.Size < r.Required {
		r.Covers, r.Why = CoversNo, "the table is too small for all memory"
	}
	return r
}

func segmentedRMP(m MSRs, leaf *RMPSegmentsLeaf, memoryEnd uint64) RMP {
	r := RMP{Mode: RMPSegmented, Base: m.RMPBase, MemoryEnd: memoryEnd, Segments: rmpMaxSegments, Covers: CoversNo}
	bits := uint8(*m.RMPCfg >> rmpCfgSizeShift & rmpCfgSizeMask)
	if bits < maxPhysicalBits {
		r.SegmentSize = 1 << bits
	}
	if leaf != nil && leaf.HardLimit {
		r.Segments = uint64(leaf.Cached)
	}
	switch {
	case m.RMPBase&rmpAddressMask == 0:
		r.Why = "the BIOS reserved no memory for the segment table"
	case leaf != nil && (bits < leaf.MinSizeBits || bits > leaf.MaxSizeBits):
		r.Why = fmt.Sprintf("segments of 2^%d bytes are outside of what the processor takes, 2^%d to 2^%d", bits, leaf.MinSizeBits, leaf.MaxSizeBits)
	case memoryEnd == 0 || leaf == nil:
		r.Covers, r.Why = CoversUnknown, "the memory map or CPUID could not be read"
	case r.SegmentSize == 0 || (memoryEnd+r.SegmentSize-1)/r.SegmentSize > r.Segments:
		r.Why = "even with every segment in use the table does not reach the end of memory"
	case m.SYSCFG&syscfgSNP != 0:
		r.Covers, r.Why = CoversYes, "the kernel checked every segment and switched SNP on"
	default:
		r.Covers, r.Why = CoversUnknown, "the segments could reach all memory; which of them the BIOS filled, only the kernel's log says"
	}
	return r
}

// parseMemoryEnd returns the address behind the last "System RAM" of
// /proc/iomem, which shows zeros to everybody but root.
func parseMemoryEnd(r io.Reader) (uint64, error) {
	var end uint64
	found := false
	lines := bufio.NewScanner(io.LimitReader(r, maxText))
	for lines.Scan() {
		span, name, ok := strings.Cut(lines.Text(), " : ")
		if !ok || strings.HasPrefix(span, " ") || name != "System RAM" {
			continue
		}
		from, to, ok := strings.Cut(span, "-")
		start, errStart := strconv.ParseUint(from, 16, maxPhysicalBits)
		last, errLast := strconv.ParseUint(to, 16, maxPhysicalBits)
		if !ok || errStart != nil || errLast != nil || last < start {
			return 0, fmt.Errorf("parsing iomem: %q is no range", span)
		}
		found = true
		if last > 0 {
			end = max(end, last+1)
		}
	}
	if err := lines.Err(); err != nil {
		return 0, fmt.Errorf("parsing iomem: %w", err)
	}
	if !found {
		return 0, fmt.Errorf("parsing iomem: there is no System RAM")
	}
	if end == 0 {
		return 0, errHidden
	}
	return end, nil
}
