// Package hosttest is a machine that obeys the rules of Linux and of the SEV
// firmware, for tests: a tree of /proc, /sys and /dev below a temporary root,
// and a stateful /dev/sev, /dev/kvm, CPUID and MSR behind it.
//
// A test describes causes (what silicon has, what the BIOS set, how the kernel
// was started) and Boot works out the effects as the kernel does: iommu=pt
// leaves sev_snp at N and bit 4 of KVM_CAP_VM_TYPES clear. Nothing here
// imports the code that draws conclusions. A Machine is used by one test.
package hosttest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

// Setup is a machine's causes.
type Setup struct {
	// The processor.
	Vendor, Brand           string
	Family, Model, Stepping uint8
	VirtualMachine          bool
	NoSNP                   bool // silicon without SEV-SNP
	CanSegmentRMP           bool

	// The BIOS.
	EncryptionOff bool // SMEE
	// RMPSize is what is reserved for a contiguous table; 0 for none.
	RMPSize uint64
	// RMPSegmentBits selects a segmented table; RMPSegments of its segments
	// are filled.
	RMPSegmentBits, RMPSegments uint8
	MinSEVASID, MaxASID         uint32
	LegacyBoot                  bool
	IOMMUOff                    bool
	IOMMUNoSNP                  bool // NBIO SEV-SNP Support
	SMT                         bool

	// Memory ends here.
	MemoryEnd uint64

	// The kernel.
	Release, Cmdline   string
	PassthroughDefault bool // CONFIG_IOMMU_DEFAULT_PASSTHROUGH
	WithoutSEV         bool // CONFIG_KVM_AMD_SEV
	NoKVM, NoCCP       bool // modules not loaded
	NoMiscController   bool
	Unprivileged       bool // files show what anybody but root sees

	// The firmware. State and RMPInitialized follow from the rest.
	Firmware psp.SNPStatus
	// PatchedForES: the firmware refuses SEV-ES (AMD-SB-3023).
	PatchedForES bool
	ChipIDs      [][psp.ChipIDSize]byte
	// VLEK is the one hashstick that was wrapped for this chip.
	VLEK []byte
	// ESGuests run besides Firmware.Guests.
	ESGuests uint32
}

const gib = 1 << 30

// contiguous is the smallest RMP for that much memory that also covers itself
// when it lies behind all memory.
func contiguous(memoryEnd uint64) uint64 {
	const pad = 2 << 20
	size := memoryEnd/256 + 16<<10
	return size + size/256 + pad
}

// Genoa is a well-prepared host with an EPYC 9004.
func Genoa() Setup {
	return Setup{
		Vendor: "AuthenticAMD", Brand: "AMD EPYC 9354 32-Core Processor", Family: 0x19, Model: 0x11, Stepping: 1,
		RMPSize: contiguous(256 * gib), MinSEVASID: 100, MaxASID: 1006, MemoryEnd: 256 * gib,
		Release: "6.17.0-5-generic", Cmdline: "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro quiet",
		Firmware: psp.SNPStatus{
			APIMajor: 1, APIMinor: 55, Build: 49, AliasCheckComplete: true, FeatureInfo: true,
			CurrentTCB: 0x561b00000000000a, ReportedTCB: 0x561b00000000000a,
		},
		PatchedForES: true,
		ChipIDs:      [][psp.ChipIDSize]byte{{0xA1, 0xB2, 63: 0x01}},
		VLEK:         []byte(strings.Repeat("v", psp.HashstickSize)),
	}
}

// Turin is a well-prepared host with two EPYC 9005 and a segmented RMP.
func Turin() Setup {
	s := Genoa()
	s.Brand, s.Family, s.Model = "AMD EPYC 9355 32-Core Processor", 0x1A, 0x02
	s.CanSegmentRMP, s.RMPSize, s.RMPSegmentBits, s.RMPSegments = true, 0, 38, 1
	s.Firmware.APIMinor, s.Firmware.Build = 58, 12
	s.Firmware.CurrentTCB, s.Firmware.ReportedTCB = 0x5100000004010101, 0x5100000004010101
	s.ChipIDs = [][psp.ChipIDSize]byte{{1, 2, 3, 4, 5, 6, 7, 8}, {9, 10, 11, 12, 13, 14, 15, 16}}
	return s
}

// Machine is a booted one.
type Machine struct {
	// Root is its file system.
	Root string

	tb    testing.TB
	setup Setup
	// What the kernel made of the causes.
	snpFlag, hostSNP, kvmSNP, kvmES, kvmSEV bool
	firmware                                psp.SNPStatus
	committed                               bool
}

