//go:build emulated

package fault_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/tests/fault"
)

// crash is one case of the matrix: the point, POINT=FAULT when it is not to be
// killed there and then, and how to get there.
type crash struct {
	at string
	by func(w *world, t *testing.T, at string)
}

// matrix is every point of a guest's life, from the list of steps, and a few
// more: the call to libvirt, or parts of a result, under way.
func matrix() []crash {
	var all []crash
	add := func(by func(*world, *testing.T, string), points ...string) {
		for _, p := range points {
			all = append(all, crash{p, by})
		}
	}
	add((*world).killedAt, lifecycle.Points()...)
	add((*world).killedAt, lifecycle.StopPoints()...)
	add((*world).killedAt, "inside:domain=kill(50ms)", "inside:domain=kill(300ms)", "inside:domain=kill(1s)", "undoing=kill(20ms)")
	add((*world).killedDelivering, lifecycle.UploadPoints(fault.ResultName)...)
	add((*world).killedDelivering, "sending:"+fault.ResultName+"=kill(20ms)", "granted:"+fault.ResultName+"=kill(20ms)")
	return all
}

// The agent's own process is killed at every point of launch, run and
// teardown; the next one adopts or undoes, and nothing is left.
func TestTheAgentIsKilledAtEveryPoint(t *testing.T) {
	w, chosen := newWorld(t), third(t)
	for i, c := range matrix() {
		if !chosen(i) {
			continue
		}
		t.Run(strings.NewReplacer(":", "-", "=", "-").Replace(c.at), func(t *testing.T) { c.by(w, t, c.at) })
		if t.Failed() {
			t.Fatalf("stopped at %s: what it left would be found in the next case", c.at)
		}
	}
}

func (w *world) killedAt(t *testing.T, point string) {
	t.Helper()
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
	w.sendTo(t, o, point)
	stop := teardown(point)
	if stop {
		w.stop(t, o)
	}
	if !w.died(t, fault.Recovery) {
		t.Fatalf("the agent did not come to %s", point)
	}
	w.recover(t, o, stop)
}

// sendTo sends a launch to an agent that is to be killed at a point.
func (w *world) sendTo(t *testing.T, o *fault.Order, point string) {
	t.Helper()
	armed := point
	if !strings.Contains(point, "=") {
		armed += "=kill"
	}
	if err := w.SetFaults(armed); err != nil {
		t.Fatal(err)
	}
	if err := w.Send(t.Context(), o); err != nil {
		t.Fatal(err)
	}
}

// killedDelivering kills the agent while a guest's result goes up in parts; the
// next one goes on with it, and the guest finishes with all it delivered.
func (w *world) killedDelivering(t *testing.T, point string) {
	t.Helper()
	o, err := w.Delivery()
	if err != nil {
		t.Fatal(err)
	}
	w.sendTo(t, o, point)
	answered := make(chan error, 1)
	within, cancel := context.WithTimeout(w.t.Context(), 2*fault.Recovery)
	defer cancel()
	go func() { answered <- w.Answer(within, o.GetGuestId()) }()
	if !w.died(t, fault.Recovery) {
		t.Fatalf("the agent did not come to %s", point)
	}
	if err := w.SetFaults(); err != nil {
		t.Fatal(err)
	}
	if err := w.StartAgent(w.t.Context()); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := <-answered; err != nil {
		t.Fatalf("its delivery does not end: %v", err)
	}
	g, err := w.Ended(within, o.GetGuestId())
	if err != nil {
		t.Fatal(err)
	}
	if s, err := g.GuestState(); err != nil || s.GetStatus() != api.GuestStatus_GUEST_STATUS_FINISHED {
		t.Errorf("ended as %v, %v", s, err)
	}
	if err := errors.Join(w.Clean(within), w.Once(within, o.GetGuestId()), w.Delivered(within, o.GetGuestId()), w.Intact(within)); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took > fault.Recovery {
		t.Errorf("it took %v", took)
	}
	t.Logf("delivered within %.1f s", time.Since(begun).Seconds())
}

// teardown reports whether a point comes only once the guest is to end.
func teardown(point string) bool {
	for _, prefix := range []string{"undoing", "undone:", "gone:", "ended", "stopping"} {
		if strings.HasPrefix(point, prefix) {
			return true
		}
	}
	return false
}

// stop stops a guest once it is started.
func (w *world) stop(t *testing.T, o *fault.Order) {
	t.Helper()
	if _, err := w.Started(t.Context(), o.GetGuestId()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.API.Stop(t.Context(), o.GetGuestId(), time.Second); err != nil {
		t.Fatal(err)
	}
}
