package lifecycle

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
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/nodeagent/supervise"
	"github.com/confidential-node/agent/vm"
)

// Log keys.
const (
	keyGuest   = "guest_id"
	keyCommand = "command_id"
	keyCode    = "code"
	keyRemedy  = "remedy"
	keyError   = "err"
)

// forgetEvery is how often guests that ended long ago are forgotten.
const forgetEvery = time.Hour

// holdPause is how often something that is left alone is looked at again.
const holdPause = 30 * time.Second

// Manager runs the guests of this host.
type Manager struct {
	d       Deps
	c       Config
	log     hclog.Logger
	domains domains
	ready   chan struct{} // closed when Reconcile has decided
	// changed has a value when a domain changed that is no guest's.
	changed chan struct{}

	// admission has a value while a launch is judged and recorded, or what
	// guests left is swept.
	admission chan struct{}

	// forwarding is held while the host's IPv4 forwarding is changed.
	forwarding sync.Mutex

	mu          sync.Mutex
	group       *supervise.Group
	guests      map[string]*guest // that have not ended
	unaccounted []vm.Observed
}

// New makes a manager. Nothing happens before Run.
func New(d Deps, c Config) (*Manager, error) {
	if d.Records == nil || d.Hypervisor == nil || d.Network == nil || d.Metadata == nil || d.Blobs == nil || d.Spools == nil ||
		d.Images == nil || d.Measure == nil || d.Headroom == nil || d.TEE == nil || d.GPURule == nil || d.Endorsements == nil || d.Logger == nil || d.Clock == nil {
		return nil, errors.New("making life cycle: a dependency is missing")
	}
	if !api.ValidHostID(c.HostID) || c.GuestsDir == "" || !c.Network.GuestCIDR.IsValid() {
		return nil, errors.New("making life cycle: host id, guests' folder and addresses are required")
	}
	return &Manager{
		d: d, c: c.withDefaults(), log: d.Logger.Named("lifecycle"), domains: domains{ask: d.Hypervisor.List},
		ready: make(chan struct{}), changed: make(chan struct{}, 1), admission: make(chan struct{}, 1), guests: map[string]*guest{},
	}, nil
}

// now is for whoever reads it later, instant for what ends by it.
func (m *Manager) now() time.Time         { return m.d.Clock().Wall }
func (m *Manager) instant() clock.Instant { return m.d.Clock() }

// turned says that guests and domains are still compared.
func (m *Manager) turned() {
	if m.d.Turned != nil {
		m.d.Turned()
	}
}

// hook is a point where what goes on may fail.
func (m *Manager) hook(point string) error {
	if m.d.Hook == nil {
		return nil
	}
	return m.d.Hook(point)
}

// mark is a point where the agent may die, and where nothing is left to fail.
func (m *Manager) mark(point string) {
	if err := m.hook(point); err != nil {
		panic("nothing fails at " + point + ": " + err.Error())
	}
}

// Ready is closed when every guest of an earlier run was decided on. Commands
// wait for it.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

// Run reconciles and then looks after the guests until ctx ends. It ends no
// guest: what runs goes on running and is found again by the next Run. It is
// called once.
func (m *Manager) Run(ctx context.Context) error {
	group := supervise.New(ctx, m.log)
	m.mu.Lock()
	m.group = group
	m.mu.Unlock()
	events, cancel := m.d.Hypervisor.Subscribe()
	defer cancel()
	group.Go("hypervisor events", func(ctx context.Context) error { return m.dispatch(ctx, events) })
	group.Go("reconcile", m.reconcile)
	group.Go("forget", m.forget)
	return group.Wait()
}

// dispatch wakes guests whose domain changed, and the survey for domains of
// nobody. They look for themselves: events may be lost.
func (m *Manager) dispatch(ctx context.Context, events <-chan vm.Event) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-events:
			known := false
			for _, g := range m.live() {
				if e.GuestID == "" || e.GuestID == g.id {
					g.ended(e)
					g.poke()
					known = e.GuestID != ""
				}
			}
			if !known {
				poke(m.changed)
			}
		}
	}
}

// live returns the guests that have not ended, by id.
func (m *Manager) live() []*guest {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.guests), func(a, b *guest) int { return cmp.Compare(a.id, b.id) })
}

func (m *Manager) guest(id string) *guest {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.guests[id]
}