// Boot starts the machine.
func Boot(tb testing.TB, s Setup) *Machine {
	tb.Helper()
	m := &Machine{Root: tb.TempDir(), tb: tb, setup: s, firmware: s.Firmware}
	m.initialize()
	m.tree()
	return m
}

// has says whether the kernel was started with one of the parameters.
func (m *Machine) has(parameters ...string) bool {
	kernel, _, _ := strings.Cut(m.setup.Cmdline, " -- ") // the rest is init's
	return slices.ContainsFunc(strings.Fields(kernel), func(word string) bool { return slices.Contains(parameters, word) })
}

func (m *Machine) atLeast(major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(m.setup.Release, "%d.%d", &a, &b); err != nil {
		m.tb.Fatalf("kernel release %q: %v", m.setup.Release, err)
	}
	return a > major || a == major && b >= minor
}

// rmpReserved and rmpCovers follow Linux arch/x86/virt/svm/sev.c.
func (m *Machine) rmpReserved() bool { return m.setup.RMPSize > 0 || m.setup.RMPSegments > 0 }

func (m *Machine) rmpBase() uint64 {
	if !m.rmpReserved() {
		return 0
	}
	return m.setup.MemoryEnd
}

func (m *Machine) rmpEnd() uint64 {
	if m.setup.RMPSize == 0 {
		return 0
	}
	return m.rmpBase() + m.setup.RMPSize - 1
}

func (m *Machine) rmpCovers() bool {
	s := m.setup
	if s.RMPSegments > 0 {
		return m.atLeast(6, 14) && uint64(s.RMPSegments)<<s.RMPSegmentBits >= s.MemoryEnd
	}
	return s.RMPSize >= (m.rmpEnd()+4096)/4096*16+16<<10
}

func (m *Machine) passthrough() bool {
	switch {
	case m.has("iommu=nopt"):
		return false
	case m.has("iommu=pt", "iommu.passthrough=1"):
		return true
	}
	return m.setup.PassthroughDefault
}

func (m *Machine) iommuOff() bool { return m.setup.IOMMUOff || m.has("amd_iommu=off", "iommu=off") }

// initialize follows the kernel from the first look at CPUID to kvm_amd
// (arch/x86/kernel/cpu/amd.c, drivers/iommu/amd/init.c,
// drivers/crypto/ccp/sev-dev.c, arch/x86/kvm/svm/sev.c).
func (m *Machine) initialize() {
	s := m.setup
	m.snpFlag = !s.NoSNP && !s.VirtualMachine && !s.EncryptionOff && m.rmpReserved() && m.atLeast(6, 11) && !m.has("sev=nosnp")
	m.hostSNP = m.snpFlag && m.rmpCovers() && !s.WithoutSEV &&
		!m.iommuOff() && !m.passthrough() && !m.has("amd_iommu=pgtbl_v2") && !s.IOMMUNoSNP
	up := m.hostSNP && !s.NoCCP && !s.LegacyBoot && (s.Firmware.APIMajor > 1 || s.Firmware.APIMinor >= 51)
	m.firmware.State, m.firmware.RMPInitialized = psp.Uninitialized, false
	if up {
		m.firmware.State, m.firmware.RMPInitialized = psp.Initialized, true
	}
	sev := !s.NoKVM && !s.EncryptionOff && !s.NoSNP && !s.VirtualMachine && !s.WithoutSEV &&
		!m.has("kvm_amd.sev=0", "kvm_amd.npt=0", "kvm_amd.nrips=0")
	es := sev && s.MinSEVASID > 1 && !m.has("kvm_amd.sev_es=0", "kvm.mmio_caching=0")
	m.kvmSEV = sev && s.MinSEVASID <= s.MaxASID
	m.kvmSNP = es && up && !m.has("kvm_amd.sev_snp=0")
	m.kvmES = es && !s.PatchedForES
}

func (m *Machine) write(name, text string) {
	m.tb.Helper()
	path := filepath.Join(m.Root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.tb.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text+"\n"), 0o644); err != nil { //nolint:gosec // a test's tree
		m.tb.Fatal(err)
	}
}

func yes(on bool) string {
	if on {
		return "Y"
	}
	return "N"
}

