package main

import (
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/firmware/snp/host/hosttest"
)

func TestTheKernelsOwnWordsExplainWhyThereIsNoSNP(t *testing.T) {
	t.Parallel()
	s := hosttest.Genoa()
	s.NoSNP = true
	m := hosttest.Boot(t, s)
	report := host.Judge(host.New(m.Root, m).Facts())
	before := len(report.Findings)
	report = explained(report, []string{
		"SEV-SNP: RMP table physical range [0x0000 - 0x1000]",
		"AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode, SNP cannot be supported.",
		"AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode, SNP cannot be supported.",
		"ccp 0000:22:00.1: SEV-SNP: failed to INIT error 0x13, rc -5",
		"usb 1-1: new device",
	})
	added := report.Findings[before:]
	if len(added) != 2 || added[0].Code != "host.iommu-passthrough" || added[1].Code != "host.psp-init" {
		t.Fatalf("added %+v", added)
	}
	for _, f := range added {
		if f.Level != host.Blocking || f.Remedy == "" || f.Observed == "" {
			t.Errorf("%+v", f)
		}
	}
	if !strings.Contains(report.Why(), "host.psp-init") {
		t.Errorf("why: %s", report.Why())
	}
}
