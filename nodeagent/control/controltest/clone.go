package controltest

import (
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
)

// often makes a link whose heartbeats a test can wait for.
func often(t *testing.T, s Server) *Node {
	t.Helper()
	return StartNode(t, s.Transport(), func(d *control.Deps) { d.Interval = 50 * time.Millisecond })
}

func clone(t *testing.T, s Server) {
	t.Helper()
	a, b := often(t, s), often(t, s)
	Eventually(t, "both told", func() bool { return a.Status().Cloned && b.Status().Cloned })
	b.Stop()
	Eventually(t, "the one left at ease", func() bool { return !a.Status().Cloned })
}

func reborn(t *testing.T, s Server) {
	t.Helper()
	for range 3 {
		n := often(t, s)
		before := count(s.Events(t), api.KindHeartbeat)
		Eventually(t, "heartbeats", func() bool { return count(s.Events(t), api.KindHeartbeat) >= before+5 })
		s.Cut(t)
		Eventually(t, "more of them", func() bool { return count(s.Events(t), api.KindHeartbeat) >= before+10 })
		if n.Status().Cloned {
			t.Error("taken for two")
		}
		n.Stop()
	}
	instances := map[string]uint64{}
	for _, e := range s.Events(t) {
		if h := e.GetHeartbeat(); h != nil {
			if last := instances[string(h.GetInstance())]; h.GetBeat() <= last {
				t.Errorf("beat %d after %d", h.GetBeat(), last)
			}
			instances[string(h.GetInstance())] = h.GetBeat()
		}
	}
	if len(instances) != 3 {
		t.Errorf("%d instances spoke, want 3", len(instances))
	}
}
