package controlplane

import (
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
)

// What a node said last counts, not what arrived last: an outbox may hold old
// news.
func TestTheNewestCapabilityIsShownWithWhatChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	w.ready(host)
	report := func(firmware string, at time.Time) *api.Event {
		return api.NewEvent(host, "", at, &api.Event_Capability{Capability: &api.Capability{
			Protocol: api.CapabilityVersion, SevSnp: &api.SEVSNP{FirmwareVersion: firmware}, Changed: []string{"sev_snp.firmware_version"},
		}})
	}
	now := time.Now()
	if err := n.store.AppendEvents(report("1.55.50", now.Add(time.Minute)), report("1.55.49", now)); err != nil {
		t.Fatal(err)
	}
	controltest.Eventually(t, "both reports", func() bool {
		seen := 0
		for _, e := range w.events() {
			if len(e.GetCapability().GetChanged()) > 0 {
				seen++
			}
		}
		return seen == 2
	})
	nodes, err := w.Client.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(nodes) != 1 || !strings.Contains(string(nodes[0].Capability), `1.55.50`) || !strings.Contains(string(nodes[0].Capability), `changed`) {
		t.Errorf("%s", nodes[0].Capability)
	}
}