// reconcile finds out what an earlier run left, and gives each guest its
// goroutine. It waits for the hypervisor for as long as it is silent.
func (m *Manager) reconcile(ctx context.Context) error {
	observed, err := m.firstLook(ctx)
	if err != nil {
		return err
	}
	records, err := m.d.Records.Guests()
	if err != nil {
		return fmt.Errorf("reading guests: %w", err)
	}
	var live []store.Guest
	var nics []network.Guest
	accounted := map[string]bool{}
	for _, r := range records {
		s := stageOf(r)
		if s == stageEnded {
			continue
		}
		live, accounted[r.ID] = append(live, r), true
		present := slices.ContainsFunc(observed, func(o vm.Observed) bool { return o.GuestID == r.ID })
		if present && (s == stageStarting || s == stageStarted) {
			nics = append(nics, m.c.nic(r))
		}
	}
	strangers := slices.DeleteFunc(slices.Clone(observed), func(o vm.Observed) bool { return accounted[o.GuestID] })
	m.report(strangers)
	if err := m.settleGPUs(accounted, strangers); err != nil {
		return err
	}
	// All at once: a network that knows only some of its guests would cut the
	// others off meanwhile. Each guest asks for its own again.
	adopted := map[string]bool{}
	if len(nics) > 0 {
		if err := m.d.Network.Adopt(ctx, nics); err == nil {
			for _, n := range nics {
				adopted[n.ID] = true
			}
		} else {
			m.log.Warn("the guests' network could not be adopted at once, each guest's is tried again", keyError, err)
		}
	}
	for _, r := range live {
		g := newGuest(m, r, false)
		if adopted[r.ID] {
			g.reroute(ctx) // before Ready, when clients are let in
		}
		m.begin(g)
	}
	m.returnForwarding()
	m.log.Info("reconciled", "guests", len(live), "unaccounted", len(strangers))
	close(m.ready)
	m.restart("survey", m.survey)
	return nil
}

// firstLook asks the hypervisor until it answers.
func (m *Manager) firstLook(ctx context.Context) ([]vm.Observed, error) {
	for wait := m.c.Retry; ; wait = min(2*wait, 30*m.c.Retry) {
		m.turned()
		observed, err := m.domains.list(ctx)
		if err == nil {
			return observed, nil
		}
		m.log.Warn("the hypervisor does not answer, nothing is decided; see that libvirtd (or virtqemud) runs", "pause", wait.String(), keyError, err)
		if err := m.pause(ctx, nil, wait); err != nil {
			return nil, err
		}
	}
}

// pause waits for a time, a wake-up or the end.
func (m *Manager) pause(ctx context.Context, wake <-chan struct{}, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-wake:
	case <-timer.C:
	}
	return nil
}

// by returns a context whose cause is context.DeadlineExceeded once it is at.
// It looks at the clock meanwhile: timers stand still while the host is
// suspended.
func (m *Manager) by(ctx context.Context, at clock.Instant) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancelCause(ctx)
	m.mu.Lock()
	group := m.group
	m.mu.Unlock()
	group.Go("deadline", func(context.Context) error {
		for left := at.Sub(m.instant()); left > 0; left = at.Sub(m.instant()) {
			if m.pause(ctx, nil, min(left, m.c.Poll)) != nil {
				return nil //nolint:nilerr // nobody waits for it any more
			}
		}
		end(context.DeadlineExceeded)
		return nil
	})
	return ctx, func() { end(nil) }
}

func (m *Manager) restart(name string, task supervise.Task) {
	m.mu.Lock()
	group := m.group
	m.mu.Unlock()
	group.Restart(name, task, supervise.Backoff{Min: m.c.Retry, Max: 30 * m.c.Retry})
}

// begin gives a guest its goroutine.
func (m *Manager) begin(g *guest) {
	m.mu.Lock()
	m.guests[g.id] = g
	m.mu.Unlock()
	m.restart("guest "+g.id, g.work)
}

