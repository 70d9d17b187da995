package pool

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/vfio"
)

// A board of Hopper GPUs goes to one guest as a whole, with its switches.
const (
	boardSwitches = 4
	modelSwitch   = "NVSwitch"
)

// Available refuses what Reserve would refuse now: gpu.not-managed,
// gpu.none-of-model, gpu.capacity, gpu.not-settled and what gpu.Rule refuses.
func (p *Pool) Available(model string, count int) *contract.Refusal {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, refusal := p.pickLocked(model, count)
	return refusal
}

func (p *Pool) pickLocked(model string, count int) ([]vfio.Address, *contract.Refusal) {
	if r := gpu.Rule(model, count); r != nil {
		return nil, r
	}
	if !p.settled {
		return nil, contract.Refuse("gpu.not-settled", "launch again in a minute", "the node has not accounted for its GPUs yet")
	}
	var all []candidate
	for _, d := range p.devices {
		if !d.named {
			continue
		}
		r := d.rec
		if r.State == Clean && (!r.Duty || r.Leaving) {
			r.State = Unmanaged // as good as gone
		}
		all = append(all, candidate{r, d.node})
	}
	return pick(all, gpu.Canonical(model), count)
}

// Reserve promises count GPUs of a model to a guest, all or none. Reserving
// again for the same guest changes nothing. It refuses as Available does.
func (p *Pool) Reserve(guestID, model string, count int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.devices {
		if d.rec.has(guestID) {
			return nil
		}
	}
	set, refusal := p.pickLocked(model, count)
	if refusal != nil {
		return refusal
	}
	changed := make([]Record, 0, len(set))
	for _, a := range set {
		r := p.devices[a].rec.clone()
		next, _ := Next(r.State, EventReserved)
		p.enter(&r, next)
		r.Guest = guestID
		changed = append(changed, r)
	}
	return p.putLocked(changed...)
}

// candidate is a device and the NUMA node it is on, -1 where the platform does
// not tell.
type candidate struct {
	Record
	node int
}

// pick chooses a set of clean devices: GPUs of one NUMA node where one has
// enough. Pure.
func pick(all []candidate, model string, count int) ([]vfio.Address, *contract.Refusal) {
	if len(all) == 0 {
		return nil, contract.Refuse("gpu.not-managed", "choose a host that offers GPUs, or a job without", "this node manages no GPUs")
	}
	want := map[string]int{model: count}
	if gpu.WholeBoard(model, count) {
		want[modelSwitch] = boardSwitches
	}
	slices.SortFunc(all, func(a, b candidate) int { return cmp.Compare(a.Address, b.Address) })
	var set []vfio.Address
	for _, name := range []string{model, modelSwitch} {
		seen, states := 0, map[State]int{}
		var free []candidate
		for _, r := range all {
			if r.Model.Name != name {
				continue
			}
			seen++
			states[r.State]++
			if r.State == Clean {
				free = append(free, r)
			}
		}
		switch {
		case want[name] == 0:
		case seen == 0:
			return nil, contract.Refuse("gpu.none-of-model", "choose a host whose capability lists the model", "this node manages no %s", name)
		case len(free) < want[name]:
			return nil, contract.Refuse("gpu.capacity", "launch later or on another host",
				"%d × %s are asked for, %d are free (%d reserved or attached, %d being cleaned, %d quarantined)", want[name], name, len(free),
				states[Reserved]+states[Attached], states[Dirty]+states[Bound]+states[Unmanaged], states[Quarantined])
		default:
			set = append(set, fit(free, want[name])...)
		}
	}
	return set, nil
}

// fit chooses count of the free devices: those of the node that has the fewest
// of those that have enough, so that the emptier nodes keep room for larger
// sets; else the lowest addresses, neighbours on server boards. Devices of
// unknown nodes are only taken by address.
func fit(free []candidate, count int) []vfio.Address {
	nodes := map[int][]candidate{}
	for _, c := range free {
		if c.node >= 0 {
			nodes[c.node] = append(nodes[c.node], c)
		}
	}
	var best []candidate
	for _, node := range slices.Sorted(maps.Keys(nodes)) {
		if on := nodes[node]; len(on) >= count && (best == nil || len(on) < len(best)) {
			best = on
		}
	}
	if best == nil {
		best = free
	}
	set := make([]vfio.Address, 0, count)
	for _, c := range best[:count] {
		set = append(set, c.Address)
	}
	return set
}

// has says whether a guest has the device or is promised it.
func (r Record) has(guestID string) bool {
	return guestID != "" && r.Guest == guestID && (r.State == Reserved || r.State == Attached)
}

