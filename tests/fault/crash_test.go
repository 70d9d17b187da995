//go:build emulated

package fault_test

import (
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/tests/fault"
)

// Every point of a guest's life, from the list of steps, and a few more: the
// call to libvirt under way, a stop just recorded.
func cases() []string {
	return append(lifecycle.Points(), "stopping", "inside:domain=kill(50ms)", "inside:domain=kill(300ms)", "inside:domain=kill(1s)", "undoing=kill(20ms)")
}

// The agent's own process is killed at every point of launch, run and
// teardown; the next one adopts or undoes, and nothing is left.
func TestTheAgentIsKilledAtEveryPoint(t *testing.T) {
	w, chosen := newWorld(t), third(t)
	for i, point := range cases() {
		if !chosen(i) {
			continue
		}
		t.Run(strings.NewReplacer(":", "-", "=", "-").Replace(point), func(t *testing.T) { w.killedAt(t, point) })
		if t.Failed() {
			t.Fatalf("stopped at %s: what it left would be found in the next case", point)
		}
	}
}

func (w *world) killedAt(t *testing.T, point string) {
	t.Helper()
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
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
	stop := teardown(point)
	if stop {
		w.stop(t, o)
	}
	if !w.died(t, fault.Recovery) {
		t.Fatalf("the agent did not come to %s", point)
	}
	w.recover(t, o, stop)
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
