package measure

import (
	"encoding/binary"
	"fmt"

	"github.com/confidential-node/agent/firmware/ovmf"
)

// vmsa is the save area KVM measures for a vCPU that starts at eip (AMD
// 24593 table B-4 for the offsets, QEMU's reset state for the values).
func vmsa(eip, signature uint32, features uint64) (page [ovmf.PageSize]byte) {
	const limit = 0xffff
	segment := func(offset int, selector, attributes uint16, base uint64) {
		binary.LittleEndian.PutUint16(page[offset:], selector)
		binary.LittleEndian.PutUint16(page[offset+2:], attributes)
		binary.LittleEndian.PutUint32(page[offset+4:], limit)
		binary.LittleEndian.PutUint64(page[offset+8:], base)
	}
	put := func(offset int, v uint64) { binary.LittleEndian.PutUint64(page[offset:], v) }
	segment(0x000, 0, 0x93, 0)                           // es
	segment(0x010, 0xf000, 0x9b, uint64(eip)&0xffff0000) // cs
	segment(0x020, 0, 0x93, 0)                           // ss
	segment(0x030, 0, 0x93, 0)                           // ds
	segment(0x040, 0, 0x93, 0)                           // fs
	segment(0x050, 0, 0x93, 0)                           // gs
	segment(0x060, 0, 0, 0)                              // gdtr
	segment(0x070, 0, 0x82, 0)                           // ldtr
	segment(0x080, 0, 0, 0)                              // idtr
	segment(0x090, 0, 0x8b, 0)                           // tr
	put(0x0d0, 0x1000)                                   // efer: SVME
	put(0x148, 0x40)                                     // cr4: MCE
	put(0x158, 0x10)                                     // cr0
	put(0x160, 0x400)                                    // dr7
	put(0x168, 0xffff0ff0)                               // dr6
	put(0x170, 2)                                        // rflags
	put(0x178, uint64(eip)&0xffff)                       // rip
	put(0x268, 0x0007040600070406)                       // g_pat
	put(0x310, uint64(signature))                        // rdx
	put(0x3b0, features)                                 // sev_features
	put(0x3e8, 1)                                        // xcr0
	binary.LittleEndian.PutUint32(page[0x408:], 0x1f80)  // mxcsr
	binary.LittleEndian.PutUint16(page[0x410:], 0x037f)  // x87 fcw
	return page
}

// CPUSignature is CPUID 1 EAX of a QEMU CPU model, which is RDX of every
// VMSA. Unknown models are refused: a default would be a wrong digest.
func CPUSignature(model string) (uint32, error) {
	switch model {
	case "EPYC", "EPYC-v1", "EPYC-v2", "EPYC-v3", "EPYC-v4", "EPYC-IBPB":
		return signature(23, 1, 2), nil
	case "EPYC-Rome", "EPYC-Rome-v1", "EPYC-Rome-v2", "EPYC-Rome-v3", "EPYC-Rome-v4", "EPYC-Rome-v5":
		return signature(23, 49, 0), nil
	case "EPYC-Milan", "EPYC-Milan-v1", "EPYC-Milan-v2", "EPYC-Milan-v3":
		return signature(25, 1, 1), nil
	case "EPYC-Genoa", "EPYC-Genoa-v1", "EPYC-Genoa-v2":
		return signature(25, 17, 0), nil
	case "EPYC-Turin", "EPYC-Turin-v1":
		return signature(26, 0, 0), nil
	}
	return 0, fmt.Errorf("measuring: CPU model %q is not known; use EPYC-v4, which measures alike on every host", model)
}

// signature encodes family, model and stepping (AMD 24594, CPUID 1 EAX).
func signature(family, model, stepping uint32) uint32 {
	extFamily := uint32(0)
	if family > 15 {
		extFamily, family = family-15, 15
	}
	return extFamily<<20 | model>>4<<16 | family<<8 | model&15<<4 | stepping
}
