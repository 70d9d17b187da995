// Package lifecycletest is a host that obeys the rules of a real one: domains
// start only on taps and files that are there, taps are made once, sessions
// and rules of a dead process are gone, names are taken. It notes every broken
// rule and can say what is left over. For tests only; safe for concurrent use.
package lifecycletest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/metadata"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/domain"
)

// World is one host.
type World struct {
	// Dir holds everything on disk.
	Dir string
	cfg network.Config

	mu         sync.Mutex
	domains    map[string]*machine
	listeners  map[chan vm.Event]bool
	taps       map[string]network.Guest
	routes     map[string][]relay.Route
	listening  map[uint16]bool
	forwarding bool
	sessions   map[string]metadata.Session
	blobs      map[string][][32]byte // by owner
	origin     map[string][]byte     // by URL
	spools     map[string]*spool
	objects    map[string][]byte        // by URL
	uploads    map[string]map[int]*part // in parts, by id
	fail       map[string]error
	block      map[string]bool
	calls      map[string]int
	violations []string
	// onShutdown is a guest's answer to the power button; nil ignores it.
	onShutdown func(id string)
}

type machine struct {
	spec  vm.Spec
	state vm.State
}

// New returns a host without guests, with its files below dir.
func New(dir string, cfg network.Config) *World {
	return &World{
		Dir: dir, cfg: cfg, domains: map[string]*machine{}, listeners: map[chan vm.Event]bool{}, taps: map[string]network.Guest{},
		routes:   map[string][]relay.Route{},
		sessions: map[string]metadata.Session{}, blobs: map[string][][32]byte{}, origin: map[string][]byte{},
		spools: map[string]*spool{}, objects: map[string][]byte{}, uploads: map[string]map[int]*part{}, fail: map[string]error{}, block: map[string]bool{}, calls: map[string]int{},
	}
}

// GuestsDir is where boot copies go.
func (w *World) GuestsDir() string { return filepath.Join(w.Dir, "guests") }

// Fail makes an operation fail until it is called with nil.
func (w *World) Fail(op string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[op] = err
}

// Block makes an operation wait for the end of its context.
func (w *World) Block(op string, on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.block[op] = on
}

// Calls is how often an operation was called.
func (w *World) Calls(op string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls[op]
}

// ErrSilent is how a hypervisor fails that does not answer.
var ErrSilent = errors.New("no answer")

// enter is the beginning of every operation.
func (w *World) enter(ctx context.Context, op string) error {
	w.mu.Lock()
	w.calls[op]++
	err, blocked := w.fail[op], w.block[op]
	w.mu.Unlock()
	if blocked {
		<-ctx.Done()
		return fmt.Errorf("%s: %w", op, ctx.Err())
	}
	if err != nil {
		return err
	}
	return ctx.Err()
}

func (w *World) brokenLocked(format string, args ...any) {
	w.violations = append(w.violations, fmt.Sprintf(format, args...))
}

// Violations are the rules that were broken.
func (w *World) Violations() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.violations)
}

// ProcessDied forgets what dies with the agent: listeners, subscriptions, and
// what the network package knows. Domains, taps and files stay.
func (w *World) ProcessDied() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.sessions)
	clear(w.routes)
	clear(w.listeners)
}

// Reboot forgets what dies with the host.
func (w *World) Reboot() error {
	w.ProcessDied()
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.domains)
	clear(w.taps)
	return os.RemoveAll(w.GuestsDir())
}

// Leftovers says what of guests is there.
func (w *World) Leftovers() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for id := range w.domains {
		out = append(out, "domain "+id)
	}
	for id := range w.taps {
		out = append(out, "tap of "+id)
	}
	for id := range w.sessions {
		out = append(out, "session of "+id)
	}
	for id := range w.blobs {
		out = append(out, "blobs of "+id)
	}
	for id := range w.spools {
		out = append(out, "spool of "+id)
	}
	entries, err := os.ReadDir(w.GuestsDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		out = append(out, err.Error())
	}
	for _, e := range entries {
		out = append(out, "folder "+e.Name())
	}
	if w.forwarding {
		out = append(out, "forwarding")
	}
	slices.Sort(out)
	return out
}

// Running reports whether the guest's domain runs.
func (w *World) Running(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.domains[id] != nil
}

// Spec returns what the guest's domain was started with.
func (w *World) Spec(id string) vm.Spec {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d := w.domains[id]; d != nil {
		return d.spec
	}
	return vm.Spec{}
}

// AddDomain puts a domain there that nobody started.
func (w *World) AddDomain(id string, generation uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.domains[id] = &machine{spec: vm.Spec{GuestID: id, Generation: generation}, state: vm.StateRunning}
}

// Crash leaves the guest's domain there, crashed.
func (w *World) Crash(id string) {
	w.mu.Lock()
	if d := w.domains[id]; d != nil {
		d.state = vm.StateCrashed
	}
	w.mu.Unlock()
	w.tell(vm.Event{GuestID: id, State: vm.StateCrashed})
}

