package ccmode

import (
	"context"
	"errors"
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
)

// step is one move of a staging sequence.
type step struct {
	verb  verb
	knob  Knob
	value uint16
}

type verb uint8

const (
	look   verb = iota // read and remember
	ensure             // read, write when it differs: flash wears
	settle             // write when the remembered value differs
)

// sequence is the order in which NVIDIA's tools stage a mode. It never passes
// through "devtools without CC", not even when it is undone from its middle.
func sequence(chip Chip, mode Mode) []step {
	off := func(knobs ...Knob) (steps []step) {
		for _, k := range knobs {
			steps = append(steps, step{ensure, k, 0})
		}
		return steps
	}
	features := off(feature2, feature4, feature34)
	devtools := uint16(0)
	if mode == Devtools {
		devtools = 1
	}
	cc := []step{{ensure, CCM, 1}, {ensure, CCD, devtools}}
	decoupler := step{ensure, Decoupler, decouplerFor(chip, mode)}
	switch {
	case chip == NVSwitch3 && mode == Off:
		return off(Decoupler, PPCIE)
	case mode == ProtectedPCIe:
		return slices.Concat([]step{{look, CCM, 0}}, features, off(CCD, CCM), []step{decoupler, {ensure, PPCIE, 1}})
	case chip == Hopper && mode == Off:
		return slices.Concat([]step{{look, PPCIE, 0}, decoupler}, off(CCD, CCM), []step{{settle, PPCIE, 0}})
	case chip == Hopper:
		return slices.Concat([]step{{look, PPCIE, 0}}, features, off(PPCIE), []step{decoupler}, cc)
	case mode == Off:
		return off(CCD, CCM)
	}
	return slices.Concat(features, cc)
}

// decouplerFor is the value of knob 10 that belongs to a mode where it belongs
// to modes at all, on Hopper boards: it keeps the host out of BAR0.
func decouplerFor(chip Chip, mode Mode) uint16 {
	if chip == Hopper && (mode == On || mode == ProtectedPCIe) {
		return 2
	}
	return 0
}

// change is a knob that was written, with its undo.
type change struct {
	knob   Knob
	before uint16
}

// stage writes the knobs that make mode the mode after the next reset. It
// returns what it wrote, also when it failed in the middle.
func (d *Device) stage(ctx context.Context, mode Mode) ([]change, error) {
	return d.walk(ctx, sequence(d.chip, mode))
}

// StageBAR0Firewall makes a Blackwell GPU keep the host out of BAR0 after its
// next reset, or not. On this generation it is no part of the CC mode.
func (d *Device) StageBAR0Firewall(ctx context.Context, on bool) error {
	if !d.layout.firewall {
		return contract.Refuse("gpu.mode-unsupported", "on Hopper the decoupler is part of the CC mode",
			"%s: %s has no BAR0 firewall of its own", d.name, d.chip)
	}
	value := uint16(0)
	if on {
		value = 2
	}
	_, err := d.walk(ctx, []step{{ensure, Decoupler, value}})
	return err
}

func (d *Device) walk(ctx context.Context, steps []step) (changes []change, err error) {
	known := map[Knob]uint16{}
	absent := map[Knob]bool{}
	for _, s := range steps {
		if s.verb != settle && !absent[s.knob] {
			value, err := d.readKnob(ctx, s.knob)
			if _, missing := errors.AsType[noKnobError](err); missing {
				absent[s.knob] = true
			} else if err != nil {
				return changes, err
			}
			known[s.knob] = value
		}
		switch {
		case s.verb == look || known[s.knob] == s.value:
			continue // a knob the firmware lacks is as good as 0
		case absent[s.knob] && s.knob == PPCIE:
			return changes, withoutPPCIe(d.name)
		case absent[s.knob]:
			return changes, d.refused("setting "+s.knob.String(), fspInvalidKnob)
		}
		// Noted before it is written: a write whose answer is lost may have worked.
		changes = append(changes, change{s.knob, known[s.knob]})
		if err := d.writeKnob(ctx, s.knob, s.value); err != nil {
			if contract.AsRefusal(err).Code == "gpu.fsp-refused" {
				changes = changes[:len(changes)-1]
			}
			return changes, err
		}
		known[s.knob] = s.value
	}
	return changes, nil
}

// unstage puts back what stage wrote, last first.
func (d *Device) unstage(ctx context.Context, changes []change) error {
	var errs []error
	for _, c := range slices.Backward(changes) {
		errs = append(errs, d.writeKnob(ctx, c.knob, c.before))
	}
	return errors.Join(errs...)
}
