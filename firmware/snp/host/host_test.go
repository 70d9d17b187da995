package host_test

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/firmware/snp/host/hosttest"
	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

func report(t *testing.T, s hosttest.Setup, after ...func(*hosttest.Machine)) host.Report {
	t.Helper()
	m := hosttest.Boot(t, s)
	for _, f := range after {
		f(m)
	}
	return host.Judge(host.New(m.Root, m).Facts())
}

// codes of a report's findings, of one level or of all.
func codes(r host.Report, levels ...host.Level) []string {
	var out []string
	for _, f := range r.Findings {
		if len(levels) == 0 || slices.Contains(levels, f.Level) {
			out = append(out, f.Code)
		}
	}
	return out
}

func setup(base hosttest.Setup, change func(*hosttest.Setup)) hosttest.Setup {
	change(&base)
	return base
}

func TestAGoodHostIsEnabledWithEverythingKnown(t *testing.T) {
	t.Parallel()
	r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.Firmware.Guests, s.ESGuests = 3, 1 }))
	if !r.Enabled || r.Why() != "" || !slices.Equal(codes(r), []string{"sev-es.off"}) {
		t.Errorf("enabled %v, findings %+v", r.Enabled, r.Findings)
	}
	if *r.Processor != (host.Processor{Name: "Genoa", Generation: "Zen 4", Product: "Genoa"}) || r.Firmware.Version != "1.55.49" || r.Firmware.State != "initialized" {
		t.Errorf("%+v %+v", r.Processor, r.Firmware)
	}
	if r.CurrentTCB.Parts != (contract.TCB{BootLoader: 10, SNP: 0x1b, Microcode: 0x56}) || r.CurrentTCB.Raw != 0x561b00000000000a {
		t.Errorf("%+v", r.CurrentTCB)
	}
	if a := r.ASIDs; a.Total != 99 || *a.Used != 4 || *a.Free != 95 || *a.Returning != 1 || a.Source != "misc controller" {
		t.Errorf("%+v", a)
	}
	if r.VLEKLoaded == nil || *r.VLEKLoaded || r.RMP.Mode != host.RMPContiguous || r.RMP.Covers != host.CoversYes || r.RMP.Size < r.RMP.Required {
		t.Errorf("VLEK %v, RMP %+v", r.VLEKLoaded, r.RMP)
	}
	f := r.Facts
	if len(f.Unread) != 0 || f.MemoryEnd != 256<<30 || len(f.ChipIDs) != 1 || !strings.HasPrefix(f.ChipIDs[0], "a1b2") || f.Encryption.CBit != 51 || f.Encryption.ReducedPhysBits != 5 || f.Encryption.VMPLs != 4 {
		t.Errorf("%+v", f)
	}
}

// With a segmented RMP the END register is 0, which other tools take for a
// missing table.
func TestASegmentedRMPIsNotMistakenForAMissingOne(t *testing.T) {
	t.Parallel()
	r := report(t, hosttest.Turin())
	if !r.Enabled || r.Processor.Name != "Turin" || r.CurrentTCB.Parts != (contract.TCB{FMC: 1, BootLoader: 1, TEE: 1, SNP: 4, Microcode: 0x51}) {
		t.Errorf("%v %+v %+v", r.Enabled, r.Findings, r.CurrentTCB)
	}
	if r.RMP.Mode != host.RMPSegmented || r.RMP.Covers != host.CoversYes || r.RMP.SegmentSize != 1<<38 || r.Facts.MSRs.RMPEnd != 0 {
		t.Errorf("%+v %+v", r.RMP, r.Facts.MSRs)
	}
	if len(r.Facts.ChipIDs) != 2 {
		t.Errorf("%v", r.Facts.ChipIDs)
	}
}

