package capability

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/firmware/snp/host/hosttest"
	"github.com/confidential-node/agent/nodeagent/api"
)

// reportOf is what an agent on that machine reports.
func reportOf(t *testing.T, s hosttest.Setup, f Facts) *api.Capability {
	t.Helper()
	m := hosttest.Boot(t, s)
	machine := host.Judge(host.New(m.Root, m).Facts())
	f.Kernel = machine.Facts.Kernel.Release
	c := &api.Capability{
		Protocol: api.CapabilityVersion, AgentVersion: "v1", Tee: "sev-snp", Features: []string{"a", "b"}, IssuerEpoch: 1, StoreId: []byte{1},
		MaxVcpus: 8, Images: []*api.BootImage{{FirmwareSha256: []byte{1}, Cmdline: "c"}},
	}
	Fill(c, machine, Judge(f))
	return c
}

func goodFacts() Facts {
	return Facts{
		Libvirt: "11.3.0", QEMU: "10.1.0", Firmware: []Firmware{{"/b.fd", "AmdSev", true}},
		Endorsements: &EndorsementFacts{Findings: []*contract.Refusal{contract.Refuse("endorsements.vcek-missing", "r", "m")}},
	}
}

func TestAReportSaysWhatTheMachineHas(t *testing.T) {
	t.Parallel()
	turin := hosttest.Turin()
	turin.Firmware.Guests, turin.Firmware.VLEKLoaded, turin.ESGuests = 3, true, 2
	c := reportOf(t, turin, goodFacts())
	s := c.GetSevSnp()
	tcb := s.GetReportedTcb()
	if !s.GetEnabled() || s.GetProcessor() != "Turin" || s.GetGeneration() != "Zen 5" || s.GetProduct() != "Turin" || s.GetFirmwareVersion() != "1.58.12" ||
		s.GetCpuFamily() != 0x1A || s.GetKvmVmTypes()>>4&1 != 1 || !s.GetVlekLoaded() || len(s.GetChipIds()) != 2 {
		t.Errorf("%v", s)
	}
	if tcb.GetRaw() != 0x5100000004010101 || tcb.GetSnp() != 4 || tcb.GetMicrocode() != 81 || tcb.GetFmc() != 1 || tcb.GetBootLoader() != 1 || tcb.GetTee() != 1 {
		t.Errorf("%v", tcb)
	}
	if a := s.GetAsids(); a.GetTotal() != 99 || a.Free == nil || a.Returning == nil || a.GetReturning() != 2 {
		t.Errorf("%v", a)
	}
	passthrough := hosttest.Genoa()
	passthrough.Cmdline = "iommu=pt"
	bad := reportOf(t, passthrough, Facts{}).GetSevSnp()
	found := slices.IndexFunc(bad.GetFindings(), func(f *api.Finding) bool { return f.GetCode() == "iommu.passthrough" })
	if bad.GetEnabled() || found < 0 || bad.VlekLoaded != nil {
		t.Fatalf("%v", bad)
	}
	if f := bad.GetFindings()[found]; f.GetLevel() != "blocking" || f.GetRemedy() == "" || f.GetObserved() == "" {
		t.Errorf("%v", f)
	}
	if e := c.GetEndorsements(); e.GetCertificate() != api.Conclusion_CONCLUSION_NO || len(e.GetFindings()) != 1 {
		t.Errorf("%v", e)
	}
	if reportOf(t, turin, Facts{}).GetEndorsements() != nil {
		t.Error("what is not known is reported")
	}
	raw, err := api.MarshalEvent(api.NewEvent("h", "", time.Now(), &api.Event_Capability{Capability: c}))
	if err != nil {
		t.Fatal(err)
	}
	back, err := api.ParseEvent(raw)
	if err != nil || !proto.Equal(back.GetCapability(), c) {
		t.Errorf("%v %v", back, err)
	}
}