// Held returns the devices that a guest has or is promised: GPUs first, then
// switches, by address.
func (p *Pool) Held(guestID string) []Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	var held []Record
	for _, d := range p.devices {
		if d.rec.has(guestID) {
			held = append(held, d.rec.clone())
		}
	}
	slices.SortFunc(held, func(a, b Record) int {
		if aSwitch, bSwitch := a.Model.Name == modelSwitch, b.Model.Name == modelSwitch; aSwitch != bSwitch {
			if aSwitch {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.Address, b.Address)
	})
	return held
}

// modeOf is the mode a set must be in when its guest gets it.
func modeOf(set []Record) ccmode.Mode {
	if slices.ContainsFunc(set, func(r Record) bool { return r.Model.Name == modelSwitch }) {
		return ccmode.ProtectedPCIe
	}
	return ccmode.On
}

// Attach reads the mode of every reserved device back and records the set as
// the guest's, before anything is started with it. A device that is in another
// mode, or is another device, is quarantined and the launch refused; the rest
// of the set waits for Return.
func (p *Pool) Attach(ctx context.Context, guestID string) error {
	held := p.Held(guestID)
	if len(held) == 0 {
		return contract.Refuse("gpu.not-reserved", "launch again", "guest %s has no GPU reserved", guestID)
	}
	var set []*Record
	for _, r := range held {
		d, err := p.hold(ctx, r.Address)
		if err != nil {
			return err
		}
		defer d.done()
		now := p.record(d)
		if !now.has(guestID) {
			return contract.Refuse("gpu.not-reserved", "launch again", "%s is no longer reserved for guest %s, it is %s", r.Address, guestID, now.State)
		}
		if now.State == Attached {
			return nil
		}
		now.Step, now.StepAt = StepCheck, time.Now()
		set = append(set, &now)
	}
	if err := p.put(values(set)...); err != nil {
		return err
	}
	if err := p.hook("begun:" + string(StepCheck)); err != nil {
		return err
	}
	mode, base := modeOf(held), ctx
	if mode != ccmode.On {
		base = context.WithoutCancel(ctx) // a reset that is let go of leaves its device stuck
	}
	within, cancel := context.WithTimeoutCause(base, stepLimit, contract.Refuse("gpu.step-timeout", "look at the kernel log, then launch again",
		"reading the GPUs of guest %s back took longer than %s", guestID, stepLimit))
	defer cancel()
	culprit, err := p.check(within, set, mode)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if hooked := p.hook("did:" + string(StepCheck)); hooked != nil {
		return hooked
	}
	if err != nil {
		if culprit != nobody {
			if put := p.fail(set[culprit], StepCheck, err, nil); put != nil {
				return put
			}
		}
		return fmt.Errorf("reading the GPUs of guest %s back: %w", guestID, err)
	}
	for _, r := range set {
		next, _ := Next(r.State, EventAttached)
		p.enter(r, next)
	}
	if err := p.put(values(set)...); err != nil {
		return err
	}
	return p.hook("done:" + string(StepCheck))
}

func values(set []*Record) []Record {
	all := make([]Record, 0, len(set))
	for _, r := range set {
		all = append(all, *r)
	}
	return all
}

// Guests are those that have a device or are promised one.
func (p *Pool) Guests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := map[string]bool{}
	for _, d := range p.devices {
		if d.rec.has(d.rec.Guest) {
			ids[d.rec.Guest] = true
		}
	}
	return slices.Sorted(maps.Keys(ids))
}

// Abandon takes back what a guest has that is gone, and leaves it to Run to
// reset and verify it. A reservation that never came near the device ends at
// once.
func (p *Pool) Abandon(guestID string) error {
	_, err := p.takeBack(guestID)
	poke(p.wake)
	return err
}

// Return takes back what a guest has: its domain is gone. Each device is reset
// and verified; Return ends when each is clean or quarantined.
func (p *Pool) Return(ctx context.Context, guestID string) error {
	mine, err := p.takeBack(guestID)
	if err != nil {
		return err
	}
	for _, a := range mine {
		if err := p.work(ctx, a); err != nil {
			return err
		}
	}
	return nil
}

// takeBack returns also what was taken back before and is not clean yet.
func (p *Pool) takeBack(guestID string) ([]vfio.Address, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var mine []vfio.Address
	var changed []Record
	for a, d := range p.devices {
		r := d.rec.clone()
		if r.Guest != guestID || guestID == "" {
			continue
		}
		event := EventReturned
		if r.State == Reserved && r.Step == StepNone {
			event = EventCancelled
		}
		mine = append(mine, a)
		if next, ok := Next(r.State, event); ok {
			p.enter(&r, next)
			changed = append(changed, r)
		}
	}
	slices.Sort(mine)
	return mine, p.putLocked(changed...)
}