// One row per cause: the report says no, and names it.
func TestEveryCauseIsNamed(t *testing.T) {
	t.Parallel()
	parameter := func(p string) func(*hosttest.Setup) {
		return func(s *hosttest.Setup) { s.Cmdline += " " + p }
	}
	for name, c := range map[string]struct {
		change func(*hosttest.Setup)
		code   string
		remedy string
	}{
		"a virtual machine":      {func(s *hosttest.Setup) { s.VirtualMachine = true }, "machine.virtual", "bare-metal"},
		"another vendor":         {func(s *hosttest.Setup) { s.Vendor, s.NoSNP = "GenuineIntel", true }, "processor.not-eligible", "EPYC"},
		"a desktop chip":         {func(s *hosttest.Setup) { s.Model, s.NoSNP = 0x61, true }, "processor.not-eligible", "EPYC"},
		"silicon without SNP":    {func(s *hosttest.Setup) { s.NoSNP = true }, "processor.no-snp", "SMEE"},
		"SMEE off":               {func(s *hosttest.Setup) { s.EncryptionOff = true }, "bios.memory-encryption-off", "SMEE"},
		"no ASIDs":               {func(s *hosttest.Setup) { s.MinSEVASID = 1 }, "bios.no-asids", "ASID Space Limit"},
		"no RMP":                 {func(s *hosttest.Setup) { s.RMPSize = 0 }, "bios.rmp-not-reserved", "RMP Table"},
		"an RMP for half":        {func(s *hosttest.Setup) { s.RMPSize /= 2 }, "bios.rmp-not-covering", "RMP Table"},
		"RMP segments too small": {func(s *hosttest.Setup) { *s = hosttest.Turin(); s.RMPSegmentBits = 30 }, "bios.rmp-not-covering", "RMP Table"},
		"legacy boot":            {func(s *hosttest.Setup) { s.LegacyBoot = true }, "bios.legacy-boot", "UEFI"},
		"IOMMU off in the BIOS":  {func(s *hosttest.Setup) { s.IOMMUOff = true }, "iommu.off", "NBIO"},
		"IOMMU without SNP":      {func(s *hosttest.Setup) { s.IOMMUNoSNP = true }, "iommu.no-snp", "SEV-SNP Support"},
		"passthrough by default": {func(s *hosttest.Setup) { s.PassthroughDefault = true }, "iommu.passthrough", "add iommu=nopt"},
		"passthrough in effect":  {parameter("iommu.passthrough=1"), "iommu.passthrough", "remove iommu=pt"},
		"iommu=pt":               {parameter("iommu=pt"), "cmdline.trap", "remove iommu=pt"},
		"iommu.passthrough=1":    {parameter("iommu.passthrough=1"), "cmdline.trap", "remove iommu.passthrough=1"},
		"amd_iommu=off":          {parameter("amd_iommu=off"), "cmdline.trap", "remove amd_iommu=off"},
		"amd_iommu=pgtbl_v2":     {parameter("amd_iommu=pgtbl_v2"), "cmdline.trap", "remove amd_iommu=pgtbl_v2"},
		"sev=nosnp":              {parameter("sev=nosnp"), "cmdline.trap", "remove sev=nosnp"},
		"kvm_amd.sev_snp=0":      {parameter("kvm_amd.sev_snp=0"), "module.parameter-off", "kvm_amd.sev_snp"},
		"kvm_amd.sev=0":          {parameter("kvm_amd.sev=0"), "module.parameter-off", "kvm_amd.sev "},
		"kvm_amd.npt=0":          {parameter("kvm_amd.npt=0"), "module.parameter-off", "kvm_amd.npt"},
		"kvm.mmio_caching=0":     {parameter("kvm.mmio_caching=0"), "module.parameter-off", "kvm.mmio_caching"},
		"SEV-ES off by command":  {parameter("kvm_amd.sev_es=0"), "cmdline.trap", "remove kvm_amd.sev_es=0"},
		"an old kernel":          {func(s *hosttest.Setup) { s.Release = "6.1.0-18-amd64" }, "kernel.too-old", "6.11"},
		"a kernel without SEV":   {func(s *hosttest.Setup) { s.WithoutSEV = true }, "kernel.without-sev", "CONFIG_KVM_AMD_SEV"},
		"the flag withdrawn":     {func(s *hosttest.Setup) { s.RMPSize = 0 }, "kernel.cleared-snp", "kernel log"},
		"SNP not switched on":    {parameter("iommu=pt"), "kernel.snp-not-switched-on", "kernel log"},
		"no kvm_amd":             {func(s *hosttest.Setup) { s.NoKVM = true }, "module.kvm-amd-missing", "modprobe kvm_amd"},
		"no /dev/kvm":            {func(s *hosttest.Setup) { s.NoKVM = true }, "kvm.unknown", "dev/kvm"},
		"no ccp":                 {func(s *hosttest.Setup) { s.NoCCP = true }, "firmware.no-device", "modprobe ccp"},
		"old firmware":           {func(s *hosttest.Setup) { s.Firmware.APIMinor = 49 }, "firmware.too-old", "BIOS"},
		"chip key masked":        {func(s *hosttest.Setup) { s.Firmware.MaskChipKey = true }, "firmware.chip-key-masked", "--mask-chip-key=false"},
		"chip id masked":         {func(s *hosttest.Setup) { s.Firmware.MaskChipID = true }, "firmware.chip-id-masked", "--mask-chip-id=false"},
		"KVM says no":            {parameter("iommu=pt"), "kvm.no-snp", "other findings"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := report(t, setup(hosttest.Genoa(), c.change))
			if r.Enabled || r.Why() == "" {
				t.Errorf("enabled: %+v", r.Findings)
			}
			i := slices.IndexFunc(r.Findings, func(f host.Finding) bool { return f.Code == c.code && strings.Contains(f.Remedy, c.remedy) })
			if i < 0 || r.Findings[i].Level != host.Blocking || r.Findings[i].Message == "" {
				t.Errorf("no blocking %s with remedy %q in %+v", c.code, c.remedy, r.Findings)
			}
		})
	}
}

