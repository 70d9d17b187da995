package controltest

import (
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
)

func isIn(n *Node, state control.State) func() bool {
	return func() bool { return n.Status().State == state }
}

func loseQueue(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	Eventually(t, "connected", isIn(n, control.StateConnected))
	s.LoseQueue(t)
	Eventually(t, "the loss named", isIn(n, control.StateConsumerMissing))
	if st := n.Status(); !strings.Contains(st.LastError, "; ") {
		t.Errorf("no remedy in %q", st.LastError)
	}
	appendDone(t, n.Outbox, 5)
	Eventually(t, "events without a queue", func() bool { return empty(t, n.Outbox) })
	s.Restore(t)
	s.Send(t, numbered(1))
	Eventually(t, "the command", func() bool { return n.Inbox.Taken() == 1 && s.Unsettled(t) == 0 })
	Eventually(t, "healed", isIn(n, control.StateConnected))
}

func loseStream(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	Eventually(t, "connected", isIn(n, control.StateConnected))
	s.LoseStream(t)
	appendDone(t, n.Outbox, 5)
	Eventually(t, "the loss named", isIn(n, control.StateStreamMissing))
	s.Send(t, numbered(1))
	Eventually(t, "commands without events", func() bool { return s.Unsettled(t) == 0 })
	s.Restore(t)
	Eventually(t, "the events", func() bool { return empty(t, n.Outbox) })
	if got := count(s.Events(t), api.KindCommandDone); got != 5 {
		t.Errorf("%d events stored, want 5", got)
	}
	Eventually(t, "healed", isIn(n, control.StateConnected))
}

func oversize(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	const command = "019aaf00-0000-7000-8000-000000000001"
	large := api.NewGuestState(Host, command, time.Now(), &api.GuestState{GuestPhase: strings.Repeat("x", api.MaxEventBytes)})
	appendDone(t, n.Outbox, 1)
	if err := n.Outbox.AppendEvents(large); err != nil {
		t.Fatal(err)
	}
	appendDone(t, n.Outbox, 1)
	Eventually(t, "the outbox empty", func() bool { return empty(t, n.Outbox) })
	var got []uint64
	for _, e := range s.Events(t) {
		if r := e.GetCommandRefused(); r != nil && (e.GetCommandId() != command || r.GetRefusal().GetCode() != control.CodeEventOversize) {
			t.Errorf("answered by %v", e)
		}
		if e.GetSequence() > 0 {
			got = append(got, e.GetSequence())
		}
	}
	if len(got) != 3 || got[0] != 1 || got[1] != 2 || got[2] != 3 {
		t.Errorf("events %v, want 1 to 3", got)
	}
}

// outage lasts from after a guest's launch until after its end.
func outage(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	s.Send(t, numbered(1))
	Eventually(t, "the launch", func() bool { return n.Inbox.Taken() == 1 && s.Unsettled(t) == 0 })
	s.Stop(t)
	Eventually(t, "the loss noticed", func() bool { return !n.Status().Connected })
	life := []api.GuestStatus{
		api.GuestStatus_GUEST_STATUS_ACCEPTED, api.GuestStatus_GUEST_STATUS_RUNNING, api.GuestStatus_GUEST_STATUS_FINISHED,
	}
	for _, status := range life {
		if err := n.Outbox.AppendEvents(api.NewGuestState(Host, "", time.Now(), &api.GuestState{Status: status})); err != nil {
			t.Fatal(err)
		}
	}
	s.Start(t)
	Eventually(t, "the outcome", func() bool { return empty(t, n.Outbox) })
	var told []api.GuestStatus
	for _, e := range s.Events(t) {
		if g := e.GetGuestState(); g != nil {
			told = append(told, g.GetStatus())
		}
	}
	if len(told) != 3 || told[0] != life[0] || told[1] != life[1] || told[2] != life[2] {
		t.Errorf("told %v", told)
	}
}

func revoked(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	Eventually(t, "connected", isIn(n, control.StateConnected))
	s.Revoke(t)
	Eventually(t, "the refusal named", func() bool { return n.Status().State == control.StateAuthRefused && !n.Status().Connected })
	if st := n.Status(); !strings.Contains(st.LastError, "enrol") {
		t.Errorf("no remedy in %q", st.LastError)
	}
	appendDone(t, n.Outbox, 5)
	s.Send(t, numbered(1))
	s.Renew(t)
	Eventually(t, "everything through", func() bool { return n.Inbox.Taken() == 1 && empty(t, n.Outbox) && s.Unsettled(t) == 0 })
	if got := count(s.Events(t), api.KindCommandDone); got != 5 {
		t.Errorf("%d events stored, want 5", got)
	}
}

// replaced renews an identity as an operator should: the new one is in the
// file before the old one ends.
func replaced(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	Eventually(t, "connected", isIn(n, control.StateConnected))
	s.Renew(t)
	appendDone(t, n.Outbox, 5)
	Eventually(t, "events by the old one", func() bool { return empty(t, n.Outbox) })
	s.Cut(t)
	s.Send(t, numbered(1))
	appendDone(t, n.Outbox, 5)
	Eventually(t, "everything by the new one", func() bool { return n.Inbox.Taken() == 1 && empty(t, n.Outbox) && s.Unsettled(t) == 0 })
	if got := count(s.Events(t), api.KindCommandDone); got != 10 {
		t.Errorf("%d events stored, want 10", got)
	}
}

// calamity does everything to the link, one after the other, under commands
// and events.
func calamity(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	sent := 0
	for _, fault := range []struct{ harm, heal func(testing.TB) }{
		{s.Cut, s.Cut}, {s.LoseQueue, s.Restore}, {s.Stop, s.Start}, {s.Revoke, s.Renew}, {s.Cut, s.Cut},
	} {
		fault.harm(t)
		appendDone(t, n.Outbox, 20)
		fault.heal(t)
		appendDone(t, n.Outbox, 20)
		s.Send(t, numbered(sent))
		sent++
	}
	Eventually(t, "everything through", func() bool { return n.Inbox.Taken() == sent && empty(t, n.Outbox) && s.Unsettled(t) == 0 })
	last := uint64(0)
	for _, e := range s.Events(t) {
		if e.GetSequence() == 0 {
			continue
		}
		if e.GetSequence() != last+1 {
			t.Fatalf("event %d after %d", e.GetSequence(), last)
		}
		last = e.GetSequence()
	}
	if last != 200 {
		t.Errorf("%d events stored, want 200", last)
	}
}
