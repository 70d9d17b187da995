package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vm"
)

// keepAfterExpiry is how long after its command's expiry a guest's id is kept
// at least; clocks may differ.
const keepAfterExpiry = 24 * time.Hour

// admissionPatience is how long a launch waits for a sweep that a disk holds up:
// the commands behind it are stops.
const admissionPatience = 30 * time.Second

var _ inbox.Executor = (*Manager)(nil)

// Execute carries out a command; BeginEpoch is the inbox's. The events it
// returns report the outcome, besides those it has put into the outbox
// together with the records they speak of. A launch or stop that returns is
// recorded and goes on by itself; executing it again changes nothing. Every
// refusal is a *contract.Refusal.
func (m *Manager) Execute(ctx context.Context, cmd *api.Command) ([]*api.Event, error) {
	events, err := m.execute(ctx, cmd)
	return events, headroom.Typed(err)
}

func (m *Manager) execute(ctx context.Context, cmd *api.Command) ([]*api.Event, error) {
	select {
	case <-m.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	switch v := cmd.GetVerb().(type) {
	case *api.Command_LaunchGuest:
		return nil, m.launch(ctx, cmd, v.LaunchGuest)
	case *api.Command_StopGuest:
		return nil, m.stop(cmd.GetCommandId(), v.StopGuest)
	case *api.Command_RequestEvidence:
		return m.evidence(ctx, cmd.GetCommandId(), v.RequestEvidence)
	case *api.Command_Cordon:
		return nil, m.cordon(v.Cordon.GetReason(), true)
	case *api.Command_Uncordon:
		return nil, m.cordon("", false)
	case *api.Command_GrantUpload:
		return nil, m.grantUpload(v.GrantUpload)
	case *api.Command_SettleUpload:
		return nil, m.settleUpload(v.SettleUpload)
	case *api.Command_BeginEpoch, nil:
	}
	return nil, contract.Refuse(api.CodeMalformed, "send another command", "the command has no verb that guests know")
}

func (m *Manager) cordon(reason string, on bool) error {
	if err := m.d.Records.SetCordon(reason, on); err != nil {
		return fmt.Errorf("recording cordon: %w", err)
	}
	m.log.Info("cordon", "on", on, "reason", reason)
	return nil
}

// launch judges and records a guest; the record is the reservation.
func (m *Manager) launch(ctx context.Context, cmd *api.Command, l *api.LaunchGuest) error {
	left := m.d.Headroom(ctx) // before the lock: a disk that hangs is waited for here
	select {
	case m.admission <- struct{}{}:
		defer func() { <-m.admission }()
	case <-time.After(admissionPatience):
		return contract.Refuse("admit.busy", "launch later or on another host; see on the host whether a disk hangs (nodeagent status)",
			"the node is still removing what other guests left")
	}
	manifest, err := contract.ParseManifest(l.GetManifest())
	if err != nil {
		return contract.Refuse("admit.manifest-malformed", "write the manifest with the tenant's tool, and send its bytes unchanged",
			"the manifest is not a valid one in canonical form").Because(err)
	}
	known, err := m.known(cmd.GetCommandId(), l, manifest)
	if known || err != nil {
		return err
	}
	if m.d.Doubt != nil {
		if doubt := m.d.Doubt(); doubt != nil {
			return doubt
		}
	}
	host, err := m.host(ctx, l.GetGuestId())
	if err != nil {
		return err
	}
	host.Left = left
	plan, err := admit.Decide(l, manifest, host)
	if err != nil {
		return err
	}
	rec, err := m.newRecord(cmd, l, manifest, plan)
	if err != nil {
		return err
	}
	// Before the guest's record: a guest that is accepted has its GPUs, and a
	// reservation for a guest that never was ends with the next Settle.
	if want := manifest.GPU; want != nil {
		if err := m.d.GPUs.Reserve(ctx, rec.ID, want.Model, want.Count); err != nil {
			return err
		}
		m.mark("gpus-reserved")
	}
	if err := m.d.Records.PutGuest(rec, m.stateEvent(rec)); err != nil {
		if manifest.GPU != nil {
			err = errors.Join(err, m.d.GPUs.Abandon(rec.ID))
		}
		if errors.Is(err, store.ErrOutboxFull) {
			return contract.Refuse("admit.outbox-full", "let the node reach its control plane, then launch again",
				"too many events of this node wait to be confirmed").Because(err)
		}
		// A write that fails at its last sync may be there all the same.
		err = errors.Join(err, m.d.Records.DeleteGuest(rec.ID))
		if r := headroom.Explain(err); r != nil {
			return r
		}
		return contract.Refuse("admit.store-failed", "see that the disk of state_dir on the host has space and can be written, then launch again",
			"the node could not record the guest").Because(err)
	}
	m.log.Info("guest accepted", keyGuest, rec.ID, keyCommand, rec.CommandID, "slot", rec.Slot)
	m.mark("accepted")
	m.begin(newGuest(m, rec, true))
	return nil
}

// known reports whether this very command was carried out before, and refuses
// ids that were used by another.
func (m *Manager) known(commandID string, l *api.LaunchGuest, manifest *contract.Manifest) (bool, error) {
	records, err := m.d.Records.Guests()
	if err != nil {
		return false, fmt.Errorf("reading guests: %w", err)
	}
	for _, r := range records {
		switch {
		case r.ID == l.GetGuestId() && r.CommandID == commandID:
			return true, nil
		case r.ID == l.GetGuestId() && l.GetGeneration() < r.Generation:
			return false, stale(r, l.GetGeneration())
		case r.ID == l.GetGuestId():
			return false, contract.Refuse("launch.guest-id-used", "launch with a new guest_id", "guest %s was launched on this node before", r.ID)
		case r.LaunchID == manifest.LaunchID:
			return false, contract.Refuse("launch.launch-id-used", "write a manifest with a new launch_id",
				"a guest with launch_id %s was launched on this node before", r.LaunchID)
		}
	}
	return false, nil
}

func stale(r store.Guest, generation uint64) *contract.Refusal {
	return contract.Refuse("guest.stale-generation", "ask the control plane for the guest's generation",
		"the command is for generation %d, guest %s has %d", generation, r.ID, r.Generation)
}

func (m *Manager) newRecord(cmd *api.Command, l *api.LaunchGuest, manifest *contract.Manifest, plan admit.Plan) (store.Guest, error) {
	raw, err := proto.Marshal(l)
	if err != nil {
		return store.Guest{}, fmt.Errorf("encoding launch: %w", err)
	}
	rec := store.Guest{
		ID: l.GetGuestId(), Generation: l.GetGeneration(), CommandID: cmd.GetCommandId(), LaunchID: manifest.LaunchID, Launch: raw,
		BootID: m.c.BootID, Slot: plan.Slot, VCPUs: int(l.GetMachine().GetVcpus()), MemoryMiB: l.GetMachine().GetMemoryMib(),
		Limits: store.Limits{Start: plan.StartTimeout, Run: plan.RunTimeout, ResultBytes: plan.ResultBytes},
		Status: api.GuestStatus_GUEST_STATUS_ACCEPTED, AcceptedAt: m.instant(),
		KeepUntil: cmd.GetExpiresAt().AsTime().Add(keepAfterExpiry),
	}
	for _, p := range plan.Ports {
		rec.Ports = append(rec.Ports, store.Port(p))
	}
	return rec, nil
}

// host is what the decision about a guest depends on, as it is now.
func (m *Manager) host(ctx context.Context, guestID string) (admit.Host, error) {
	reason, on, err := m.d.Records.Cordon()
	if err != nil {
		return admit.Host{}, fmt.Errorf("reading cordon: %w", err)
	}
	images, err := m.d.Images()
	if err != nil {
		return admit.Host{}, fmt.Errorf("listing guest images: %w", err)
	}
	taps, err := m.d.Network.Observe(ctx)
	if err != nil {
		return admit.Host{}, fmt.Errorf("listing taps: %w", err)
	}
	_, strangers, err := m.strangers(ctx)
	if err != nil {
		return admit.Host{}, contract.Refuse("admit.hypervisor-silent", "see that libvirtd (or virtqemud) runs on the host, then launch again",
			"the host's hypervisor does not answer").Because(err)
	}
	listening, err := m.d.Network.Listening()
	if err != nil {
		// The network refuses a port in use when it comes to it.
		m.log.Warn("the ports of the host's processes are not known, a launch may be given one of them", keyError, err)
	}
	const slotBits = 30 // each guest has a /30
	h := admit.Host{
		Cordoned: on, CordonReason: reason, Policy: m.c.Policy, Emulated: m.c.Emulated, Capacity: m.c.Capacity,
		PublishedPorts: config.PortRange(m.c.Network.PublishedPorts), Slots: 1 << max(0, slotBits-m.c.Network.GuestCIDR.Bits()), Images: images, GPURule: m.d.GPURule,
		SharedTLS: m.c.SharedTLS,
		Used:      admit.Used{Slots: map[uint32]bool{}, Ports: map[uint16]bool{}, Names: map[string]bool{}},
	}
	maps.Copy(h.Used.Ports, listening)
	if m.d.GPUs != nil {
		h.GPUs = m.d.GPUs.Available
	}
	for _, g := range m.live() {
		r := g.record()
		h.Used.Slots[r.Slot] = true
		for _, p := range r.Ports {
			if p.Name != "" {
				h.Used.Names[p.Name] = true
				continue
			}
			h.Used.Ports[p.Host] = true
		}
		h.Used.Guests++
		if domain := find(r.Steps, stepDomain); r.Undoing && (domain == nil || !domain.GoneAt.IsZero()) {
			continue // its machine is gone, its results may still be on their way
		}
		h.Used.VCPUs += r.VCPUs
		h.Used.MemoryMiB += r.MemoryMiB
	}
	// Guests nobody remembers keep what they have.
	for _, o := range strangers {
		if o.GuestID == guestID {
			return admit.Host{}, contract.Refuse("launch.domain-exists", "launch with a new guest_id; if the domain is not wanted, end it on the host (virsh destroy "+vm.NamePrefix+guestID+")",
				"a domain of guest %s runs already, from before the node lost its records", guestID)
		}
		h.Used.Guests++
		h.Used.VCPUs += o.VCPUs
		h.Used.MemoryMiB += o.MemoryMiB
	}
	for _, t := range taps {
		if slot, ok := t.Slot(); ok {
			h.Used.Slots[slot] = true
		}
	}
	return h, nil
}

// stop records the intent; the guest's goroutine carries it out.
func (m *Manager) stop(commandID string, s *api.StopGuest) error {
	rec, err := m.d.Records.Guest(s.GetGuestId())
	switch {
	case errors.Is(err, store.ErrNoGuest):
		return notFound(s.GetGuestId())
	case err != nil:
		return fmt.Errorf("reading guest: %w", err)
	case s.GetGeneration() < rec.Generation:
		return stale(rec, s.GetGeneration())
	}
	g := m.guest(rec.ID)
	if g == nil {
		return nil // ended already
	}
	stop := &store.Stop{CommandID: commandID, Deadline: m.instant().Add(s.GetGrace().AsDuration())}
	news := false
	err = g.update(func(r *store.Guest) (announce, bool) {
		// A guest that is taken down already may still wait for the object
		// store: a further command ends that.
		intent := &r.Stop
		if r.Undoing {
			intent = &r.GiveUp
		}
		again := r.Stop != nil && r.Stop.CommandID == commandID
		if news = r.EndedAt.IsZero() && !again && (*intent == nil || stop.Deadline.Before((*intent).Deadline)); news {
			*intent = stop
		}
		return false, news
	})
	if err != nil || !news {
		return err
	}
	m.log.Info("guest is to stop", keyGuest, rec.ID, keyCommand, commandID, "grace", s.GetGrace().AsDuration().String())
	m.mark("stopping")
	g.mu.Lock()
	cancel := g.cancel
	g.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	g.poke()
	return nil
}

func notFound(id string) *contract.Refusal {
	return contract.Refuse("guest.not-found", "ask the control plane which node has the guest", "this node has no guest %s", id)
}

// evidence relays a challenge and returns the answer unopened.
func (m *Manager) evidence(ctx context.Context, commandID string, v *api.RequestEvidence) ([]*api.Event, error) {
	g := m.guest(v.GetGuestId())
	if g == nil {
		_, err := m.d.Records.Guest(v.GetGuestId())
		switch {
		case errors.Is(err, store.ErrNoGuest):
			return nil, notFound(v.GetGuestId())
		case err != nil:
			return nil, fmt.Errorf("reading guest: %w", err)
		}
		return nil, contract.Refuse("guest.not-running", "ask while the guest runs", "guest %s has ended", v.GetGuestId())
	}
	try, cancel := context.WithTimeout(ctx, m.c.EvidenceTimeout)
	defer cancel()
	bundle, err := m.d.Metadata.Challenge(try, g.id, v.GetNonce())
	if err != nil {
		if _, refused := errors.AsType[*contract.Refusal](err); !refused && ctx.Err() == nil && try.Err() != nil {
			return nil, contract.Refuse(inbox.CodeTimeout, "ask again; if it repeats, look at the guest's state",
				"the guest did not answer within %s", m.c.EvidenceTimeout).Because(err)
		}
		return nil, fmt.Errorf("challenging guest: %w", err)
	}
	return []*api.Event{api.NewEvidence(m.c.HostID, commandID, m.now(), g.id, bundle)}, nil
}

// stateEvent says how a guest is.
func (m *Manager) stateEvent(r store.Guest) *api.Event {
	s := &api.GuestState{
		GuestId: r.ID, Generation: r.Generation, Status: r.Status, GuestPhase: string(r.Phase), ExitCode: int32(r.ExitCode),
		StepMs: stepMS(r),
	}
	if r.Status == api.GuestStatus_GUEST_STATUS_FAILED {
		s.Refusal = api.RefusalToWire(r.Outcome)
	}
	if domain := find(r.Steps, stepDomain); domain != nil {
		for _, p := range r.Ports {
			s.Ports = append(s.Ports, &api.PublishedPort{GuestPort: uint32(p.Guest), HostPort: uint32(p.Host), ServerName: p.Name})
		}
	}
	return api.NewGuestState(m.c.HostID, r.CommandID, m.now(), s)
}

// stepMS is how long each step took, "undo-" its undo, and "guest-" how long
// after the start of the domain a guest reported a phase.
func stepMS(r store.Guest) map[string]uint64 {
	ms := map[string]uint64{}
	put := func(name string, from, to time.Time) {
		if !from.IsZero() && !to.IsZero() {
			ms[name] = uint64(max(0, to.Sub(from).Milliseconds()))
		}
	}
	for _, s := range r.Steps {
		put(s.Name, s.BegunAt, s.DoneAt)
		put("undo-"+s.Name, s.UndoAt, s.GoneAt)
	}
	if domain := find(r.Steps, stepDomain); domain != nil {
		for phase, at := range r.Phases {
			put("guest-"+string(phase), domain.BegunAt, at.Wall)
		}
	}
	return ms
}
