package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vfio"
)

// Records is the disk. A nil error means that it survives a power failure.
type Records interface {
	GPUs() ([]Record, error)
	// PutGPUs stores all of them or none.
	PutGPUs(records ...Record) error
	DeleteGPU(a vfio.Address) error
}

// Deps are what a Pool is made of.
type Deps struct {
	Records Records
	Host    vfio.Host
	System  vfio.System
	// UUIDs, if set, asks the nvidia driver for the names of its devices.
	UUIDs  func() map[string]vfio.Address
	Logger hclog.Logger
	// Hook, if set, is called before, inside and after every effect. Tests end
	// the agent there.
	Hook func(point string) error
}

// Config is how a Pool works.
type Config struct {
	// Manage are addresses, UUIDs, or AllCapable alone.
	Manage []string
	BootID string
}

// retryEvery is how often what could not be done for a reason outside the
// device is tried again.
const retryEvery = time.Minute

// Pool is the devices of this host.
type Pool struct {
	d    Deps
	c    Config
	log  hclog.Logger
	wake chan struct{}

	mu       sync.Mutex
	devices  map[vfio.Address]*device
	problems []Problem
	settled  bool // guests of an earlier run were accounted for
	changed  chan struct{}
}

// device is one record and who works on it.
type device struct {
	busy    chan struct{} // holds one token
	rec     Record        // as on disk
	named   bool          // by the configuration
	node    int           // NUMA node, vfio.Function's
	finding *contract.Refusal
}

// New reads the records and the host. It changes nothing on either. What the
// configuration names and cannot be had is a problem, not an error.
func New(d Deps, c Config) (*Pool, error) {
	if d.Records == nil || d.Host.Writer == nil || d.System == nil || d.Logger == nil || c.BootID == "" {
		return nil, errors.New("making GPU pool: a dependency is missing")
	}
	p := &Pool{d: d, c: c, log: d.Logger.Named("gpu"), wake: make(chan struct{}, 1), changed: make(chan struct{}), devices: map[vfio.Address]*device{}}
	records, err := d.Records.GPUs()
	if err != nil {
		return nil, fmt.Errorf("reading GPU records: %w", err)
	}
	for _, r := range records {
		p.devices[r.Address] = newDevice(r)
	}
	if len(records) == 0 && len(c.Manage) == 0 {
		return p, nil // a host without GPUs need not have a readable bus
	}
	p.look()
	return p, nil
}

func newDevice(r Record) *device { return &device{busy: make(chan struct{}, 1), rec: r, node: -1} }

// look compares the configuration with the bus.
func (p *Pool) look() {
	functions, err := p.d.Host.Functions()
	uuids := map[string]vfio.Address{}
	if p.d.UUIDs != nil {
		maps.Copy(uuids, p.d.UUIDs())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for a, d := range p.devices {
		if d.rec.UUID != "" {
			uuids[d.rec.UUID] = a
		}
	}
	managed := func(a vfio.Address) bool {
		d := p.devices[a]
		return d != nil && len(d.rec.Bindings) > 0
	}
	s := choose(p.c.Manage, functions, uuids, managed)
	p.problems = s.problems
	if err != nil {
		p.problems = append(p.problems, Problem{"PCI", contract.AsRefusal(err)})
	}
	for a, model := range s.chosen {
		if p.devices[a] == nil {
			p.devices[a] = newDevice(Record{Address: a, Model: model, State: Unmanaged, Since: time.Now(), Duty: true, BootID: p.c.BootID})
		}
		p.devices[a].named = true
	}
	for _, f := range functions {
		if d := p.devices[f.Address]; d != nil {
			d.node = f.NUMANode
		}
	}
	for uuid, a := range uuids {
		if d := p.devices[a]; d != nil && d.rec.UUID == "" {
			d.rec.UUID = uuid
		}
	}
}

// Settle accounts for guests of an earlier run: a device stays with a guest
// that is kept, and is dirty otherwise. It is called once, before Run works;
// nothing is reserved before.
func (p *Pool) Settle(keep func(guestID string) bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var changed []Record
	for a, d := range p.devices {
		if !d.named && d.rec.State == Unmanaged && len(d.rec.Bindings) == 0 {
			if err := p.d.Records.DeleteGPU(a); err != nil {
				return fmt.Errorf("forgetting GPU %s: %w", a, err)
			}
			delete(p.devices, a) // neither ours nor asked for
			continue
		}
		event := Event("")
		rebooted := d.rec.BootID != p.c.BootID
		switch r := d.rec; {
		case (r.State == Reserved || r.State == Attached) && (rebooted || !keep(r.Guest)):
			event = EventReturned
		case r.Leaving: // goes on where it was
		case r.State == Bound, r.State == Clean:
			event = EventRecheck
		}
		if next, ok := Next(d.rec.State, event); ok {
			r := d.rec.clone()
			p.enter(&r, next)
			changed = append(changed, r)
		}
	}
	if err := p.putLocked(changed...); err != nil {
		return err
	}
	p.settled = true
	poke(p.wake)
	return nil
}

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// enter moves a record into a state.
func (p *Pool) enter(r *Record, s State) {
	r.State, r.Since, r.BootID = s, time.Now(), p.c.BootID
	r.Step = StepNone
	if s != Reserved && s != Attached && s != Dirty {
		r.Guest = ""
	}
	if s != Quarantined {
		r.Quarantine = nil
	}
}

// putLocked stores records, on disk first.
func (p *Pool) putLocked(records ...Record) error {
	if len(records) == 0 {
		return nil
	}
	if err := p.d.Records.PutGPUs(records...); err != nil {
		return fmt.Errorf("recording GPUs: %w", err)
	}
	for _, r := range records {
		p.devices[r.Address].rec = r.clone()
	}
	close(p.changed)
	p.changed = make(chan struct{})
	return nil
}

func (p *Pool) put(records ...Record) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.putLocked(records...)
}