// One row per rule that leaves the host enabled.
func TestWhatDoesNotBlockIsSaidToo(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*hosttest.Setup)
		code   string
		level  host.Level
	}{
		"Milan":              {func(s *hosttest.Setup) { s.Model = 0x01 }, "processor.milan-excluded", host.Warning},
		"aliases unchecked":  {func(s *hosttest.Setup) { s.Firmware.AliasCheckComplete = false }, "firmware.alias-check-incomplete", host.Warning},
		"firmware 1.52":      {func(s *hosttest.Setup) { s.Firmware.APIMinor = 52 }, "firmware.below-1.55", host.Warning},
		"ASIDs used up":      {func(s *hosttest.Setup) { s.Firmware.Guests = 99 }, "asids.exhausted", host.Warning},
		"unknown flag":       {func(s *hosttest.Setup) { s.Firmware.UnknownFlags = 0x80 }, "firmware.unknown-bits", host.Warning},
		"unknown config":     {func(s *hosttest.Setup) { s.Firmware.UnknownConfig = 1 << 20 }, "firmware.unknown-bits", host.Warning},
		"patched for SEV-ES": {func(s *hosttest.Setup) { s.PatchedForES = true }, "sev-es.off", host.Note},
		"TCB held back":      {func(s *hosttest.Setup) { s.Firmware.ReportedTCB = 0x541b00000000000a }, "tcb.held-back", host.Note},
		"VLEK loaded":        {func(s *hosttest.Setup) { s.Firmware.VLEKLoaded = true }, "vlek.loaded", host.Note},
		"SMT":                {func(s *hosttest.Setup) { s.SMT = true }, "smt.on", host.Note},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := report(t, setup(hosttest.Genoa(), c.change))
			if !r.Enabled || !slices.Contains(codes(r, c.level), c.code) {
				t.Errorf("enabled %v, findings %+v", r.Enabled, r.Findings)
			}
		})
	}
	if r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.PatchedForES = false })); len(r.Findings) != 0 {
		t.Errorf("a host with nothing to say says %+v", r.Findings)
	}
}

// A BIOS that gives all ASIDs to SNP leaves none to plain SEV.
func TestPlainSEVIsNotDemanded(t *testing.T) {
	t.Parallel()
	r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.MinSEVASID = s.MaxASID + 1 }))
	if !r.Enabled || r.Facts.Modules.KVMAMD["sev"] != "N" || !slices.Equal(codes(r), []string{"sev-es.off"}) || r.ASIDs.Total != 1006 {
		t.Errorf("%v %+v %+v", r.Enabled, r.Findings, r.ASIDs)
	}
}