// work decides and acts until the guest has ended. It is begun again after an
// error, and decides anew.
func (g *guest) work(ctx context.Context) (err error) {
	defer func() {
		if errors.Is(err, store.ErrDamaged) {
			err = supervise.Fatal(err)
		}
		switch {
		case ctx.Err() != nil:
			// The listener is this process's; the guest asks again.
			err = errors.Join(err, g.m.d.Metadata.Close(g.id))
		case err != nil:
			g.note(err.Error()) // the supervisor logs it
		}
	}()
	if g.pending != nil {
		if err := g.decideEnd(*g.pending); err != nil {
			return err
		}
	}
	if g.fresh && !g.begun {
		if err := g.launch(ctx); err != nil {
			return err
		}
	}
	for {
		domain, _ := g.look(ctx)
		switch decide(stageOf(g.record()), domain) {
		case actNone:
			return nil
		case actWait:
			err = g.hold(ctx, "the hypervisor does not answer, nothing is decided; see that libvirtd (or virtqemud) runs", g.m.c.Retry)
		case actReport:
			err = g.hold(ctx, "a domain of this guest runs that its record does not account for; it is left alone: end it by hand (virsh) if it is not wanted", holdPause)
		case actUndo:
			err = g.decideEnd(cutShort(g.record(), g.m.c.BootID, g.fresh))
		case actAdopt:
			err = g.follow(ctx)
		case actFinish:
			rec := g.record()
			end := verdict(rec, g.m.c.BootID, "")
			if end.why != nil && end.why.Code == codeEndedEarly && !rec.Undoing {
				end = verdict(rec, g.m.c.BootID, g.causeOfEnd(ctx))
			}
			if err := g.decideEnd(end); err != nil {
				return err
			}
			return g.end(ctx)
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// hold waits before deciding anew.
func (g *guest) hold(ctx context.Context, why string, d time.Duration) error {
	g.finding(why)
	return g.m.pause(ctx, g.wake, d)
}

// finish records that nothing of a guest is left, and tells.
func (m *Manager) finish(g *guest) error {
	now := m.now()
	err := g.update(func(r *store.Guest) (announce, bool) {
		r.EndedAt, r.Status, r.Launch = now, r.Final, nil
		if keep := now.Add(m.c.Keep); keep.After(r.KeepUntil) {
			r.KeepUntil = keep
		}
		return true, true
	})
	if err != nil {
		return err
	}
	m.mark("ended")
	m.mu.Lock()
	delete(m.guests, g.id)
	m.mu.Unlock()
	m.logEnd("guest ended", g.record())
	m.returnForwarding()
	return nil
}

// forget removes the records of guests that ended long ago.
func (m *Manager) forget(ctx context.Context) error {
	for {
		records, err := m.d.Records.Guests()
		for _, r := range records {
			if stageOf(r) == stageEnded && m.now().After(r.KeepUntil) {
				err = errors.Join(err, m.d.Records.DeleteGuest(r.ID))
			}
		}
		if err != nil {
			m.log.Warn("guests that ended long ago could not be forgotten", keyError, err)
		}
		if err := m.pause(ctx, nil, forgetEvery); err != nil {
			return err
		}
	}
}

// holdForwarding makes the host forward IPv4.
func (m *Manager) holdForwarding() error {
	m.forwarding.Lock()
	defer m.forwarding.Unlock()
	return m.d.Network.HoldForwarding()
}

// returnForwarding tries giveBackForwarding; the survey tries again.
func (m *Manager) returnForwarding() {
	if err := m.giveBackForwarding(); err != nil {
		m.log.Warn("IPv4 forwarding could not be given back, it stays on", keyError, err)
	}
}

// giveBackForwarding undoes holdForwarding once no guest is left.
func (m *Manager) giveBackForwarding() error {
	m.forwarding.Lock()
	defer m.forwarding.Unlock()
	m.mu.Lock()
	needed := len(m.guests) + len(m.unaccounted)
	m.mu.Unlock()
	if needed > 0 {
		return nil
	}
	return m.d.Network.ReturnForwarding()
}

// GuestView is one guest as status shows it.
type GuestView struct {
	ID         string
	Generation uint64
	Status     api.GuestStatus
	Phase      contract.GuestPhase
	// Step under way or last taken, and whether it is being undone.
	Step    string
	Undoing bool
	// Since is when the guest was accepted.
	Since     time.Time
	VCPUs     int
	MemoryMiB uint64
	Ports     []store.Port
	// Refusal says why, once the end is decided.
	Refusal *contract.Refusal
	// Finding is what an operator should look at. A domain without a record
	// has nothing else.
	Finding string
}

// Snapshot returns the guests that have not ended and the domains nobody
// accounts for.
func (m *Manager) Snapshot() []GuestView {
	var out []GuestView
	for _, g := range m.live() {
		r := g.record()
		v := GuestView{
			ID: r.ID, Generation: r.Generation, Status: r.Status, Phase: r.Phase, Undoing: r.Undoing, Since: r.AcceptedAt.Wall,
			VCPUs: r.VCPUs, MemoryMiB: r.MemoryMiB, Ports: r.Ports, Refusal: r.Outcome,
		}
		if len(r.Steps) > 0 {
			v.Step = r.Steps[len(r.Steps)-1].Name
		}
		g.mu.Lock()
		v.Finding = g.find
		g.mu.Unlock()
		out = append(out, v)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.unaccounted {
		out = append(out, GuestView{
			ID: o.GuestID, Generation: o.Generation,
			VCPUs: o.VCPUs, MemoryMiB: o.MemoryMiB,
			Finding: "a domain of ours without a record; it is left alone: end it by hand (virsh) if it is not wanted",
		})
	}
	return out
}
