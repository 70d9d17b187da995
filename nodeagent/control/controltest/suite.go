package controltest

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/inbox/inboxtest"
)

// Host is the host the suite's link belongs to.
const Host = "node-a"

// Server is a message server as the suite drives it.
type Server interface {
	Transport() control.Transport
	Send(t testing.TB, raw []byte)
	// Events are the stored events of Host, in order, each once.
	Events(t testing.TB) []*api.Event
	// Unsettled is the number of commands of Host not yet acknowledged.
	Unsettled(t testing.TB) int
	// Cut breaks every connection of Host.
	Cut(t testing.TB)
	Stop(t testing.TB)
	Start(t testing.TB)
	// LoseQueue deletes the queue of Host, LoseStream the stream of events
	// with what it holds; Restore makes both as they were, empty.
	LoseQueue(t testing.TB)
	LoseStream(t testing.TB)
	Restore(t testing.TB)
	// Revoke ends the identity that Transport uses, also where it is in use;
	// Renew puts another in its place, where Transport finds it.
	Revoke(t testing.TB)
	Renew(t testing.TB)
}

// Receiver remembers what it took.
type Receiver struct {
	mu   sync.Mutex
	got  map[string]int
	fail func(raw []byte) error
}

// Receive implements control.Receiver.
func (r *Receiver) Receive(_ context.Context, raw []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		if err := r.fail(raw); err != nil {
			return err
		}
	}
	if r.got == nil {
		r.got = map[string]int{}
	}
	r.got[string(raw)]++
	return nil
}

// FailWith makes Receive ask f first.
func (r *Receiver) FailWith(f func(raw []byte) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail = f
}

// Taken is how many different messages were taken.
func (r *Receiver) Taken() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.got)
}

// Times is how often a message was taken.
func (r *Receiver) Times(raw []byte) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.got[string(raw)]
}

// Node is a link with its surroundings.
type Node struct {
	*control.Link
	Inbox  *Receiver
	Outbox *inboxtest.Journal
	// Stop ends the link, as the test's end does.
	Stop func()
}

// StartNode runs a link until the test's end.
func StartNode(t *testing.T, transport control.Transport, edit func(*control.Deps)) *Node {
	t.Helper()
	n := &Node{Inbox: &Receiver{}, Outbox: inboxtest.New(1)}
	deps := control.Deps{
		Transport: transport, Inbox: n.Inbox, Outbox: n.Outbox, HostID: Host,
		Heartbeat:  func() *api.Heartbeat { return &api.Heartbeat{} },
		Capability: func() *api.Capability { return &api.Capability{Protocol: api.CapabilityVersion} },
		Interval:   time.Minute, DeadMan: 20 * time.Second, Logger: hclog.NewNullLogger(),
	}
	if edit != nil {
		edit(&deps)
	}
	var err error
	if n.Link, err = control.New(deps); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	n.Stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("running link: %v", err)
		}
	})
	t.Cleanup(n.Stop)
	return n
}

// Eventually waits until the condition holds.
func Eventually(tb testing.TB, what string, condition func() bool) {
	tb.Helper()
	deadline := time.NewTimer(2 * time.Minute)
	defer deadline.Stop()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for !condition() {
		select {
		case <-deadline.C:
			tb.Fatalf("never happened: %s", what)
		case <-look.C:
		}
	}
}

func numbered(i int) []byte { return binary.BigEndian.AppendUint32([]byte("command "), uint32(i)) }

func count(events []*api.Event, kind string) (n int) {
	for _, e := range events {
		if api.EventKind(e) == kind {
			n++
		}
	}
	return n
}

func appendDone(tb testing.TB, j *inboxtest.Journal, n int) {
	tb.Helper()
	for range n {
		if err := j.AppendEvents(api.NewDone(Host, api.NewID(), time.Now())); err != nil {
			tb.Fatal(err)
		}
	}
}

func empty(tb testing.TB, j *inboxtest.Journal) bool {
	tb.Helper()
	n, err := j.OutboxLen()
	if err != nil {
		tb.Fatal(err)
	}
	return n == 0
}

// Suite is what every transport must do. run calls its body with a running
// server that knows Host and has stored nothing.
func Suite(t *testing.T, run func(t *testing.T, body func(t *testing.T, s Server))) {
	t.Helper()
	for name, body := range map[string]func(t *testing.T, s Server){
		"commands are delivered and settled once":        deliver,
		"commands that were not stored come again":       redeliver,
		"events leave in order, each stored once":        publish,
		"a capability follows every connect":             introduce,
		"commands and events survive cut connections":    cut,
		"commands and events survive a server's restart": restart,
		"a link started before its server waits for it":  late,
		"a deleted queue is named, and heals":            loseQueue,
		"a wiped event stream is named, and heals":       loseStream,
		"an event too large is answered for by another":  oversize,
		"a guest that lives while the link is down":      outage,
		"a revoked identity is named, a new one heals":   revoked,
		"an identity replaced in time is not noticed":    replaced,
		"everything that waits is told after all of it":  calamity,
		"two hosts with one identity both see it":        clone,
		"a host that starts again is no clone":           reborn,
	} {
		t.Run(name, func(t *testing.T) { run(t, body) })
	}
}