// A trap that the kernel did not fall into only warns: KVM has the last word.
func TestKVMHasTheLastWord(t *testing.T) {
	t.Parallel()
	r := report(t, hosttest.Genoa(), func(m *hosttest.Machine) { m.Write("proc/cmdline", "iommu=pt") })
	if !r.Enabled || !slices.Contains(codes(r, host.Warning), "cmdline.trap") {
		t.Errorf("enabled %v, findings %+v", r.Enabled, r.Findings)
	}
	if r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.Cmdline = "iommu=pt iommu=nopt" })); !r.Enabled || len(r.Findings) != 1 {
		t.Errorf("a trap that a later parameter undoes: %+v", r.Findings)
	}
}

// What cannot be read is unknown, never good, and the rest is still told.
func TestWhatCannotBeReadIsUnknown(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ file, code, remedy string }{
		"no cpuid module": {"dev/cpu/0/cpuid", "unread.dev.cpu.0.cpuid", "modprobe cpuid"},
		"no msr module":   {"dev/cpu/0/msr", "unread.dev.cpu.0.msr", "modprobe msr"},
		"no kvm device":   {"dev/kvm", "unread.dev.kvm", "modprobe kvm_amd"},
		"no proc":         {"proc", "unread.proc.cpuinfo", "mount proc"},
		"no sysfs":        {"sys", "unread.sys.class.iommu", "mount proc"},
	} {
		r := report(t, hosttest.Genoa(), func(m *hosttest.Machine) { m.Remove(c.file) })
		i := slices.IndexFunc(r.Findings, func(f host.Finding) bool { return f.Code == c.code && f.Level == host.Unknown })
		if i < 0 || !strings.Contains(r.Findings[i].Remedy, c.remedy) || r.Findings[i].Observed == "" {
			t.Errorf("%s: %+v", name, r.Findings)
		}
		if c.file == "dev/kvm" && r.Enabled {
			t.Errorf("%s: enabled", name)
		}
	}
	r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.Unprivileged = true }))
	i := slices.IndexFunc(r.Findings, func(f host.Finding) bool { return f.Code == "unread.proc.iomem" })
	if i < 0 || r.Findings[i].Remedy != "run this as root" || r.RMP.Covers != host.CoversUnknown {
		t.Errorf("%+v %+v", r.Findings, r.RMP)
	}
	empty := host.Judge(host.New(t.TempDir(), host.Linux{}).Facts())
	if empty.Enabled || !slices.Contains(codes(empty, host.Blocking), "kvm.unknown") {
		t.Errorf("an empty root: %+v", empty.Findings)
	}
}

// Distributions do not load the module cpuid by themselves.
func TestCausesAreNamedWithoutCPUIDToo(t *testing.T) {
	t.Parallel()
	without := func(m *hosttest.Machine) { m.Remove("dev/cpu/0/cpuid") }
	r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.Cmdline, s.RMPSize = "iommu=pt", 0 }), without)
	for _, code := range []string{"iommu.passthrough", "bios.rmp-not-reserved", "kernel.cleared-snp"} {
		if !slices.Contains(codes(r, host.Blocking), code) {
			t.Errorf("no %s in %+v", code, r.Findings)
		}
	}
	r = report(t, hosttest.Turin(), without)
	if !r.Enabled || r.RMP.Mode != host.RMPSegmented || !slices.Equal(codes(r), []string{"unread.dev.cpu.0.cpuid", "sev-es.off"}) {
		t.Errorf("%+v %+v", r.RMP, r.Findings)
	}
	if r := report(t, hosttest.Genoa(), without); !r.Enabled || r.RMP.Mode != host.RMPContiguous || r.ASIDs != nil {
		t.Errorf("%+v %+v", r.RMP, r.Findings)
	}
}

