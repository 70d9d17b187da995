package lifecycle

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/metadata"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vm"
)

// guest is one guest that has not ended.
type guest struct {
	m  *Manager
	id string
	// wake has a value when the record changed behind the goroutine's back.
	wake chan struct{}

	// Only the guest's goroutine uses these.
	fresh    bool    // accepted by this very run of the agent
	begun    bool    // its launch, by this run
	attached bool    // spool, network and metadata are this process's
	asked    bool    // to power off
	drained  bool    // no new connection reaches it any more
	routed   bool    // its routes through the relay are this process's
	pending  *ending // decided, but not on disk yet
	paths    []string
	measured Measured
	// passthrough is what the domain is started with, foreign what an adopted
	// one has that it was not.
	passthrough Passthrough
	foreign     string

	// changing is held while the record is changed, mu only while it is read:
	// a disk that hangs must not hide the guest from status and heartbeats.
	changing sync.Mutex

	mu     sync.Mutex
	rec    store.Guest
	spool  Spool
	cancel context.CancelFunc // of the launch or the upload under way
	find   string             // what an operator should know
	over   bool               // the hypervisor told of its domain's end
	cause  vm.Cause           // of that end
}

func newGuest(m *Manager, rec store.Guest, fresh bool) *guest {
	return &guest{m: m, id: rec.ID, wake: make(chan struct{}, 1), rec: rec, fresh: fresh}
}

// record returns the record as it is on disk.
func (g *guest) record() store.Guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.rec.Clone()
}

// poke wakes the guest's goroutine.
func (g *guest) poke() { poke(g.wake) }