// OnShutdown sets guests' answer to the power button.
func (w *World) OnShutdown(f func(id string)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.onShutdown = f
}

// PowerOff is the guest's own end.
func (w *World) PowerOff(id string) { w.End(id, "") }

// End ends the guest's domain, for a cause that is not the guest's own.
func (w *World) End(id string, cause vm.Cause) {
	w.mu.Lock()
	delete(w.domains, id)
	w.mu.Unlock()
	w.tell(vm.Event{GuestID: id, State: vm.StateGone, Cause: cause})
}

func (w *World) tell(e vm.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.listeners {
		select {
		case ch <- e:
		default: // events may be lost
		}
	}
}

// Session returns what the guest can reach; false when nobody listens.
func (w *World) Session(id string) (metadata.Session, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, ok := w.sessions[id]
	return s, ok && w.domains[id] != nil
}

// Say posts a guest's status.
func (w *World) Say(ctx context.Context, id string, s contract.GuestStatus) error {
	session, ok := w.Session(id)
	if !ok {
		return errors.New("nobody listens")
	}
	return session.Sink.Status(ctx, s)
}

// Domains is the hypervisor.
type Domains struct{ *World }

var _ lifecycle.Hypervisor = Domains{}

// Start implements lifecycle.Hypervisor.
func (w Domains) Start(ctx context.Context, spec vm.Spec) error {
	if err := w.enter(ctx, "start"); err != nil {
		return err
	}
	if err := domain.Check(spec); err != nil {
		return err
	}
	for _, path := range []string{spec.Firmware, spec.Kernel, spec.Initrd} {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if info.Mode().Perm() != 0o444 {
			return fmt.Errorf("%s has mode %v", path, info.Mode())
		}
	}
	for _, d := range spec.Disks {
		if _, err := os.Stat(d.Path); err != nil {
			return err
		}
	}
	w.mu.Lock()
	if old := w.domains[spec.GuestID]; old != nil {
		w.mu.Unlock()
		if old.spec.Generation != spec.Generation {
			return errors.New("another generation runs")
		}
		return nil
	}
	tap := slices.ContainsFunc(w.tapsLocked(), func(t network.Tap) bool { return t.Name == spec.NIC.Tap && t.GuestID == spec.GuestID })
	if !tap {
		w.mu.Unlock()
		return fmt.Errorf("no such tap: %s", spec.NIC.Tap)
	}
	if _, ok := w.sessions[spec.GuestID]; !ok {
		w.brokenLocked("domain %s was started before anybody listens to it", spec.GuestID)
	}
	w.domains[spec.GuestID] = &machine{spec, vm.StateRunning}
	w.mu.Unlock()
	w.tell(vm.Event{GuestID: spec.GuestID, State: vm.StateRunning})
	return w.enter(ctx, "start-answer") // lost on its way, if told so
}

// Shutdown implements lifecycle.Hypervisor.
func (w Domains) Shutdown(ctx context.Context, id string) error {
	if err := w.enter(ctx, "shutdown"); err != nil {
		return err
	}
	w.mu.Lock()
	f := w.onShutdown
	w.mu.Unlock()
	if f != nil {
		f(id)
	}
	return nil
}

// Destroy implements lifecycle.Hypervisor.
func (w Domains) Destroy(ctx context.Context, id string) error {
	if err := w.enter(ctx, "destroy"); err != nil {
		return err
	}
	w.PowerOff(id)
	return nil
}

// List implements lifecycle.Hypervisor.
func (w Domains) List(ctx context.Context) ([]vm.Observed, error) {
	if err := w.enter(ctx, "list"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []vm.Observed
	for id, d := range w.domains {
		out = append(out, vm.Observed{GuestID: id, Generation: d.spec.Generation, State: d.state, VCPUs: d.spec.VCPUs, MemoryMiB: d.spec.MemoryMiB})
	}
	return out, nil
}

// CheckDevices implements lifecycle.Hypervisor.
func (w Domains) CheckDevices(ctx context.Context, id string, want []vm.PCIDevice) error {
	if err := w.enter(ctx, "check-devices"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.domains[id]
	if d == nil {
		return errors.New("no such domain")
	}
	text, err := domain.Render(d.spec)
	if err != nil {
		return err
	}
	return domain.CheckDevices(text, want)
}

// Subscribe implements lifecycle.Hypervisor.
func (w Domains) Subscribe() (<-chan vm.Event, func()) {
	ch := make(chan vm.Event, 64)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listeners[ch] = true
	return ch, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.listeners, ch)
	}
}

// Relay is the relay's side: like the kernel's, routes are to guests with a
// tap, and a name or port has one guest.
type Relay struct{ *World }

var _ lifecycle.Relay = Relay{}

