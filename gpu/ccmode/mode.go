package ccmode

import (
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
)

// Mode is a Confidential Computing mode. Its zero value is "unknown", which is
// never settable and never good enough.
type Mode uint8

// Modes. Devtools looks like CC to the guest and protects nothing; a host must
// not rent it out. ProtectedPCIe is the multi-GPU mode of HGX Hopper boards:
// all eight GPUs and all four switches of the board are in it, or none.
const (
	Unknown Mode = iota
	Off
	On
	Devtools
	ProtectedPCIe
)

func (m Mode) String() string {
	return [...]string{"unknown", "off", "on", "devtools", "ppcie"}[m]
}

// ParseMode reads the name of a mode that can be set.
func ParseMode(name string) (Mode, error) {
	for _, m := range []Mode{Off, On, Devtools, ProtectedPCIe} {
		if m.String() == name {
			return m, nil
		}
	}
	return Unknown, fmt.Errorf("CC mode %q: want off, on, devtools or ppcie", name)
}

// MarshalText encodes the mode by its name.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText decodes a mode's name, "unknown" too.
func (m *Mode) UnmarshalText(text []byte) (err error) {
	if string(text) == Unknown.String() {
		*m = Unknown
		return nil
	}
	*m, err = ParseMode(string(text))
	return err
}

// Active is what a device is in since its last reset.
type Active struct {
	Mode Mode `json:"mode"`
	// Register is the raw status the rest was decoded from.
	Register uint32 `json:"register"`
	// BAR0Firewall and NVLinkEncryption exist on Blackwell only.
	BAR0Firewall     bool `json:"bar0_firewall"`
	NVLinkEncryption bool `json:"nvlink_encryption"`
}

// decodeActive reads the mode register. A combination that is no mode is
// Unknown: devtools without CC, CC and PPCIe at once, other multi-GPU modes.
func decodeActive(chip Chip, register uint32) Active {
	a := Active{Register: register}
	cc, multi := register&3, uint32(0)
	switch chip {
	case Hopper:
		multi = register >> 5 & 3
	case NVSwitch3:
		cc, multi = 0, register&1
	case Blackwell, BlackwellRTX:
		a.BAR0Firewall = register&(1<<2) != 0
		a.NVLinkEncryption = chip == Blackwell && register&(1<<6) != 0
	}
	switch [2]uint32{cc, multi} {
	case [2]uint32{0, 0}:
		a.Mode = Off
	case [2]uint32{1, 0}:
		a.Mode = On
	case [2]uint32{3, 0}:
		a.Mode = Devtools
	case [2]uint32{0, 1}:
		a.Mode = ProtectedPCIe
	}
	return a
}

// Staged is what a device will be in after its next reset.
type Staged struct {
	Mode Mode `json:"mode"`
	// Knobs are the raw values behind it; knobs the firmware does not have are absent.
	Knobs map[Knob]uint16 `json:"knobs"`
}

// Has tells whether the firmware has the knob.
func (s Staged) Has(k Knob) bool {
	_, ok := s.Knobs[k]
	return ok
}

// decodeStaged tells the mode from knobs.
func decodeStaged(knobs map[Knob]uint16) Staged {
	s := Staged{Knobs: knobs}
	switch [3]uint16{knobs[CCM], knobs[CCD], knobs[PPCIE]} {
	case [3]uint16{0, 0, 0}:
		s.Mode = Off
	case [3]uint16{1, 0, 0}:
		s.Mode = On
	case [3]uint16{1, 1, 0}:
		s.Mode = Devtools
	case [3]uint16{0, 0, 1}:
		s.Mode = ProtectedPCIe
	}
	return s
}

// Status is all a device says about its modes.
type Status struct {
	Chip   Chip   `json:"-"`
	Active Active `json:"active"`
	Staged Staged `json:"staged"`
	// FSPVersion is the major and minor version of the boot processor's firmware.
	FSPVersion string `json:"fsp_version"`
}

// InBand returns nil when the host may change the knobs that mode m needs,
// otherwise gpu.in-band-disabled or gpu.firmware-without-ppcie.
func (s Status) InBand(name string, m Mode) error {
	if m == ProtectedPCIe && !s.Staged.Has(PPCIE) {
		return withoutPPCIe(name)
	}
	for _, permit := range []struct {
		knob   Knob
		needed bool
	}{
		{CCMAllowInBand, s.Chip != NVSwitch3},
		{CCDAllowInBand, m == Devtools},
		{DecouplerAllowInBand, s.Chip == Hopper},
		{PPCIEAllowInBand, m == ProtectedPCIe || s.Staged.Knobs[PPCIE] != 0},
	} {
		if permit.needed && s.Staged.Has(permit.knob) && s.Staged.Knobs[permit.knob] == 0 {
			return inBandDisabled(name, permit.knob)
		}
	}
	return nil
}

func withoutPPCIe(name string) *contract.Refusal {
	return contract.Refuse("gpu.firmware-without-ppcie", "update the HGX firmware bundle to 1.7.0 or newer",
		"%s: its firmware knows no Protected PCIe (knob %d)", name, uint16(PPCIE))
}

func inBandDisabled(name string, k Knob) *contract.Refusal {
	return contract.Refuse("gpu.in-band-disabled",
		"enable in-band control of Confidential Computing in the BMC (Redfish or SMBPBI), or set the mode there",
		"%s: the host may not change its mode, %s is 0", name, k)
}
