package link_test

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
)

// connections that reached the server, and where the last came from.
func (w *world) connections() (int, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.sources) == 0 {
		return 0, ""
	}
	return len(w.sources), w.sources[len(w.sources)-1]
}

// The world's names and routes are the process's: no t.Parallel here.

func TestARouterThatForgetsItsTranslationsIsSurvived(t *testing.T) { //nolint:paralleltest // see above
	w := newWorld(t, 0)
	w.traffic(5, 100)
	before, source := w.connections()
	if !strings.HasPrefix(source, "198.51.100.2:") {
		t.Fatalf("not translated: %s", source)
	}
	// The live connection's packets come from another address from now on,
	// which the server has no connection with.
	w.rules("198.51.100.200:20000-30000")
	w.forget()
	w.traffic(5, 100)
	controltest.Eventually(t, "a connection by the new address", func() bool {
		n, source := w.connections()
		return n > before && strings.HasPrefix(source, "198.51.100.200:")
	})
	w.traffic(5, 100)
	w.settled()
}

func TestPacketsThatGetLostCostTimeOnly(t *testing.T) { //nolint:paralleltest // see above
	w := newWorld(t, 0)
	w.rules("198.51.100.2", "numgen random mod 100 < 15 counter drop")
	w.traffic(15, 4000)
	w.settled()
	rules, err := w.router.Output(t.Context(), "nft", "list", "ruleset")
	w.must(err)
	if strings.Contains(rules, "counter packets 0 ") || !strings.Contains(rules, "counter packets") {
		t.Errorf("nothing was lost:\n%s", rules)
	}
}

func TestASlowPathCostsTimeOnly(t *testing.T) { //nolint:paralleltest // see above
	w := newWorld(t, 300*time.Millisecond)
	w.traffic(5, 4000)
	w.settled()
	if n, _ := w.connections(); n != 1 {
		t.Errorf("%d connections: slow was taken for dead", n)
	}
}

func TestAPathThatGoesSilentIsGivenUpAndComesBack(t *testing.T) { //nolint:paralleltest // see above
	w := newWorld(t, 0)
	w.traffic(5, 100)
	controltest.Eventually(t, "connected", w.connected)
	w.rules("198.51.100.2", "drop") // no reset, no FIN: either side is alone
	w.traffic(5, 100)
	controltest.Eventually(t, "the dead man", func() bool { return !w.node.Status().Connected })
	w.rules("198.51.100.2")
	controltest.Eventually(t, "connected again", w.connected)
	// Half of it: what the server says does not arrive.
	w.rules("198.51.100.2", "ip saddr "+here+" drop")
	w.traffic(5, 100)
	controltest.Eventually(t, "the dead man again", func() bool { return !w.node.Status().Connected })
	w.rules("198.51.100.2")
	w.settled()
}

func TestAPathThatSwallowsLargePacketsIsNamedAndOutlasted(t *testing.T) { //nolint:paralleltest // see above
	w := newWorld(t, 0)
	w.traffic(2, 100)
	controltest.Eventually(t, "connected", w.connected)
	w.rules("198.51.100.2", "meta length > 900 drop") // and nobody is told
	w.traffic(5, 20_000)
	controltest.Eventually(t, "the loss noticed", func() bool { return w.node.Status().State != control.StateConnected })
	controltest.Eventually(t, "the cause told", func() bool { return w.node.Status().LastError != "" })
	w.rules("198.51.100.2")
	w.settled()
}

func TestAServerThatMovesIsFoundByItsName(t *testing.T) { //nolint:paralleltest // see above
	w := newWorld(t, 0)
	w.traffic(3, 100)
	controltest.Eventually(t, "connected", w.connected)
	w.resolve("") // the name is gone before the server is
	w.unlisten()
	w.traffic(3, 100)
	controltest.Eventually(t, "no such name", func() bool {
		st := w.node.Status()
		return st.State == control.StateUnreachable && strings.Contains(st.LastError, name)
	})
	w.listen(there)
	w.resolve(there)
	w.traffic(3, 100)
	w.settled()
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func evidence(size int) *api.Event {
	return api.NewEvidence(host, "", time.Now(), "g", make([]byte, size))
}

// A day's worth of a busy host in one outage: what waits is on disk.
func TestAnOutageIsHeldOnDiskAndNotInMemory(t *testing.T) { //nolint:paralleltest // see above
	w := newWorld(t, 0)
	controltest.Eventually(t, "connected", w.connected)
	w.rules("198.51.100.2", "drop")
	before := heap()
	const events, size = 80, 400_000
	for range events {
		w.must(w.store.AppendEvents(evidence(size)))
	}
	if grown := int64(heap()) - int64(before); grown > 8<<20 {
		t.Errorf("%d MiB in memory for %d MiB that wait", grown>>20, events*size>>20)
	}
	share, err := w.store.OutboxShare()
	w.must(err)
	if share < 5 {
		t.Errorf("the outbox is filled to %d percent", share)
	}
	w.rules("198.51.100.2")
	w.settled()
	runtime.KeepAlive(w)
}