func TestOnlyWhatTheHostIsCountsAsAChange(t *testing.T) {
	t.Parallel()
	genoa := hosttest.Genoa()
	updated, busy, pt, exhausted := genoa, genoa, genoa, genoa
	updated.Firmware.Build, updated.Firmware.CurrentTCB, updated.Firmware.ReportedTCB = 50, 0x571b00000000000a, 0x571b00000000000a
	busy.Firmware.Guests = 40
	exhausted.Firmware.Guests = 99
	pt.Cmdline = "iommu=pt"
	facts := func(change func(*Facts)) Facts { f := goodFacts(); change(&f); return f }
	wire := func(change func(*api.Capability)) *api.Capability {
		c := reportOf(t, genoa, goodFacts())
		change(c)
		return c
	}
	gpu := func(g GPU) Facts { return facts(func(f *Facts) { f.GPUs = []GPU{g} }) }
	const bus = "0000:41:00.0"
	withGPU := reportOf(t, genoa, gpu(GPU{Address: bus, Model: "H100", State: "clean", Mode: "on", Offered: true}))
	for name, c := range map[string]struct {
		now  GPU
		want []string
	}{
		"a guest got it":     {GPU{Address: bus, Model: "H100", State: "attached", Mode: "on", Offered: true}, nil},
		"it is verified":     {GPU{Address: bus, Model: "H100", State: "dirty", Mode: "unknown", Offered: true}, nil},
		"it was quarantined": {GPU{Address: bus, Model: "H100", State: "quarantined", Mode: "on", Why: contract.Refuse("gpu.lost", "r", "m")}, []string{"gpus." + bus + ".offered", "gpus." + bus + ".why.code"}},
		"another is there":   {GPU{Address: "0000:42:00.0", Model: "H100", State: "clean", Mode: "on", Offered: true}, []string{"gpus." + bus + ".model", "gpus." + bus + ".name", "gpus." + bus + ".offered", "gpus.0000:42:00.0.model", "gpus.0000:42:00.0.name", "gpus.0000:42:00.0.offered"}},
	} {
		if got := Changed(withGPU, reportOf(t, genoa, gpu(c.now))); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	last := reportOf(t, genoa, goodFacts())
	for name, c := range map[string]struct {
		now  *api.Capability
		want []string
	}{
		"nothing":                 {reportOf(t, genoa, goodFacts()), nil},
		"guests came":             {reportOf(t, busy, goodFacts()), nil},
		"no ASID is left":         {reportOf(t, exhausted, goodFacts()), nil},
		"the epoch":               {wire(func(c *api.Capability) { c.IssuerEpoch, c.StoreId = 2, []byte{2} }), nil},
		"what changed before":     {wire(func(c *api.Capability) { c.Changed = []string{"x"} }), nil},
		"a newer revocation list": {wire(func(c *api.Capability) { c.Endorsements.RevocationListNextUpdate = timestamppb.Now() }), nil},
		"the key service is away": {reportOf(t, genoa, facts(func(f *Facts) {
			f.Endorsements = &EndorsementFacts{Findings: append(f.Endorsements.Findings, contract.Refuse("endorsements.unreachable", "r", "m"))}
		})), nil},
		"firmware update": {reportOf(t, updated, goodFacts()), []string{
			"sev_snp.current_tcb.microcode", "sev_snp.current_tcb.raw", "sev_snp.firmware_version", "sev_snp.reported_tcb.microcode", "sev_snp.reported_tcb.raw",
		}},
		"an older QEMU":     {reportOf(t, genoa, facts(func(f *Facts) { f.QEMU = "10.0.2" })), []string{"components.qemu.meets_gpu", "components.qemu.observed"}},
		"another image":     {wire(func(c *api.Capability) { c.Images = append(c.Images, &api.BootImage{Cmdline: "d"}) }), []string{"images"}},
		"a feature":         {wire(func(c *api.Capability) { c.Features = c.Features[:1] }), []string{"features"}},
		"the certificate":   {wire(func(c *api.Capability) { c.Endorsements.Certificate = api.Conclusion_CONCLUSION_YES }), []string{"endorsements.certificate"}},
		"another chip":      {wire(func(c *api.Capability) { c.SevSnp.ChipIds = []string{"00"} }), []string{"sev_snp.chip_ids"}},
		"a VLEK was loaded": {wire(func(c *api.Capability) { c.SevSnp.VlekLoaded = new(true) }), []string{"sev_snp.vlek_loaded"}},
	} {
		if got := Changed(last, c.now); !slices.Equal(got, c.want) {
			t.Errorf("%s: changed %q, want %q", name, got, c.want)
		}
	}
	changed := Changed(last, reportOf(t, pt, goodFacts()))
	for _, want := range []string{"sev_snp.enabled", "sev_snp.findings.iommu.passthrough.level", "sev_snp.findings.cmdline.trap.level"} {
		if !slices.Contains(changed, want) {
			t.Errorf("no %s in %q", want, changed)
		}
	}
}

func TestAnUnknownIsNoChangeAndHidesNone(t *testing.T) {
	t.Parallel()
	genoa := hosttest.Genoa()
	last := reportOf(t, genoa, goodFacts())
	silent := Keep(last, reportOf(t, genoa, Facts{Firmware: goodFacts().Firmware}))
	if got := Changed(last, silent); got != nil {
		t.Errorf("silence is a change: %q", got)
	}
	newer := goodFacts()
	newer.QEMU = "10.2.0"
	if got := Changed(silent, Keep(silent, reportOf(t, genoa, newer))); !slices.Equal(got, []string{"components.qemu.observed"}) {
		t.Errorf("an update during silence is %q", got)
	}
	if last.GetChanged() != nil || len(last.GetComponents()) != 4 {
		t.Error("the last report was changed")
	}
}
