package e2e_test

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/tests/trial"
)

// The control plane is gone from the guest's launch until after its end. The
// guest runs, its results leave, and all of it is told in order afterwards.
func TestAGuestLivesItsWholeLifeWithoutTheControlPlane(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	h, u := hosts[0], w.tenant("alice", trial.TenantOptions{})
	d := u.deploy("job", "--result", "summary.json", "--command", "/workload", "--command", "batch", "--command", "one")
	if err := trial.Await(w.ctx, "the launch accepted", func() (bool, error) {
		g, err := w.API.Guest(w.ctx, d.GuestID)
		return err == nil && len(g.State) > 0, err
	}); err != nil {
		t.Fatal(err)
	}
	link := func(rule string) {
		t.Helper()
		if out, err := h.Output(w.ctx, "nft", rule); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	natsPort := w.Control.NATSURL()[strings.LastIndex(w.Control.NATSURL(), ":")+1:]
	link("table inet outage { chain out { type filter hook output priority 0; tcp dport " + natsPort + " drop; }; }")
	var waiting int
	if err := trial.Await(w.ctx, "the guest's end on its host", func() (bool, error) {
		s, err := h.Status(w.ctx)
		waiting = s.Outbox
		return err == nil && len(s.Guests) == 0, err
	}); err != nil {
		t.Fatal(err)
	}
	if waiting < 3 {
		t.Errorf("%d events wait, the link was hardly down", waiting)
	}
	if g, err := w.API.Guest(w.ctx, d.GuestID); err != nil || g.Ended() {
		t.Errorf("the control plane knows of the end: %v", err)
	}
	link("delete table inet outage")
	if s := w.ended(d.GuestID); s.GetStatus() != api.GuestStatus_GUEST_STATUS_FINISHED {
		t.Fatalf("ended as %v", s)
	}
	// Nobody could challenge the guest meanwhile: its results are there, and
	// the tenant does not believe them.
	says(t, u.run(5, "results", "job", "--out", filepath.Join(u.Dir, "opened")), "tenant.evidence-missing")
	w.inOrder(d.GuestID)
	w.audited(h, d.GuestID)
	w.clean(h)
}

// inOrder looks whether a guest's states came one after the other, and each
// command had one outcome.
func (w *world) inOrder(guestID string) {
	w.t.Helper()
	events, err := w.API.Events(w.ctx, 0, 1000, false)
	if err != nil {
		w.t.Fatal(err)
	}
	last, sequence, uploaded := api.GuestStatus_GUEST_STATUS_UNSPECIFIED, uint64(0), 0
	outcomes := map[string]int{}
	for _, e := range events {
		event, err := e.Decode()
		if err != nil {
			w.t.Fatal(err)
		}
		if event.GetSequence() > 0 && event.GetSequence() <= sequence {
			w.t.Errorf("event %d after %d", event.GetSequence(), sequence)
		}
		sequence = max(sequence, event.GetSequence())
		if event.GetCommandDone() != nil || event.GetCommandRefused() != nil {
			outcomes[event.GetCommandId()]++
		}
		if s := event.GetGuestState(); s.GetGuestId() == guestID {
			if s.GetStatus() < last {
				w.t.Errorf("%s after %s", s.GetStatus().Word(), last.Word())
			}
			last = s.GetStatus()
		}
		if r := event.GetResultUploaded(); r.GetGuestId() == guestID {
			if uploaded++; last >= api.GuestStatus_GUEST_STATUS_FINISHED {
				w.t.Error("a result was uploaded after the end")
			}
		}
	}
	if uploaded != 2 {
		w.t.Errorf("%d results were uploaded, want the result and the list", uploaded)
	}
	for id, n := range outcomes {
		if n != 1 {
			w.t.Errorf("command %s has %d outcomes", id, n)
		}
	}
}

// audited looks whether the guest's life is in the host's audit log, and the
// control plane has witnessed it.
func (w *world) audited(h *trial.Host, guestID string) {
	w.t.Helper()
	list, err := trial.Ask(h.AgentCommand(w.ctx, "audit", "list", "--state-dir", trial.StateDir, "-o", "json"), nil)
	if err != nil || list.Code != 0 {
		w.t.Fatalf("%v %s", err, list)
	}
	var doc struct {
		Entries []audit.Entry `json:"entries"`
	}
	if err := json.Unmarshal([]byte(list.Stdout), &doc); err != nil {
		w.t.Fatal(err)
	}
	var life []string
	for _, e := range doc.Entries {
		if e.GuestID == guestID {
			life = append(life, strings.TrimSpace(e.Kind+" "+e.Status))
		}
	}
	for _, want := range []string{audit.KindAccepted, "guest-state accepted", "guest-state started", "result-uploaded", "guest-state finished"} {
		if !slices.Contains(life, want) {
			w.t.Errorf("no %q in the audit log: %q", want, life)
		}
	}
	entries := int64(len(doc.Entries))
	if err := trial.Await(w.ctx, "the witness", func() (bool, error) {
		nodes, err := w.API.Nodes(w.ctx)
		return err == nil && nodes[0].AuditEntries >= entries && len(nodes[0].Alarms) == 0, err
	}); err != nil {
		w.t.Error(err)
	}
	if a, err := trial.Ask(h.AgentCommand(w.ctx, "audit", "verify", "--state-dir", trial.StateDir), nil); err != nil || a.Code != 0 {
		w.t.Errorf("%v %s", err, a)
	}
}
