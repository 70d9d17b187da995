package ccmode

import (
	"context"
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
)

// Knob is one persistent 16-bit setting of the FSP. A written knob takes
// effect at the next reset.
type Knob uint16

// Knobs, numbers of NVIDIA's admin tools. AllowInBand knobs say whether the
// host may change the knob beside them; 2, 4 and 34 enable unnamed features
// that exclude CC.
const (
	feature2             Knob = 2
	feature4             Knob = 4
	CCDAllowInBand       Knob = 5
	CCD                  Knob = 6 // devtools
	CCMAllowInBand       Knob = 7
	CCM                  Knob = 8 // CC mode
	DecouplerAllowInBand Knob = 9
	Decoupler            Knob = 10 // BAR0 decoupler: 0 off, 2 on
	feature34            Knob = 34
	PPCIEAllowInBand     Knob = 44
	PPCIE                Knob = 45
)

func (k Knob) String() string {
	names := map[Knob]string{
		CCDAllowInBand: "CCD_ALLOW_INB", CCD: "CCD", CCMAllowInBand: "CCM_ALLOW_INB", CCM: "CCM",
		DecouplerAllowInBand: "BAR0_DECOUPLER_ALLOW_INB", Decoupler: "BAR0_DECOUPLER",
		PPCIEAllowInBand: "PPCIE_ALLOW_INB", PPCIE: "PPCIE",
	}
	return fmt.Sprintf("knob %d%s", uint16(k), map[bool]string{true: " (" + names[k] + ")"}[names[k] != ""])
}

// Sub-messages of PRC: id in byte 0, number of value bytes in byte 1, knob in
// the upper half.
const (
	prcRead  = 0x020c
	prcWrite = 0x020d
)

func (k Knob) message(verb uint32) uint32 { return uint32(k)<<16 | verb }

// noKnobError says that the firmware does not have the knob.
type noKnobError struct{ knob Knob }

func (e noKnobError) Error() string { return fmt.Sprintf("the firmware has no %s", e.knob) }

// readKnob returns the value that a knob has for the next reset.
func (d *Device) readKnob(ctx context.Context, k Knob) (uint16, error) {
	r, err := d.call(ctx, nvdmPRC, k.message(prcRead))
	switch {
	case err != nil:
		return 0, err
	case r.code == fspInvalidKnob:
		return 0, noKnobError{k}
	case r.code != 0:
		return 0, d.refused("reading "+k.String(), r.code)
	case len(r.payload) != 1:
		return 0, d.garbled(fmt.Errorf("value of %s has %d dwords, want 1", k, len(r.payload)))
	}
	return uint16(r.payload[0]), nil // the upper half is whatever was there before
}

func (d *Device) writeKnob(ctx context.Context, k Knob, value uint16) error {
	r, err := d.call(ctx, nvdmPRC, k.message(prcWrite), uint32(value))
	switch {
	case err != nil:
		return err
	case r.code == fspInvalidKnob:
		return noKnobError{k}
	case r.code != 0:
		return d.refused(fmt.Sprintf("setting %s to %d", k, value), r.code)
	case len(r.payload) != 0:
		return d.garbled(fmt.Errorf("answer to setting %s has %d dwords of payload, want none", k, len(r.payload)))
	}
	return nil
}

// refused is the FSP's own no: it did nothing.
func (d *Device) refused(what string, code fspCode) error {
	return contract.Refuse("gpu.fsp-refused", code.remedy(), "%s: its boot processor (FSP) refuses %s: %s", d.name, what, code)
}
