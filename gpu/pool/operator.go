package pool

import (
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vfio"
)

// order changes a record by an operator's command: the intent is on disk when
// it returns, and Run carries it out.
func (p *Pool) order(a vfio.Address, verb string, change func(r *Record) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.devices[a]
	if d == nil {
		return notManaged(a)
	}
	r := d.rec.clone()
	if r.State == Reserved || r.State == Attached {
		return contract.Refuse(CodeInUse, "stop the guest first, or wait for its end", "%s is %s: guest %s has it; %s would take it away", a, r.State, r.Guest, verb)
	}
	if len(d.busy) > 0 && r.Step != StepNone {
		return contract.Refuse(CodeBusy, "wait until `nodeagent gpu show "+string(a)+"` shows no step, then ask again", "%s is in step %s since %s", a, r.Step, r.StepAt.UTC().Format(time.RFC3339))
	}
	if err := change(&r); err != nil {
		return err
	}
	if err := p.putLocked(r); err != nil {
		return err
	}
	p.log.Info("GPU ordered by the operator", "pci_addr", string(a), "verb", verb)
	d.finding = nil
	poke(p.wake)
	return nil
}

// Refusals of an order that conflicts with what goes on.
const (
	CodeInUse = "gpu.in-use"
	CodeBusy  = "gpu.busy"
	// CodeNotManaged refuses an order for a device that is not the agent's.
	CodeNotManaged = "gpu.not-managed"
)

// Release has a device switched off CC and given back to the driver it came
// from. It stays away until Reset. anyway gives it back even if CC cannot be
// switched off, for a device that is broken.
func (p *Pool) Release(a vfio.Address, anyway bool) error {
	return p.order(a, "release", func(r *Record) error {
		if r.State == Unmanaged && len(r.Bindings) == 0 {
			r.Duty = false // nothing was taken
			return nil
		}
		if r.State == Unmanaged { // half taken: CC was never switched on
			r.Step = StepReturn
		}
		r.Leaving, r.Anyway, r.Duty = true, anyway, false
		return nil
	})
}

// Reset has a device reset and verified, whatever it is in: out of
// quarantine, back from a release, or to look at it once more.
func (p *Pool) Reset(a vfio.Address) error {
	return p.order(a, "reset", func(r *Record) error {
		r.Duty, r.Leaving, r.Anyway = true, false, false
		if next, ok := Next(r.State, EventRecheck); ok {
			p.enter(r, next)
		}
		return nil
	})
}

// Quarantine withholds a device until Reset or Release.
func (p *Pool) Quarantine(a vfio.Address, reason string) error {
	return p.order(a, "quarantine", func(r *Record) error {
		next, ok := Next(r.State, EventFailed)
		if !ok || r.State == Unmanaged {
			return contract.Refuse("gpu.not-on-duty", "nothing to do: it is not offered", "%s is %s", a, r.State)
		}
		from := r.State
		p.enter(r, next)
		r.Leaving = false
		r.Quarantine = &Quarantine{
			At: time.Now(), From: from, Evidence: []string{reason},
			Reason: contract.Refuse("gpu.by-operator", "when its cause is gone: `nodeagent gpu reset "+string(a)+"`", "an operator withholds it: %q", reason),
		}
		return nil
	})
}
