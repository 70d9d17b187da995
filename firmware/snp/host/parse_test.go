package host

import (
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

func TestTrapsAreFoundAsTheKernelReadsThem(t *testing.T) {
	t.Parallel()
	for cmdline, want := range map[string][]string{
		"":                                   nil,
		"quiet ro iommu=nopt amd_iommu=on":   nil,
		"iommu=pt":                           {"iommu=pt"},
		"iommu=force,pt":                     {"iommu=force,pt"},
		"iommu=off":                          {"iommu=off"},
		"iommu=pt iommu=nopt":                nil,
		"iommu=nopt iommu=pt":                {"iommu=pt"},
		"iommu=pt iommu.passthrough=0":       nil,
		"iommu.passthrough=on":               {"iommu.passthrough=on"},
		"iommu.passthrough=Yes":              {"iommu.passthrough=Yes"},
		"iommu.passthrough=off":              nil,
		"amd_iommu=off":                      {"amd_iommu=off"},
		"amd_iommu=fullflush,pgtbl_v2":       {"amd_iommu=fullflush,pgtbl_v2"},
		"amd_iommu=pgtbl_v1":                 nil,
		"sev=debug":                          nil,
		"sev=debug,nosnp":                    {"sev=debug,nosnp"},
		"clearcpuid=sev_snp":                 {"clearcpuid=sev_snp"},
		"clearcpuid=avx512f":                 nil,
		"kvm-amd.sev-snp=0":                  {"kvm-amd.sev-snp=0"},
		"kvm_amd.sev=N":                      {"kvm_amd.sev=N"},
		"kvm_amd.nrips=off":                  {"kvm_amd.nrips=off"},
		"kvm_amd.sev_snp=1":                  nil,
		"kvm.mmio_caching=0":                 {"kvm.mmio_caching=0"},
		"modprobe.blacklist=nouveau,ccp":     {"modprobe.blacklist=nouveau,ccp"},
		"module_blacklist=kvm-amd":           {"module_blacklist=kvm-amd"},
		"modprobe.blacklist=nouveau":         nil,
		`foo="a iommu=pt b"`:                 nil,
		`"iommu=pt"`:                         {"iommu=pt"},
		"-- iommu=pt":                        nil,
		"mem_encrypt=off xiommu=pt":          nil,
		"amd_iommu=off sev=nosnp   iommu=pt": {"amd_iommu=off", "sev=nosnp", "iommu=pt"},
	} {
		var got []string
		for _, trap := range cmdlineTraps(parseCmdline(cmdline)) {
			got = append(got, trap.parameter)
			if trap.message == "" || !strings.Contains(trap.remedy, trap.parameter) {
				t.Errorf("%q: %+v", cmdline, trap)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", cmdline, got, want)
		}
	}
}

func TestRMPCoverageFollowsTheKernelsArithmetic(t *testing.T) {
	t.Parallel()
	const gib = 1 << 30
	cfg := func(v psp.Hex) *psp.Hex { return &v }
	leaf := &RMPSegmentsLeaf{MinSizeBits: 36, MaxSizeBits: 42, Cached: 4}
	limited := &RMPSegmentsLeaf{MinSizeBits: 36, MaxSizeBits: 42, Cached: 4, HardLimit: true}
	// 64 GiB have 16 Mi pages of 16 bytes: 256 MiB and the bookkeeping.
	const exact = 256<<20 + rmpBookkeeping
	for name, c := range map[string]struct {
		msrs   MSRs
		leaf   *RMPSegmentsLeaf
		end    uint64
		mode   string
		covers string
	}{
		"nothing reserved":                 {MSRs{}, nil, 64 * gib, RMPNone, CoversNo},
		"only bits that are no address":    {MSRs{RMPBase: 0x1000, RMPEnd: 0x1fff}, nil, 64 * gib, RMPNone, CoversNo},
		"ends before it begins":            {MSRs{RMPBase: 32 * gib, RMPEnd: 31 * gib}, nil, 64 * gib, RMPContiguous, CoversNo},
		"exactly enough, inside of memory": {MSRs{RMPBase: 32 * gib, RMPEnd: 32*gib + exact - 1}, nil, 64 * gib, RMPContiguous, CoversYes},
		"one byte short":                   {MSRs{RMPBase: 32 * gib, RMPEnd: 32*gib + exact - 2}, nil, 64 * gib, RMPContiguous, CoversNo},
		"behind memory, itself uncovered":  {MSRs{RMPBase: 64 * gib, RMPEnd: 64*gib + exact - 1}, nil, 64 * gib, RMPContiguous, CoversNo},
		"memory unknown":                   {MSRs{RMPBase: 32 * gib, RMPEnd: 33 * gib}, nil, 0, RMPContiguous, CoversUnknown},
		"segmentation possible, not used":  {MSRs{RMPBase: 32 * gib, RMPEnd: 32*gib + exact - 1, RMPCfg: cfg(0)}, leaf, 64 * gib, RMPContiguous, CoversYes},
		"segmented, kernel agreed":         {MSRs{SYSCFG: syscfgSNP, RMPBase: gib, RMPCfg: cfg(38<<8 | 1)}, leaf, 64 * gib, RMPSegmented, CoversYes},
		"segmented, kernel did not":        {MSRs{RMPBase: gib, RMPCfg: cfg(38<<8 | 1)}, leaf, 64 * gib, RMPSegmented, CoversUnknown},
		"segmented, no table":              {MSRs{RMPCfg: cfg(38<<8 | 1)}, leaf, 64 * gib, RMPSegmented, CoversNo},
		"segments too small":               {MSRs{SYSCFG: syscfgSNP, RMPBase: gib, RMPCfg: cfg(35<<8 | 1)}, leaf, 64 * gib, RMPSegmented, CoversNo},
		"segments too large":               {MSRs{SYSCFG: syscfgSNP, RMPBase: gib, RMPCfg: cfg(43<<8 | 1)}, leaf, 64 * gib, RMPSegmented, CoversNo},
		"hard limit reached":               {MSRs{SYSCFG: syscfgSNP, RMPBase: gib, RMPCfg: cfg(36<<8 | 1)}, limited, 4*64*gib + 1, RMPSegmented, CoversNo},
		"hard limit kept":                  {MSRs{SYSCFG: syscfgSNP, RMPBase: gib, RMPCfg: cfg(36<<8 | 1)}, limited, 4 * 64 * gib, RMPSegmented, CoversYes},
		"segments, memory unknown":         {MSRs{SYSCFG: syscfgSNP, RMPBase: gib, RMPCfg: cfg(38<<8 | 1)}, leaf, 0, RMPSegmented, CoversUnknown},
		"segments, CPUID unread":           {MSRs{RMPBase: gib, RMPCfg: cfg(63<<8 | 1)}, nil, 64 * gib, RMPSegmented, CoversUnknown},
	} {
		if r := rmpOf(c.msrs, c.leaf, c.end); r.Mode != c.mode || r.Covers != c.covers || r.Why == "" {
			t.Errorf("%s: %+v, want %s, %s", name, r, c.mode, c.covers)
		}
	}
}

func TestLeavesDecodeBitByBit(t *testing.T) {
	t.Parallel()
	// As an EPYC 9004 gives it: C-bit 51, 5 bits less, 4 VMPLs, 1006 ASIDs.
	got := decodeEncryptionLeaf(decodeRegisters([cpuidSize]byte{0x7b, 0xc0, 0x01, 0x00, 0x73, 0x41, 0, 0, 0xee, 0x03, 0, 0, 0x64}))
	want := EncryptionLeaf{
		Raw: "eax=0001c07b ebx=00004173 ecx=000003ee edx=00000064", SME: true, SEV: true, SEVES: true, SEVSNP: true, VMPL: true,
		CBit: 51, ReducedPhysBits: 5, VMPLs: 4, MaxASID: 1006, MinSEVASID: 100,
	}
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if l := decodeEncryptionLeaf(Registers{EAX: 1<<23 | 1<<8}); !l.SegmentedRMP || !l.SecureTSC || l.SEVSNP {
		t.Errorf("%+v", l)
	}
	if l := decodeRMPSegmentsLeaf(Registers{EAX: 36 | 42<<6, EBX: 1<<10 | 8}); l.MinSizeBits != 36 || l.MaxSizeBits != 42 || l.Cached != 8 || !l.HardLimit {
		t.Errorf("%+v", l)
	}
}

func TestBrokenTextIsRefused(t *testing.T) {
	t.Parallel()
	const good = "vendor_id: AuthenticAMD\ncpu family: 25\nmodel: 17\nstepping: 1\nflags: sev_snp sev\n"
	c, err := parseCPUInfo(strings.NewReader("\n" + good + "\nvendor_id: Other\n"))
	if err != nil || c.Vendor != "AuthenticAMD" || c.Family != 25 || !slices.Equal(c.Flags, []string{"sev", "sev_snp"}) {
		t.Errorf("%+v %v", c, err)
	}
	for _, text := range []string{"", good[:40], strings.Replace(good, "25", "400", 1), strings.Replace(good, "flags", "features", 1), good + strings.Repeat("x", 2<<20)} {
		if _, err := parseCPUInfo(strings.NewReader(text)); err == nil {
			t.Errorf("cpuinfo %.60q is accepted", text)
		}
	}
	for _, text := range []string{"", "0-f : Reserved", "1000 : System RAM", "f-0 : System RAM", "0-zz : System RAM", "0-0 : System RAM", "0-fffffffffffffff : System RAM"} {
		if end, err := parseMemoryEnd(strings.NewReader(text)); err == nil {
			t.Errorf("iomem %q is accepted: %#x", text, end)
		}
	}
	if end, err := parseMemoryEnd(strings.NewReader("0-fff : System RAM\n  2000-2fff : System RAM\n100000-1fffff : System RAM\n9000000-9ffffff : PCI Bus\n")); err != nil || end != 0x200000 {
		t.Errorf("%#x %v", end, err)
	}
	for _, text := range []string{"", "sev 3", "sev_es x", "sev_es 4294967296", "sev_es"} {
		if n, err := parseSEVES(strings.NewReader(text)); err == nil {
			t.Errorf("misc %q is accepted: %d", text, n)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("vendor_id: AuthenticAMD\ncpu family: 25\nmodel: 17\nstepping: 1\nflags: sev_snp\n")
	f.Add("00001000-9fffffff : System RAM\n")
	f.Add("sev 509\nsev_es 99\n")
	f.Add("# CONFIG_KVM_AMD_SEV is not set\nCONFIG_IOMMU_DEFAULT_PASSTHROUGH=y\n")
	f.Fuzz(func(t *testing.T, text string) {
		if c, err := parseCPUInfo(strings.NewReader(text)); err == nil && len(c.Flags) > len(text) {
			t.Errorf("%+v", c)
		}
		if end, err := parseMemoryEnd(strings.NewReader(text)); err == nil && (end == 0 || end > 1<<maxPhysicalBits) {
			t.Errorf("memory ends at %#x", end)
		}
		_, _ = parseSEVES(strings.NewReader(text))
		if c := parseConfig(text); len(c) != 2 {
			t.Errorf("%v", c)
		}
	})
}

func FuzzCmdline(f *testing.F) {
	f.Add(`root=/dev/sda "iommu=pt" kvm-amd.sev-snp=0 -- x`)
	f.Add("iommu=pt iommu=nopt sev=nosnp")
	f.Fuzz(func(t *testing.T, text string) {
		parameters := parseCmdline(text)
		for _, trap := range cmdlineTraps(parameters) {
			if !slices.Contains(parameters, trap.parameter) {
				t.Errorf("trap %q is not among %q", trap.parameter, parameters)
			}
		}
	})
}

func FuzzRegisters(f *testing.F) {
	f.Add(make([]byte, cpuidSize), uint64(0), uint64(0), uint64(0), uint64(0))
	f.Add([]byte{0x24, 0x0a, 0, 0, 8, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, uint64(1<<40), uint64(0), uint64(38<<8|1), uint64(1<<38))
	f.Fuzz(func(t *testing.T, raw []byte, base, end, cfg, memory uint64) {
		if len(raw) != cpuidSize {
			return
		}
		registers := decodeRegisters([cpuidSize]byte(raw))
		_ = decodeEncryptionLeaf(registers)
		leaf := decodeRMPSegmentsLeaf(registers)
		register := psp.Hex(cfg)
		r := rmpOf(MSRs{RMPBase: psp.Hex(base), RMPEnd: psp.Hex(end), RMPCfg: &register}, &leaf, memory%(1<<maxPhysicalBits))
		if r.Why == "" || !slices.Contains([]string{CoversYes, CoversNo, CoversUnknown}, r.Covers) {
			t.Errorf("%+v", r)
		}
		if r.Covers == CoversYes && (r.Size == 0 || r.Size < r.Required) {
			t.Errorf("covers with too little: %+v", r)
		}
	})
}