func deliver(t *testing.T, s Server) {
	t.Helper()
	const many = 300 // far beyond one pull
	for i := range many / 2 {
		s.Send(t, numbered(i))
	}
	n := StartNode(t, s.Transport(), nil)
	Eventually(t, "the first command", func() bool { return n.Inbox.Taken() > 0 })
	for i := range many / 2 {
		s.Send(t, numbered(many/2+i))
	}
	Eventually(t, "every command taken and settled", func() bool { return n.Inbox.Taken() == many && s.Unsettled(t) == 0 })
	for i := range many {
		if n.Inbox.Times(numbered(i)) != 1 {
			t.Errorf("command %d was delivered %d times", i, n.Inbox.Times(numbered(i)))
		}
	}
	if st := n.Status(); !st.Connected || st.State != control.StateConnected || st.LastRoundTrip.IsZero() || st.Server == "" {
		t.Errorf("status %+v", st)
	}
}

func redeliver(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	var mu sync.Mutex
	failures := 0
	n.Inbox.FailWith(func([]byte) error {
		mu.Lock()
		defer mu.Unlock()
		if failures++; failures <= 2 {
			return errors.New("disk full")
		}
		return nil
	})
	s.Send(t, numbered(1))
	Eventually(t, "the command taken and settled", func() bool { return n.Inbox.Taken() == 1 && s.Unsettled(t) == 0 })
	mu.Lock()
	defer mu.Unlock()
	if failures != 3 {
		t.Errorf("delivered %d times", failures)
	}
}

func publish(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	appendDone(t, n.Outbox, 200)
	Eventually(t, "the outbox empty", func() bool { return empty(t, n.Outbox) })
	last := uint64(0)
	for _, e := range s.Events(t) {
		if e.GetCommandDone() == nil {
			continue
		}
		if e.GetSequence() != last+1 {
			t.Fatalf("event %d after %d", e.GetSequence(), last)
		}
		last = e.GetSequence()
	}
	if last != 200 {
		t.Errorf("%d events stored", last)
	}
}

func introduce(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	seen := func(want int) func() bool {
		return func() bool {
			events := s.Events(t)
			return count(events, api.KindCapability) >= want && count(events, api.KindHeartbeat) >= want
		}
	}
	Eventually(t, "a capability and a heartbeat", seen(1))
	s.Cut(t)
	Eventually(t, "the next after the cut", seen(2))
	n.Announce()
	Eventually(t, "the next after an announcement", seen(3))
}

func cut(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	for i := range 5 {
		s.Send(t, numbered(i))
		appendDone(t, n.Outbox, 10)
		s.Cut(t)
		Eventually(t, "everything through", func() bool { return n.Inbox.Taken() == i+1 && empty(t, n.Outbox) })
	}
	if got := count(s.Events(t), api.KindCommandDone); got != 50 {
		t.Errorf("%d events stored, want 50", got)
	}
}

func restart(t *testing.T, s Server) {
	t.Helper()
	n := StartNode(t, s.Transport(), nil)
	s.Send(t, numbered(1))
	Eventually(t, "the first command", func() bool { return s.Unsettled(t) == 0 })
	s.Stop(t)
	Eventually(t, "the loss noticed", func() bool { return !n.Status().Connected })
	if st := n.Status(); st.LastError == "" || st.State != control.StateUnreachable {
		t.Errorf("status %+v", st)
	}
	appendDone(t, n.Outbox, 10)
	s.Start(t)
	s.Send(t, numbered(2))
	Eventually(t, "everything through", func() bool { return n.Inbox.Taken() == 2 && empty(t, n.Outbox) && s.Unsettled(t) == 0 })
	if st := n.Status(); !st.Connected || st.LastError != "" {
		t.Errorf("status %+v", st)
	}
}

func late(t *testing.T, s Server) {
	t.Helper()
	s.Stop(t)
	n := StartNode(t, s.Transport(), nil)
	Eventually(t, "the first failure", func() bool { return n.Status().State == control.StateUnreachable })
	s.Start(t)
	s.Send(t, numbered(1))
	Eventually(t, "the command", func() bool { return s.Unsettled(t) == 0 })
}