func (m *Machine) tree() {
	m.tb.Helper()
	s := m.setup
	m.write("proc/cpuinfo", m.cpuinfo())
	m.write("proc/iomem", m.iomem())
	m.write("proc/cmdline", s.Cmdline)
	m.write("proc/sys/kernel/osrelease", s.Release)
	m.write("sys/devices/system/cpu/smt/active", map[bool]string{true: "1", false: "0"}[s.SMT])
	m.write("boot/config-"+s.Release, m.config())
	if !s.LegacyBoot {
		m.write("sys/firmware/efi/fw_platform_size", "64")
	}
	for _, dir := range []string{"sys/class/iommu", "sys/kernel/iommu_groups"} {
		if err := os.MkdirAll(filepath.Join(m.Root, dir), 0o755); err != nil {
			m.tb.Fatal(err)
		}
	}
	if !m.iommuOff() {
		features := uint64(0x246577efa2254afa)
		if !s.IOMMUNoSNP {
			features |= 1 << 63
		}
		m.write("sys/class/iommu/ivhd0/amd-iommu/features", fmt.Sprintf("%x:10", features))
		for i := range 3 {
			m.write(fmt.Sprintf("sys/kernel/iommu_groups/%d/type", i), map[bool]string{true: "identity", false: "DMA-FQ"}[m.passthrough()])
		}
	}
	if !s.NoKVM {
		for name, on := range map[string]bool{
			"sev": m.kvmSEV, "sev_es": m.kvmES, "sev_snp": m.kvmSNP,
			"npt": !m.has("kvm_amd.npt=0"), "nrips": !m.has("kvm_amd.nrips=0"),
		} {
			m.write("sys/module/kvm_amd/parameters/"+name, yes(on))
		}
		m.write("sys/module/kvm_amd/parameters/ciphertext_hiding_asids", "0")
		m.write("sys/module/kvm/parameters/mmio_caching", yes(!m.has("kvm.mmio_caching=0")))
		m.write("dev/kvm", "")
	}
	if !s.NoMiscController {
		m.write("sys/fs/cgroup/misc.capacity", fmt.Sprintf("sev %d\nsev_es %d", s.MaxASID-s.MinSEVASID+1, s.MinSEVASID-1))
		m.write("sys/fs/cgroup/misc.current", fmt.Sprintf("sev 0\nsev_es %d", s.Firmware.Guests+s.ESGuests))
	}
	m.write("dev/cpu/0/cpuid", "")
	m.write("dev/cpu/0/msr", "")
	if !s.NoCCP && !s.VirtualMachine {
		m.write("dev/sev", "")
	}
}

// Remove takes a file or folder away, as if it had never been there.
func (m *Machine) Remove(name string) {
	m.tb.Helper()
	if err := os.RemoveAll(filepath.Join(m.Root, name)); err != nil {
		m.tb.Fatal(err)
	}
}

// Write replaces a file's text.
func (m *Machine) Write(name, text string) {
	m.tb.Helper()
	m.write(name, text)
}

func (m *Machine) cpuinfo() string {
	s := m.setup
	flags := "fpu msr svm npt"
	if s.VirtualMachine {
		flags += " hypervisor"
	} else if !s.EncryptionOff {
		flags += " sme sev sev_es"
		if m.snpFlag {
			flags += " sev_snp"
		}
	}
	block := fmt.Sprintf("vendor_id\t: %s\ncpu family\t: %d\nmodel\t\t: %d\nmodel name\t: %s\nstepping\t: %d\nmicrocode\t: 0xa101154\nflags\t\t: %s\n",
		s.Vendor, s.Family, s.Model, s.Brand, s.Stepping, flags)
	return "processor\t: 0\n" + block + "\nprocessor\t: 1\n" + block
}

func (m *Machine) iomem() string {
	end := m.setup.MemoryEnd
	if m.setup.Unprivileged {
		return "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n  00000000-00000000 : Kernel code"
	}
	return fmt.Sprintf("00000000-00000fff : Reserved\n00001000-9fffffff : System RAM\n  01000000-02ffffff : Kernel code\n100000000-%x : System RAM\n%x-%x : Reserved", end-1, end, end+0xFFFFF)
}

func (m *Machine) config() string {
	set := func(name string, on bool) string {
		if on {
			return name + "=y\n"
		}
		return "# " + name + " is not set\n"
	}
	return set("CONFIG_KVM_AMD_SEV", !m.setup.WithoutSEV) + set("CONFIG_IOMMU_DEFAULT_PASSTHROUGH", m.setup.PassthroughDefault)
}
