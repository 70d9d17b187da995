package ccmode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Outcome is what Apply did to one device.
type Outcome struct {
	Name          string        `json:"name"`
	Before, After Active        `json:"-"`
	Changed       bool          `json:"changed"` // knobs were written or the device was reset
	Took          time.Duration `json:"took_ns"`
}

// budget bounds the switch of one device: the kernel alone may wait a minute
// for a device that does not come back from its reset.
const budget = 2 * time.Minute

// switching is one device on its way.
type switching struct {
	*Device
	changes []change
	reset   bool
	outcome Outcome
}

// Apply brings all devices into mode or fails as a whole: it stages on every
// device, resets every device, waits for all, and reads every mode back. A
// failure while staging undoes what was staged. After a failure later on the
// devices are in no mode anybody may rely on, and the caller quarantines them.
// Devices already in the mode, now and after the next reset, are not touched.
//
// Errors, besides those of Device: gpu.mode-unsupported,
// gpu.in-band-disabled, gpu.firmware-without-ppcie, gpu.fsp-refused,
// gpu.mode-mismatch, gpu.switch-timeout.
func Apply(ctx context.Context, mode Mode, devices ...*Device) ([]Outcome, error) {
	for _, d := range devices {
		if !slices.Contains(d.chip.Modes(), mode) {
			return nil, contract.Refuse("gpu.mode-unsupported", fmt.Sprintf("%s knows %v", d.chip, d.chip.Modes()),
				"%s: %s has no mode %q", d.name, d.chip, mode)
		}
	}
	limit := budget * time.Duration(len(devices))
	ctx, cancel := context.WithTimeoutCause(ctx, limit, contract.Refuse("gpu.switch-timeout",
		"look which device is slow with `nodeagent gpu list`; reset it, or power the host off and on",
		"switching %d devices to %s took longer than %s", len(devices), mode, limit))
	defer cancel()

	set := make([]*switching, len(devices))
	for i, d := range devices {
		set[i] = &switching{Device: d, outcome: Outcome{Name: d.name}}
	}
	if err := stageAll(ctx, mode, set); err != nil {
		return nil, err
	}
	for _, s := range set { // one after the other: a board's supply feels eight at once
		if s.reset {
			if err := s.Function.Reset(ctx); err != nil {
				return nil, s.resetError(ctx, err)
			}
			s.opened, s.silent = false, nil
		}
	}
	return verifyAll(ctx, mode, set)
}

// stageAll stages the mode on every device, or on none.
func stageAll(ctx context.Context, mode Mode, set []*switching) error {
	for i, s := range set {
		err := s.prepare(ctx, mode)
		if err == nil {
			continue
		}
		// Undone also when ctx has ended, but not for ever.
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), budget)
		defer cancel()
		for _, staged := range slices.Backward(set[:i+1]) {
			if back := staged.unstage(undo, staged.changes); back != nil {
				return contract.Refuse("gpu.half-staged",
					"set the mode again before the device's next reset, or reset it and set the mode then",
					"%s: staging %s failed and could not be undone", staged.name, mode).Because(errors.Join(err, back))
			}
		}
		return err
	}
	return nil
}

// prepare looks at one device and stages the mode where it is not in force.
func (s *switching) prepare(ctx context.Context, mode Mode) (err error) {
	start := time.Now()
	defer func() { s.outcome.Took += time.Since(start) }()
	s.outcome.Before, err = s.Active(ctx)
	if err != nil && contract.AsRefusal(err).Code != "gpu.boot-timeout" {
		return err
	}
	// A device that did not boot may still take knobs, and a reset may cure it.
	staged, err := s.Staged(ctx)
	if err != nil {
		return err
	}
	settled := staged.Mode == mode && (s.chip != Hopper || staged.Knobs[Decoupler] == decouplerFor(s.chip, mode))
	if settled {
		s.reset = s.outcome.Before.Mode != mode
		s.outcome.Changed = s.reset
		return nil
	}
	if err := (Status{Chip: s.chip, Staged: staged}).InBand(s.name, mode); err != nil {
		return err
	}
	s.reset, s.outcome.Changed = true, true
	s.changes, err = s.stage(ctx, mode)
	return err
}

// verifyAll waits for all devices at once and reads their modes back.
func verifyAll(ctx context.Context, mode Mode, set []*switching) ([]Outcome, error) {
	outcomes := make([]Outcome, len(set))
	errs := make([]error, len(set))
	var group sync.WaitGroup
	for i, s := range set {
		group.Go(func() {
			start := time.Now()
			s.outcome.After, errs[i] = s.Active(ctx)
			s.outcome.Took += time.Since(start)
			if after := s.outcome.After; errs[i] == nil && after.Mode != mode {
				errs[i] = contract.Refuse("gpu.mode-mismatch", "quarantine the device, reset it and set the mode again; if it repeats, update its firmware",
					"%s is in mode %s after its reset, want %s (register %#x)", s.name, after.Mode, mode, after.Register)
			}
			outcomes[i] = s.outcome
		})
	}
	group.Wait()
	return outcomes, errors.Join(errs...)
}
