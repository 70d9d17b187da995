package ccmode

import (
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Chip is a family of devices with the same registers. Its zero value is none.
type Chip uint8

// Chips whose mode a host can set.
const (
	Hopper       Chip = iota + 1 // GH100
	Blackwell                    // GB100, GB102, GB110, GB112
	BlackwellRTX                 // GB202, GB203, GB205, GB206, GB207
	NVSwitch3                    // the switch of HGX Hopper boards
)

func (c Chip) String() string {
	switch c {
	case Hopper:
		return "Hopper"
	case Blackwell:
		return "Blackwell"
	case BlackwellRTX:
		return "Blackwell RTX"
	case NVSwitch3:
		return "NVSwitch gen 3"
	}
	return "unknown chip"
}

// ChipOf tells the family from vendor and device id, as NVIDIA's tools do:
// it works when registers are blocked. It returns gpu.unsupported-chip for
// devices without the protocol. Whether a product may be rented out is not its
// business.
func ChipOf(vendor, device uint16) (Chip, error) {
	if vendor == vendorNVIDIA {
		for _, r := range []struct {
			first, last uint16
			chip        Chip
		}{
			{0x22a3, 0x22a3, NVSwitch3},
			{0x22f0, 0x237f, Hopper},
			{0x2900, 0x29ff, Blackwell},
			{0x3180, 0x327f, Blackwell},
			{0x2b80, 0x2bff, BlackwellRTX},
			{0x2c00, 0x2c7f, BlackwellRTX},
			{0x2d00, 0x2dff, BlackwellRTX},
			{0x2f00, 0x2f7f, BlackwellRTX},
		} {
			if device >= r.first && device <= r.last {
				return r.chip, nil
			}
		}
	}
	return 0, contract.Refuse("gpu.unsupported-chip", "name only Hopper and Blackwell GPUs and NVSwitches of HGX Hopper boards",
		"device %04x:%04x has no Confidential Computing mode that a host can set", vendor, device)
}

// Modes returns the modes the chip knows.
func (c Chip) Modes() []Mode {
	switch c {
	case Hopper:
		return []Mode{Off, On, Devtools, ProtectedPCIe}
	case Blackwell, BlackwellRTX:
		return []Mode{Off, On, Devtools}
	case NVSwitch3:
		return []Mode{Off, ProtectedPCIe}
	}
	return nil
}

// layout is what differs between chips. Offsets are in BAR0.
type layout struct {
	boot, mode   uint32
	scrub        uint32 // 0: no memory
	recovery     uint32
	bootLimit    time.Duration
	recovering   func(value uint32) bool
	faultConfig  uint16 // security fault cause in configuration space; 0: behind the DVSEC
	privRing     bool   // needs its ring initialised after open and reset
	firewall     bool   // BAR0 stays shut after a reset until the FSP opens it
	mnoc         bool   // mailbox FIFO instead of shared EMEM
	hasDecoupler bool   // CC mode includes knob 10
}

// Limits are twice those of NVIDIA's tools, which disagree with its driver.
func (c Chip) layout() layout {
	bit30 := func(value uint32) bool { return value&(1<<30) != 0 }
	blackwell := layout{
		boot: 0x0200bc, mode: 0x000590, scrub: 0x8a004c, recovery: 0x8aa128, bootLimit: 20 * time.Second,
		recovering: func(value uint32) bool { return value&0xff > 1 },
		firewall:   true, mnoc: true,
	}
	switch c {
	case Hopper:
		return layout{
			boot: 0x0200bc, mode: 0x1182cc, scrub: 0x100b20, recovery: 0x020120, bootLimit: 10 * time.Second,
			recovering: bit30, faultConfig: 0x2b4, privRing: true, hasDecoupler: true,
		}
	case NVSwitch3:
		return layout{boot: 0x0660bc, mode: 0x028c50, recovery: 0x066120, bootLimit: 10 * time.Second, recovering: bit30}
	case BlackwellRTX:
		blackwell.boot = 0xad00bc
		return blackwell
	case Blackwell:
		return blackwell
	}
	panic("ccmode: layout of " + c.String())
}