func poke(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// announce says that a change is the control plane's to know.
type announce bool

// update changes the record: on disk first, together with the events that say
// so, then in memory. change returns false when there is nothing to change.
func (g *guest) update(change func(*store.Guest) (announce, bool), events ...*api.Event) error {
	g.changing.Lock()
	defer g.changing.Unlock()
	next := g.record()
	tell, changed := change(&next)
	if !changed {
		return nil
	}
	if tell {
		events = append(events, g.m.stateEvent(next))
	}
	if err := g.m.d.Records.PutGuest(next, events...); err != nil {
		return fmt.Errorf("recording guest %s: %w", g.id, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rec = next
	return nil
}

// ended notes that the domain ended, and why, if the hypervisor says so.
func (g *guest) ended(e vm.Event) {
	if e.GuestID == "" || e.State != vm.StateGone {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over, g.cause = true, cmp.Or(e.Cause, g.cause)
}

// causePatience is how long the hypervisor's word about an end is waited for: a
// domain is gone from its list a moment before it says why.
const causePatience = time.Second

// causeOfEnd waits for the hypervisor's word. Events may be lost.
func (g *guest) causeOfEnd(ctx context.Context) vm.Cause {
	timer := time.NewTimer(causePatience)
	defer timer.Stop()
	for {
		g.mu.Lock()
		over, cause := g.over, g.cause
		g.mu.Unlock()
		if over {
			return cause
		}
		select {
		case <-g.wake:
		case <-timer.C:
			return cause
		case <-ctx.Done():
			return cause
		}
	}
}

// finding notes what an operator should know, and logs it when it is news; ""
// clears it.
func (g *guest) finding(text string) {
	if news := g.note(text); news && text != "" {
		g.m.log.Warn("guest needs attention", keyGuest, g.id, "finding", text)
	}
}

// note is finding for what was logged already.
func (g *guest) note(text string) (news bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	news = text != g.find
	g.find = text
	return news
}

// decideEnd records that everything is to be taken down, and why.
func (g *guest) decideEnd(e ending) error {
	news := false
	err := g.update(func(r *store.Guest) (announce, bool) {
		if news = !r.Undoing; !news {
			return false, false
		}
		r.Undoing, r.Final, r.Outcome = true, e.final, e.why
		return false, true
	})
	if err != nil {
		g.pending = &e
		return err
	}
	g.pending = nil
	if news {
		g.m.logEnd("guest is taken down", g.record())
	}
	g.m.mark("undoing")
	return nil
}

// logEnd logs how a guest ends, and what the operator can do about it.
func (m *Manager) logEnd(message string, r store.Guest) {
	step := ""
	if len(r.Steps) > 0 {
		step = r.Steps[len(r.Steps)-1].Name
	}
	args := []any{keyGuest, r.ID, "final", r.Final.String(), "phase", string(r.Phase), "step", step}
	if why := r.Outcome; why != nil {
		m.log.Warn(message, append(args, keyCode, why.Code, keyRemedy, why.Remedy, keyError, why)...)
		return
	}
	m.log.Info(message, args...)
}

// command decodes what the guest was launched with.
func (g *guest) command() (*api.LaunchGuest, *contract.Manifest, error) {
	cmd := &api.LaunchGuest{}
	if err := proto.Unmarshal(g.record().Launch, cmd); err != nil {
		return nil, nil, fmt.Errorf("decoding launch of guest %s: %w", g.id, err)
	}
	manifest, err := contract.ParseManifest(cmd.GetManifest())
	if err != nil {
		return nil, nil, fmt.Errorf("decoding launch of guest %s: %w", g.id, err)
	}
	return cmd, manifest, nil
}

func (g *guest) dir() string { return filepath.Join(g.m.c.GuestsDir, g.id) }

// nic is the guest's wish to the network: the same after every restart.
func (c Config) nic(r store.Guest) network.Guest {
	sum := sha256.Sum256([]byte(r.ID))
	n := network.Guest{
		ID: r.ID, Index: r.Slot, TapUser: c.TapUser, TapGroup: c.TapGroup,
		// Locally administered, unicast.
		MAC: append(net.HardwareAddr{0x02}, sum[:5]...),
	}
	if r.Stop != nil || r.Undoing {
		return n // drains: what is open goes on, nothing new comes in
	}
	for _, p := range r.Ports {
		if p.Name == "" {
			n.Ports = append(n.Ports, network.Publish{Host: p.Host, Guest: p.Guest})
		}
	}
	return n
}

// routes are the ways to a guest that the relay serves.
func routes(r store.Guest, to netip.Addr) []relay.Route {
	if r.Stop != nil || r.Undoing {
		return nil
	}
	var out []relay.Route
	for _, p := range r.Ports {
		route := relay.Route{Name: p.Name, To: netip.AddrPortFrom(to, p.Guest)}
		if p.Name == "" {
			route.Port = p.Host
		}
		out = append(out, route)
	}
	return out
}

// connect puts the guest's network in force: its tap and rules, and its routes
// through the relay.
func (g *guest) connect(ctx context.Context) error {
	if err := g.m.d.Network.Adopt(ctx, []network.Guest{g.m.c.nic(g.record())}); err != nil {
		return err
	}
	return g.route(ctx)
}

// route sets the guest's routes through the relay.
func (g *guest) route(ctx context.Context) error {
	rec := g.record()
	link, err := network.Describe(g.m.c.Network, g.m.c.nic(rec))
	if err != nil {
		return err
	}
	if err := g.m.d.Relay.Set(ctx, g.id, routes(rec, link.GuestAddr.Addr())); err != nil {
		return err
	}
	g.routed = true
	return nil
}

// reroute tries route until it has worked once. A process that took a port
// while no agent ran keeps clients from the guest, and nothing else: the guest
// is looked after all the same.
func (g *guest) reroute(ctx context.Context) {
	if g.routed {
		return
	}
	if err := g.route(ctx); err != nil {
		g.finding("clients do not reach it by IPv6 or by name: " + err.Error())
		return
	}
	g.finding("")
}

// session is what metadata serves the guest.
func (g *guest) session(cmd *api.LaunchGuest, manifest *contract.Manifest) (metadata.Session, error) {
	c := g.m.c
	link, err := network.Describe(c.Network, c.nic(g.record()))
	if err != nil {
		return metadata.Session{}, err
	}
	boot, err := g.bootComponents(cmd)
	if err != nil {
		return metadata.Session{}, err
	}
	s := metadata.Session{
		ID: g.id, Device: link.Device, Peer: link.GuestLinkLocal, Manifest: cmd.GetManifest(), Endorsements: g.m.d.Endorsements, Boot: boot, Sink: g,
		Network: func() contract.NetworkFacts {
			return contract.NetworkFacts{
				Address: link.GuestAddr.String(), Gateway: link.HostAddr.Addr().String(), DNS: c.DNS, Hosts: cmd.GetHosts(),
				MTU: c.MTU, UnixTime: g.m.now().Unix(),
			}
		},
	}
	for _, r := range manifest.Results {
		s.Results = append(s.Results, r.Name)
	}
	return s, nil
}

// spoolFiles are the files the guest may deliver, each with the most bytes that
// its upload carries. Admission saw that they are the manifest's.
func spoolFiles(cmd *api.LaunchGuest) map[string]int64 {
	most := map[string]int64{}
	for _, u := range cmd.GetResults().GetUploads() {
		most[u.GetName()] = u.MaxBytes()
	}
	return most
}

// rank orders phases; a guest only moves on.
func rank(p contract.GuestPhase) int {
	return slices.Index([]contract.GuestPhase{
		"", contract.PhaseBooted, contract.PhaseAttested, contract.PhaseInputs, contract.PhaseImage,
		contract.PhaseRunning, contract.PhaseCollecting, contract.PhaseDone, contract.PhaseFailed,
	}, p)
}

func statusOf(p contract.GuestPhase) api.GuestStatus {
	switch p {
	case contract.PhaseAttested, contract.PhaseInputs, contract.PhaseImage:
		return api.GuestStatus_GUEST_STATUS_ATTESTED
	case contract.PhaseRunning:
		return api.GuestStatus_GUEST_STATUS_RUNNING
	case contract.PhaseCollecting, contract.PhaseDone:
		return api.GuestStatus_GUEST_STATUS_COLLECTING
	case contract.PhaseBooted, contract.PhaseFailed:
	}
	return api.GuestStatus_GUEST_STATUS_STARTED
}

// Status takes the guest's word about itself. A phase is taken once and only
// forwards, so that a guest cannot fill the outbox.
func (g *guest) Status(_ context.Context, s contract.GuestStatus) error {
	now, news := g.m.instant(), false
	err := g.update(func(r *store.Guest) (announce, bool) {
		if r.Undoing || rank(s.Phase) <= rank(r.Phase) || r.Phase == contract.PhaseDone {
			return false, false
		}
		if r.Phases == nil {
			r.Phases = map[contract.GuestPhase]clock.Instant{}
		}
		r.Phase, r.Phases[s.Phase] = s.Phase, now
		r.Status = max(r.Status, statusOf(s.Phase))
		switch s.Phase {
		case contract.PhaseCollecting, contract.PhaseDone:
			r.ExitCode = s.ExitCode
		case contract.PhaseFailed:
			r.GuestRefusal = guestsOwn(s.Refusal)
		case contract.PhaseBooted, contract.PhaseAttested, contract.PhaseInputs, contract.PhaseImage, contract.PhaseRunning:
		}
		news = true
		return true, true
	})
	if err != nil || !news {
		return err
	}
	g.m.log.Info("guest reports", keyGuest, g.id, "phase", string(s.Phase), "uptime_ms", s.UptimeMS)
	g.poke()
	return nil
}

// maxWord bounds each text of a guest's refusal.
const maxWord = 1024

// guestsOwn keeps a guest's refusal apart from the node's own: its code starts
// with "guest." or "broker.".
func guestsOwn(r *contract.Refusal) *contract.Refusal {
	if r == nil {
		return contract.Refuse("guest.failed", "launch again; a debug image in a trial without secrets shows its console", "the guest failed and did not say why")
	}
	cut := func(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxWord)], "") }
	code := r.Code
	if !strings.HasPrefix(code, "guest.") && !strings.HasPrefix(code, "broker.") {
		code = "guest." + code
	}
	return &contract.Refusal{
		Code: code, Message: cmp.Or(cut(r.Message), "the guest failed and did not say why"),
		Remedy: cmp.Or(cut(r.Remedy), "ask the publisher of the guest's image what the code means"),
	}
}

// Result takes one sealed result.
func (g *guest) Result(ctx context.Context, name string, r io.Reader) error {
	g.mu.Lock()
	spool, undoing := g.spool, g.rec.Undoing
	g.mu.Unlock()
	if spool == nil || undoing {
		return contract.Refuse("guest.results-closed", "launch again", "the node takes no results of this guest any more")
	}
	entry, err := spool.Receive(ctx, name, r)
	if err != nil {
		return fmt.Errorf("receiving result: %w", err)
	}
	g.m.log.Info("result received", keyGuest, g.id, "name", name, "size", entry.Size)
	return nil
}

// ResultManifest takes the signed list of results, unopened.
func (g *guest) ResultManifest(ctx context.Context, signed []byte) error {
	return g.Result(ctx, contract.ResultsManifestName, bytes.NewReader(signed))
}
