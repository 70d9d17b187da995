package pool

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/vfio"
)

// work takes a device from step to step until nothing is due. An error means
// that the records could not be written or that ctx ended; what is wrong with
// the device is in its record.
func (p *Pool) work(ctx context.Context, a vfio.Address) error {
	d, err := p.hold(ctx, a)
	if err != nil {
		return err
	}
	defer d.done()
	for {
		r, s, err := p.begin(d)
		if err != nil || s == StepNone {
			return err
		}
		later, err := p.take(ctx, d, r, s)
		if err != nil || later {
			return err
		}
	}
}

// begin puts the step that is due on record. It looks and writes in one piece,
// so that no order comes between.
func (p *Pool) begin(d *device) (Record, Step, error) {
	var bindings []vfio.Binding
	if r := p.record(d); due(r) == StepBind && len(r.Bindings) == 0 {
		var err error
		if bindings, err = p.plan(r.Address); err != nil {
			p.find(d, err)
			return r, StepNone, nil
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	r := d.rec.clone()
	s := due(r)
	if s == StepBind && len(r.Bindings) == 0 {
		r.Bindings = bindings
	}
	if s == StepNone || (s == StepBind && len(r.Bindings) == 0) {
		return r, StepNone, nil
	}
	r.Step, r.StepAt, r.BootID = s, time.Now(), p.c.BootID
	return r, s, p.putLocked(r)
}

// take takes a step that is on record: effect, record. later says that it
// must be tried again when something outside the device has changed.
func (p *Pool) take(ctx context.Context, d *device, r Record, s Step) (later bool, err error) {
	if err := p.hook("begun:" + string(s)); err != nil {
		return false, err
	}
	within, cancel := context.WithTimeoutCause(ctx, stepLimit, contract.Refuse("gpu.step-timeout",
		"look at the kernel log, then `nodeagent gpu reset "+string(r.Address)+"`; if it repeats, power the host off and on",
		"%s: step %s took longer than %s", r.Address, s, stepLimit))
	defer cancel()
	began := time.Now()
	evidence, err := p.effect(within, &r, s)
	if ctx.Err() != nil {
		return false, ctx.Err() // the step stays on record, the next run takes it again
	}
	if hooked := p.hook("did:" + string(s)); hooked != nil {
		return false, hooked
	}
	switch {
	case err != nil && outside(err) && r.Quarantine == nil:
		p.find(d, err)
		if s == StepBind { // and was given back: next time it may be on another driver
			r.Step, r.Bindings = StepNone, nil
			return true, p.put(r)
		}
		return true, nil
	case err != nil:
		err = p.fail(&r, s, err, evidence)
	default:
		p.find(d, nil)
		err = p.advance(&r, s, time.Since(began))
	}
	if err != nil {
		return false, err
	}
	return false, p.hook("done:" + string(s))
}

// outside are failures that say nothing about the device: somebody uses it,
// or a driver is not loaded.
func outside(err error) bool {
	return slices.Contains([]string{"vfio.in-use", "vfio.no-driver", "vfio.not-root"}, contract.AsRefusal(err).Code)
}

// find notes what keeps a device from going on; nil clears it.
func (p *Pool) find(d *device, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := d.finding
	d.finding = nil
	if err == nil {
		return
	}
	d.finding = contract.AsRefusal(err)
	if before == nil || before.Code != d.finding.Code {
		p.log.Warn("a GPU cannot be taken on yet", "pci_addr", string(d.rec.Address), "code", d.finding.Code, "err", err, "remedy", d.finding.Remedy)
	}
}

// plan notes what a device and its companions are now.
func (p *Pool) plan(a vfio.Address) ([]vfio.Binding, error) {
	all, err := p.d.Host.Functions()
	at := slices.IndexFunc(all, func(f vfio.Function) bool { return f.Address == a })
	if at < 0 {
		_, missing := p.d.Host.Function(a)
		return nil, errors.Join(missing, err)
	}
	companions, err := vfio.Companions(all[at], all)
	if err != nil {
		return nil, err
	}
	var bindings []vfio.Binding
	for _, f := range append([]vfio.Function{all[at]}, companions...) {
		b, err := p.d.Host.Plan(f.Address)
		if err != nil {
			return nil, err
		}
		bindings = append(bindings, b)
	}
	return bindings, nil
}

// effect does a step and changes of the record only what it saw.
func (p *Pool) effect(ctx context.Context, r *Record, s Step) ([]string, error) {
	switch s {
	case StepBind:
		return nil, p.bind(ctx, r)
	case StepVerify:
		// Bound already as a rule; not after a reboot.
		if err := p.bindAll(ctx, r); err != nil {
			return nil, err
		}
		chip, err := r.chip()
		if err != nil {
			return nil, err
		}
		return p.verify(ctx, r, idle(chip))
	case StepOff:
		if len(r.Bindings) == 0 {
			return nil, nil
		}
		if err := p.bindAll(ctx, r); err != nil {
			return nil, err
		}
		return p.off(ctx, r)
	case StepReturn:
		return nil, p.giveBack(ctx, r)
	case StepCheck, StepNone:
	}
	return nil, errors.New("a step that is nobody's by itself: " + string(s))
}

// bind takes a device over, or leaves it as it was: never half.
func (p *Pool) bind(ctx context.Context, r *Record) error {
	err := p.bindAll(ctx, r)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return errors.Join(err, p.giveBack(ctx, r))
}

func (p *Pool) bindAll(ctx context.Context, r *Record) error {
	// Companions first: while the device is its old driver's, so is the group.
	for i, b := range slices.Backward(r.Bindings) {
		if err := p.d.Host.Bind(ctx, b); err != nil {
			return err
		}
		if i > 0 || r.Step == StepBind {
			if err := p.hook("inside:" + string(r.Step)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *Pool) giveBack(ctx context.Context, r *Record) error {
	for _, b := range r.Bindings {
		if err := p.d.Host.GiveBack(ctx, b); err != nil {
			return err
		}
		if r.Step == StepReturn {
			if err := p.hook("inside:" + string(r.Step)); err != nil {
				return err
			}
		}
	}
	return nil
}

// advance records a step's success.
func (p *Pool) advance(r *Record, s Step, took time.Duration) error {
	event := map[Step]Event{StepBind: EventBound, StepVerify: EventVerified, StepReturn: EventReleased}[s]
	if s == StepOff {
		r.Step = StepReturn // CC is off: what is left is the way back
		return p.put(*r)
	}
	next, ok := Next(r.State, event)
	if !ok {
		return errors.New("gpu " + string(r.Address) + ": no " + string(event) + " from " + string(r.State))
	}
	p.enter(r, next)
	if next == Unmanaged {
		r.Leaving, r.Anyway, r.Duty, r.Bindings, r.Mode, r.PDI, r.FSP = false, false, false, nil, ccmode.Unknown, "", ""
	}
	p.log.Info("GPU moved on", "pci_addr", string(r.Address), "state", string(next), "mode", r.Mode.String(), "step", string(s), "took", took.Round(time.Millisecond).String())
	return p.put(*r)
}

// fail quarantines a device, or lets one go all the same that an operator
// wants back whatever it is in.
func (p *Pool) fail(r *Record, s Step, why error, evidence []string) error {
	if s == StepOff && r.Anyway {
		p.log.Warn("CC could not be switched off, the GPU goes back all the same, as was asked", "pci_addr", string(r.Address), "err", why)
		r.Step = StepReturn
		return p.put(*r)
	}
	q := &Quarantine{Reason: contract.AsRefusal(why), At: time.Now(), From: r.State, Step: s, Guest: r.Guest, Evidence: evidence}
	if len(q.Evidence) == 0 {
		q.Evidence = []string{why.Error()}
	}
	if next, ok := Next(r.State, EventFailed); ok {
		p.enter(r, next)
	}
	r.Quarantine, r.Leaving, r.Anyway, r.Step = q, false, false, StepNone
	p.log.Error("GPU quarantined", "pci_addr", string(r.Address), "code", q.Reason.Code, "step", string(s), "err", why, "remedy", q.Reason.Remedy)
	return p.put(*r)
}