// Changed is closed at the next change of any device.
func (p *Pool) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

func (p *Pool) hook(point string) error {
	if p.d.Hook == nil {
		return nil
	}
	return p.d.Hook(point)
}

// Run brings the devices to where they belong until ctx ends: one after the
// other, because a board's supply feels eight resets at once. It waits for
// Settle.
func (p *Pool) Run(ctx context.Context) error {
	for {
		p.mu.Lock()
		settled := p.settled
		p.mu.Unlock()
		if settled {
			p.drift()
			for _, a := range p.addresses(func(*device) bool { return true }) {
				if err := p.work(ctx, a); err != nil && ctx.Err() == nil {
					p.log.Error("a GPU's work could not be recorded; it is tried again", "pci_addr", string(a), "err", err)
				}
			}
		}
		timer := time.NewTimer(retryEvery)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-p.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// drift sends a clean device to be verified that is no longer where it was
// left: unplugged, or on another driver.
func (p *Pool) drift() {
	for _, a := range p.addresses(func(d *device) bool { return d.rec.State == Clean && !d.rec.Leaving }) {
		f, err := p.d.Host.Function(a)
		if err == nil && f.Bound() {
			continue
		}
		p.log.Warn("a GPU was taken away, it is verified before it is offered again", "pci_addr", string(a), "driver", f.Driver, "err", err)
		if err := p.suspect(a); err != nil {
			p.log.Error("it could not be recorded", "pci_addr", string(a), "err", err)
		}
	}
}

// suspect makes a clean device dirty.
func (p *Pool) suspect(a vfio.Address) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.devices[a].rec.clone()
	next, ok := Next(r.State, EventRecheck)
	if !ok || r.State != Clean {
		return nil // reserved meanwhile: it is read back before a guest gets it
	}
	p.enter(&r, next)
	return p.putLocked(r)
}

// addresses returns the devices that match, in order.
func (p *Pool) addresses(match func(*device) bool) []vfio.Address {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []vfio.Address
	for a, d := range p.devices {
		if match(d) {
			all = append(all, a)
		}
	}
	slices.Sort(all)
	return all
}

// hold takes the device's token.
func (p *Pool) hold(ctx context.Context, a vfio.Address) (*device, error) {
	p.mu.Lock()
	d := p.devices[a]
	p.mu.Unlock()
	if d == nil {
		return nil, notManaged(a)
	}
	select {
	case d.busy <- struct{}{}:
		return d, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func notManaged(a vfio.Address) *contract.Refusal {
	return contract.Refuse(CodeNotManaged, "name it in gpu.manage of the configuration and restart the agent; `nodeagent gpu list` shows what is managed",
		"the agent does not manage %s", a)
}

func (d *device) done() { <-d.busy }

func (p *Pool) record(d *device) Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return d.rec.clone()
}

// View is one device as it is now.
type View struct {
	Record
	// Named says that the configuration has it.
	Named bool
	// Finding is what keeps it from going on.
	Finding *contract.Refusal
}

// Snapshot returns the devices by address, and what the configuration names
// and cannot be had.
func (p *Pool) Snapshot() ([]View, []Problem) {
	p.mu.Lock()
	defer p.mu.Unlock()
	views := make([]View, 0, len(p.devices))
	for _, d := range p.devices {
		views = append(views, View{d.rec.clone(), d.named, d.finding})
	}
	slices.SortFunc(views, func(a, b View) int { return cmp.Compare(a.Address, b.Address) })
	return views, slices.Clone(p.problems)
}
