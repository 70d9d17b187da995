package capability_test

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/capability"
	"github.com/confidential-node/agent/nodeagent/store"
)

func TestAChangeIsToldOnceAlsoAcrossARestart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	open := func() *store.Store {
		s, err := store.Open(path, time.Now, hclog.NewNullLogger())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	silent := func(c *api.Capability) *api.Capability { c.Components[0].Observed = ""; return c }
	report := func(firmware string, free uint32) *api.Capability {
		return &api.Capability{
			Protocol: api.CapabilityVersion, SevSnp: &api.SEVSNP{FirmwareVersion: firmware, Asids: &api.ASIDs{Total: 99, Free: &free}},
			Components: []*api.Component{{Name: "qemu", Observed: "10.1.0"}},
		}
	}
	s := open()
	for i, c := range []struct {
		report  *api.Capability
		restart bool
		want    []string
	}{
		{report("1.55.49", 9), false, nil}, // the first
		{report("1.55.49", 8), false, nil},
		{report("1.55.49", 7), true, nil},
		{report("1.55.50", 7), true, []string{"sev_snp.firmware_version"}},
		{report("1.55.50", 7), true, nil},
		{silent(report("1.55.50", 7)), true, nil},
		{report("1.55.49", 7), false, []string{"sev_snp.firmware_version"}},
	} {
		if c.restart {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open()
		}
		changed, err := capability.Tell(s, "host-1", time.Now(), c.report)
		if err != nil || !slices.Equal(changed, c.want) {
			t.Fatalf("report %d: changed %q, want %q, %v", i, changed, c.want, err)
		}
	}
	events, err := s.NextEvents(10)
	if err != nil || len(events) != 2 {
		t.Fatalf("%d events, %v", len(events), err)
	}
	first := events[0].GetCapability()
	if first.GetSevSnp().GetFirmwareVersion() != "1.55.50" || first.GetComponents()[0].GetObserved() != "10.1.0" || !slices.Equal(first.GetChanged(), []string{"sev_snp.firmware_version"}) || events[0].GetHostId() != "host-1" {
		t.Errorf("%v", events[0])
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