func TestASIDsAreCountedByTheBestSource(t *testing.T) {
	t.Parallel()
	r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.NoMiscController, s.Firmware.Guests = true, 5 }))
	if a := r.ASIDs; *a.Used != 5 || *a.Free != 94 || a.Returning != nil || a.Source != "firmware's guest count" {
		t.Errorf("%+v", a)
	}
	r = report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.NoMiscController, s.Cmdline = true, "iommu=pt" }))
	if a := r.ASIDs; a.Total != 99 || a.Free != nil {
		t.Errorf("nothing tells, and yet: %+v", a)
	}
	hiding := func(s *hosttest.Setup) { s.Firmware.CiphertextHidingEnabled = true }
	r = report(t, setup(hosttest.Genoa(), hiding), func(m *hosttest.Machine) { m.Write("sys/module/kvm_amd/parameters/ciphertext_hiding_asids", "60") })
	if r.ASIDs.Total != 60 {
		t.Errorf("with ciphertext hiding: %+v", r.ASIDs)
	}
}

// counting counts the commands that reach /dev/sev.
type counting struct {
	*hosttest.Machine
	commands int
}

func (c *counting) Ioctl(file *os.File, request uint, arg uintptr) (int, error) {
	if strings.HasSuffix(file.Name(), psp.DevicePath) {
		c.commands++
	}
	return c.Machine.Ioctl(file, request, arg)
}

// Kernels 6.14 to 6.18 would start the firmware to answer SNP_PLATFORM_STATUS
// and stop it again; a look at a host must not do that.
func TestTheSNPFirmwareIsNotAskedWhereSNPIsOff(t *testing.T) {
	t.Parallel()
	asked := func(s hosttest.Setup) (int, host.Facts) {
		c := &counting{Machine: hosttest.Boot(t, s)}
		f := host.New(c.Root, c).Facts()
		return c.commands, f
	}
	on, f := asked(hosttest.Genoa())
	if f.SNPFirmware == nil {
		t.Fatal("not asked where SNP is on")
	}
	off, f := asked(setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.Cmdline = "iommu=pt" }))
	if off != on-1 || f.SNPFirmware != nil || f.SEVFirmware == nil || len(f.Unread) != 0 {
		t.Errorf("%d commands with SNP, %d without; %+v", on, off, f.Unread)
	}
}

// Facts leave the host: of the command line only what matters to SNP does.
func TestNothingElseOfTheCommandLineIsTold(t *testing.T) {
	t.Parallel()
	r := report(t, setup(hosttest.Genoa(), func(s *hosttest.Setup) {
		s.Cmdline = "root=/dev/sda password=hunter2 mem_encrypt=on iommu=nopt -- sev=nosnp"
	}))
	text, err := json.Marshal(r)
	if err != nil || strings.Contains(string(text), "hunter2") || strings.Contains(string(text), "root=") {
		t.Errorf("%v %s", err, text)
	}
	if !slices.Equal(r.Facts.Kernel.Parameters, []string{"mem_encrypt=on", "iommu=nopt"}) || !r.Enabled {
		t.Errorf("%v %+v", r.Facts.Kernel.Parameters, r.Findings)
	}
}

// Judge is a function of facts: they survive JSON, and so does the verdict.
func TestARecordedReportCanBeJudgedAgain(t *testing.T) {
	t.Parallel()
	for _, s := range []hosttest.Setup{hosttest.Genoa(), hosttest.Turin(), setup(hosttest.Genoa(), func(s *hosttest.Setup) { s.RMPSize = 0 })} {
		first := report(t, s)
		text, err := json.Marshal(first)
		if err != nil {
			t.Fatal(err)
		}
		var again host.Report
		if err := json.Unmarshal(text, &again); err != nil {
			t.Fatal(err)
		}
		second, err := json.Marshal(host.Judge(again.Facts))
		if err != nil || string(second) != string(text) {
			t.Errorf("%v\n%s\n%s", err, text, second)
		}
	}
}

// The kernel shuts the firmware down without telling KVM's parameters, for
// instance after a failed update.
func TestFirmwareThatStoppedBlocksAlthoughKVMsParameterStands(t *testing.T) {
	t.Parallel()
	m := hosttest.Boot(t, hosttest.Genoa())
	facts := host.New(m.Root, m).Facts()
	facts.SNPFirmware.State, facts.KVM.VMTypes = psp.Uninitialized, 1
	r := host.Judge(facts)
	if r.Enabled || !slices.Contains(codes(r, host.Blocking), "firmware.not-initialized") || r.Firmware.State != "uninitialized" {
		t.Errorf("%+v %+v", r.Firmware, r.Findings)
	}
}