// Set implements lifecycle.Relay.
func (w Relay) Set(ctx context.Context, id string, routes []relay.Route) error {
	if err := w.enter(ctx, "relay"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.taps[id]; !ok {
		w.brokenLocked("routes of %s without a tap", id)
	}
	for other, theirs := range w.routes {
		for _, r := range routes {
			if other != id && slices.ContainsFunc(theirs, func(o relay.Route) bool { return o.Name == r.Name && o.Port == r.Port }) {
				return fmt.Errorf("%s%d is guest %s's", r.Name, r.Port, other)
			}
		}
	}
	w.routes[id] = routes
	return nil
}

// Remove implements lifecycle.Relay.
func (w Relay) Remove(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.routes, id)
}

// Drop implements lifecycle.Relay.
func (w Relay) Drop(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.routes[id]) > 0 {
		w.brokenLocked("connections of %s dropped while new ones come in", id)
	}
}

// Published is what leads to a guest: the kernel's ports and the relay's routes.
func (w *World) Published(id string) (ports []network.Publish, routes []relay.Route) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.taps[id].Ports), slices.Clone(w.routes[id])
}

// Net is the network.
type Net struct{ *World }

var _ lifecycle.Network = Net{}

// Adopt implements lifecycle.Network. A guest that fails, also by Fail with
// "adopt" and its id, is left out.
func (w Net) Adopt(ctx context.Context, guests []network.Guest) error {
	if err := w.enter(ctx, "adopt"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for _, g := range guests {
		_, err := network.Describe(w.cfg, g)
		err = errors.Join(err, w.fail["adopt "+g.ID])
		for id, other := range w.taps {
			if id != g.ID && other.Index == g.Index {
				err = errors.Join(err, fmt.Errorf("slot %d is guest %s's", g.Index, id))
			}
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !w.forwarding {
			w.brokenLocked("tap of %s without forwarding", g.ID)
		}
		w.taps[g.ID] = g
	}
	return errors.Join(errs...)
}

// Remove implements lifecycle.Network.
func (w Net) Remove(ctx context.Context, id string) error {
	if err := w.enter(ctx, "remove"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.domains[id] != nil {
		w.brokenLocked("tap of %s removed under its domain", id)
	}
	if len(w.routes[id]) > 0 {
		w.brokenLocked("tap of %s removed while routes lead there", id)
	}
	delete(w.taps, id)
	return nil
}

func (w *World) tapsLocked() []network.Tap {
	var out []network.Tap
	for id, g := range w.taps {
		link, err := network.Describe(w.cfg, g)
		if err != nil {
			w.brokenLocked("%v", err)
		}
		out = append(out, network.Tap{Name: link.Tap, GuestID: id, Up: true})
	}
	return out
}

// Listen has processes of the host listen on ports.
func (w *World) Listen(ports ...uint16) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listening = map[uint16]bool{}
	for _, p := range ports {
		w.listening[p] = true
	}
}

// Listening implements lifecycle.Network.
func (w Net) Listening() (map[uint16]bool, error) {
	if err := w.enter(context.Background(), "listening"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.listening), nil
}

// Observe implements lifecycle.Network.
func (w Net) Observe(ctx context.Context) ([]network.Tap, error) {
	if err := w.enter(ctx, "observe"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tapsLocked(), nil
}

// Sweep implements lifecycle.Network.
func (w Net) Sweep(ctx context.Context, keep map[string]bool) error {
	if err := w.enter(ctx, "sweep"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for id := range w.taps {
		if !keep[id] {
			if w.domains[id] != nil {
				w.brokenLocked("tap of %s swept under its domain", id)
			}
			delete(w.taps, id)
		}
	}
	return nil
}

// HoldForwarding implements lifecycle.Network.
func (w Net) HoldForwarding() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forwarding = true
	return nil
}

// ReturnForwarding implements lifecycle.Network.
func (w Net) ReturnForwarding() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.taps) > 0 {
		w.brokenLocked("forwarding given back under taps")
	}
	w.forwarding = false
	return nil
}

// Service is the metadata service.
type Service struct{ *World }

var _ lifecycle.Metadata = Service{}

// Open implements lifecycle.Metadata.
func (w Service) Open(ctx context.Context, s metadata.Session) error {
	if err := w.enter(ctx, "metadata"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, open := w.sessions[s.ID]; open {
		return fmt.Errorf("guest %s has a session", s.ID)
	}
	link, err := network.Describe(w.cfg, w.taps[s.ID])
	if err != nil || link.Device != s.Device {
		return fmt.Errorf("no device %s", s.Device)
	}
	w.sessions[s.ID] = s
	return nil
}

// Close implements lifecycle.Metadata.
func (w Service) Close(id string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.sessions, id)
	return nil
}

// Challenge implements lifecycle.Metadata.
func (w Service) Challenge(ctx context.Context, id string, nonce []byte) ([]byte, error) {
	if err := w.enter(ctx, "challenge"); err != nil {
		return nil, err
	}
	if _, open := w.Session(id); !open {
		return nil, contract.Refuse("guest.not-running", "ask for one that runs", "there is no such guest")
	}
	return slices.Concat([]byte("evidence over "), nonce), nil
}

// sum is the digest of a blob.
func sum(data []byte) [32]byte { return sha256.Sum256(data) }
