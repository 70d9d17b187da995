package host

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

// Paths below the root.
const (
	cpuidDevice   = "dev/cpu/0/cpuid"
	msrDevice     = "dev/cpu/0/msr"
	kvmDevice     = "dev/kvm"
	cpuinfoFile   = "proc/cpuinfo"
	iomemFile     = "proc/iomem"
	cmdlineFile   = "proc/cmdline"
	releaseFile   = "proc/sys/kernel/osrelease"
	smtFile       = "sys/devices/system/cpu/smt/active"
	efiDir        = "sys/firmware/efi"
	iommuClass    = "sys/class/iommu"
	iommuGroups   = "sys/kernel/iommu_groups"
	kvmAMDParams  = "sys/module/kvm_amd/parameters"
	kvmParams     = "sys/module/kvm/parameters"
	bootConfig    = "boot/config-"
	miscCapacity  = "sys/fs/cgroup/misc.capacity"
	miscCurrent   = "sys/fs/cgroup/misc.current"
	ivhdFeatures  = "amd-iommu/features"
	groupTypeFile = "type"
)

// KVM's ioctl and capability (Linux include/uapi/linux/kvm.h,
// arch/x86/include/uapi/asm/kvm.h).
const (
	kvmCheckExtension = 0xAE03 // _IO(KVMIO, 0x03)
	kvmCapVMTypes     = 235    // KVM_CAP_VM_TYPES
	vmTypeSNP         = 4      // KVM_X86_SNP_VM
)

// errHidden is a file that shows zeros to everybody but root.
var errHidden = errors.New("the kernel shows only zeros")

// Syscalls are those that no file tree can stand in for: ioctls, and reading
// devices whose offsets are register numbers.
type Syscalls interface {
	psp.Ioctler
	ReadAt(file *os.File, p []byte, offset int64) (int, error)
}

// Linux is the kernel this process runs on.
type Linux struct{ psp.Linux }

// ReadAt calls pread(2).
func (Linux) ReadAt(file *os.File, p []byte, offset int64) (int, error) {
	return file.ReadAt(p, offset)
}

// Reader reads the facts of a machine below a root.
type Reader struct {
	root   string
	kernel Syscalls
}

// New returns a reader of the machine below root, "/" for this one.
func New(root string, kernel Syscalls) *Reader { return &Reader{root, kernel} }

// gather collects facts, and what could not be read.
type gather struct {
	*Reader
	facts Facts
}

// Facts reads everything. It never fails: what could not be read is in Unread.
func (r *Reader) Facts() Facts {
	g := gather{Reader: r}
	g.processor()
	g.memory()
	g.linux()
	g.iommu()
	g.kvm()
	g.asids()
	g.firmware()
	return g.facts
}

// unread notes why a source could not be read.
func (g *gather) unread(source string, err error, remedy string) {
	switch {
	case errors.Is(err, os.ErrPermission), errors.Is(err, errHidden):
		remedy = "run this as root"
	default:
		if refusal, ok := errors.AsType[*contract.Refusal](err); ok {
			remedy = refusal.Remedy
		}
	}
	g.facts.Unread = append(g.facts.Unread, Unread{Source: source, Why: err.Error(), Remedy: remedy})
}

func (g *gather) text(name string) (string, error) {
	file, err := os.Open(filepath.Join(g.root, name))
	if err != nil {
		return "", err
	}
	defer file.Close() //nolint:errcheck // read only
	text, err := io.ReadAll(io.LimitReader(file, maxText))
	if err != nil {
		return "", fmt.Errorf("reading %s: %w", file.Name(), err)
	}
	return strings.TrimSpace(string(text)), nil
}

// required is the text of a file that every Linux has.
func (g *gather) required(name string) string {
	text, err := g.text(name)
	if err != nil {
		g.unread(name, err, remedyProc)
	}
	return text
}

// readParsed lets parse read a file.
func readParsed[T any](g *gather, name string, parse func(io.Reader) (T, error)) (T, error) {
	file, err := os.Open(filepath.Join(g.root, name))
	if err != nil {
		var none T
		return none, err
	}
	defer file.Close() //nolint:errcheck // read only
	return parse(file)
}

const remedyProc = "mount proc and sysfs; this works only on Linux on x86-64"

func (g *gather) processor() {
	var err error
	if g.facts.CPU, err = readParsed(g, cpuinfoFile, parseCPUInfo); err != nil {
		g.unread(cpuinfoFile, err, remedyProc)
	}
	if smt, err := g.text(smtFile); err == nil {
		g.facts.CPU.SMT = smt == "1"
	}
	if err := g.cpuid(); err != nil {
		g.unread(cpuidDevice, err, "run `modprobe cpuid`")
	}
	if err := g.msrs(); err != nil {
		g.unread(msrDevice, err, "run `modprobe msr`")
	}
}

// cpuid reads the two leaves as far as the processor has them.
func (g *gather) cpuid() error {
	file, err := os.Open(filepath.Join(g.root, cpuidDevice))
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // read only
	leaf := func(number uint32) (Registers, error) {
		var b [cpuidSize]byte
		if _, err := g.kernel.ReadAt(file, b[:], int64(number)); err != nil {
			return Registers{}, fmt.Errorf("reading CPUID leaf %#x: %w", number, err)
		}
		return decodeRegisters(b), nil
	}
	highest, err := leaf(leafVendor)
	if err != nil {
		return err
	}
	encryption := EncryptionLeaf{Raw: "the processor has no leaf 0x8000001f"}
	if highest.EAX >= leafEncryption {
		registers, err := leaf(leafEncryption)
		if err != nil {
			return err
		}
		encryption = decodeEncryptionLeaf(registers)
	}
	g.facts.Encryption = &encryption
	if !encryption.SegmentedRMP || highest.EAX < leafRMPSegments {
		return nil
	}
	registers, err := leaf(leafRMPSegments)
	if err != nil {
		return err
	}
	segments := decodeRMPSegmentsLeaf(registers)
	g.facts.RMPSegments = &segments
	return nil
}

// msrs reads the registers of a processor that has them.
func (g *gather) msrs() error {
	if g.facts.Encryption != nil && !g.facts.Encryption.SEVSNP {
		return nil // a processor without SNP has no RMP registers
	}
	file, err := os.Open(filepath.Join(g.root, msrDevice))
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // read only
	var m MSRs
	read := func(number uint32, into *psp.Hex) error {
		var b [msrSize]byte
		if _, err := g.kernel.ReadAt(file, b[:], int64(number)); err != nil {
			return fmt.Errorf("reading MSR %#x: %w", number, err)
		}
		*into = psp.Hex(binary.LittleEndian.Uint64(b[:]))
		return nil
	}
	if err := errors.Join(read(msrSYSCFG, &m.SYSCFG), read(msrRMPBase, &m.RMPBase), read(msrRMPEnd, &m.RMPEnd)); err != nil {
		return err
	}
	// Without CPUID only the attempt tells whether there is this register.
	if e := g.facts.Encryption; e == nil || e.SegmentedRMP {
		var cfg psp.Hex
		switch err := read(msrRMPCfg, &cfg); {
		case err == nil:
			m.RMPCfg = &cfg
		case e != nil:
			return err
		}
	}
	g.facts.MSRs = &m
	return nil
}

func (g *gather) memory() {
	end, err := readParsed(g, iomemFile, parseMemoryEnd)
	if err != nil {
		g.unread(iomemFile, err, remedyProc)
	}
	g.facts.MemoryEnd = end
}

func (g *gather) linux() {
	g.facts.Kernel.Release = g.required(releaseFile)
	g.facts.Kernel.Parameters = parseCmdline(g.required(cmdlineFile))
	// Not every distribution ships the configuration; its lack says nothing.
	if text, err := g.text(bootConfig + g.facts.Kernel.Release); err == nil {
		g.facts.Kernel.Config = parseConfig(text)
	}
	_, err := os.Stat(filepath.Join(g.root, efiDir))
	g.facts.UEFI = err == nil
	g.facts.Modules.KVMAMD = g.parameters(kvmAMDParams, "sev", "sev_es", "sev_snp", "npt", "nrips", "ciphertext_hiding_asids")
	g.facts.Modules.KVM = g.parameters(kvmParams, "mmio_caching")
}

// Options of the kernel's configuration that decide about SNP.
const (
	configKVMSEV      = "CONFIG_KVM_AMD_SEV"
	configPassthrough = "CONFIG_IOMMU_DEFAULT_PASSTHROUGH"
)

// parseConfig keeps the options that decide about SNP; "n" for those that are
// not set.
func parseConfig(text string) map[string]string {
	config := map[string]string{configKVMSEV: "n", configPassthrough: "n"}
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if _, wanted := config[key]; ok && wanted {
			config[key] = value
		}
	}
	return config
}

// parameters reads those parameters of a module that there are; nil when the
// module is not loaded.
func (g *gather) parameters(dir string, names ...string) map[string]string {
	if _, err := os.Stat(filepath.Join(g.root, dir)); err != nil {
		return nil
	}
	values := map[string]string{}
	for _, name := range names {
		if value, err := g.text(filepath.Join(dir, name)); err == nil {
			values[name] = value
		}
	}
	return values
}

func (g *gather) iommu() {
	units, err := os.ReadDir(filepath.Join(g.root, iommuClass))
	if err != nil {
		g.unread(iommuClass, err, remedyProc)
	}
	for _, unit := range units {
		if features, err := g.text(filepath.Join(iommuClass, unit.Name(), ivhdFeatures)); err == nil {
			g.facts.IOMMU.Features = append(g.facts.IOMMU.Features, features)
		}
	}
	groups, err := os.ReadDir(filepath.Join(g.root, iommuGroups))
	if err != nil {
		g.unread(iommuGroups, err, remedyProc)
	}
	g.facts.IOMMU.Groups = len(groups)
	g.facts.IOMMU.Types = map[string]int{}
	for _, group := range groups {
		if kind, err := g.text(filepath.Join(iommuGroups, group.Name(), groupTypeFile)); err == nil {
			g.facts.IOMMU.Types[kind]++
		}
	}
}

func (g *gather) kvm() {
	file, err := os.OpenFile(filepath.Join(g.root, kvmDevice), os.O_RDWR, 0)
	if err != nil {
		remedy := "run `modprobe kvm_amd`; if that fails, enable SVM Mode in the BIOS"
		if errors.Is(err, os.ErrPermission) {
			remedy = "run this as root, or as a member of the group kvm"
		}
		g.facts.Unread = append(g.facts.Unread, Unread{Source: kvmDevice, Why: err.Error(), Remedy: remedy})
		return
	}
	defer file.Close() //nolint:errcheck // read only
	types, err := g.kernel.Ioctl(file, kvmCheckExtension, kvmCapVMTypes)
	if err != nil {
		g.unread(kvmDevice, fmt.Errorf("asking for KVM_CAP_VM_TYPES: %w", err), "load the kernel's own KVM modules")
		return
	}
	g.facts.KVM = &KVM{VMTypes: uint32(types)}
}

// asids reads what KVM charges to the controller "misc", which a kernel may
// lack; then the firmware's count of guests is all there is.
func (g *gather) asids() {
	capacity, errCapacity := readParsed(g, miscCapacity, parseSEVES)
	current, errCurrent := readParsed(g, miscCurrent, parseSEVES)
	if errCapacity == nil && errCurrent == nil {
		g.facts.ASIDUse = &ASIDUse{Capacity: capacity, Current: current}
	}
}

// parseSEVES reads the line "sev_es N" of a misc controller's file. SNP guests
// are charged there too: they use the same ASIDs.
func parseSEVES(r io.Reader) (uint32, error) {
	text, err := io.ReadAll(io.LimitReader(r, pageSize))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		if key, value, ok := strings.Cut(string(bytes.TrimSpace(line)), " "); ok && key == "sev_es" {
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil {
				return 0, fmt.Errorf("parsing misc controller: sev_es is %q", value)
			}
			return uint32(n), nil
		}
	}
	return 0, errors.New("parsing misc controller: there is no sev_es")
}

func (g *gather) firmware() {
	_, err := os.Stat(filepath.Join(g.root, psp.DevicePath))
	if g.facts.SEVDevice = err == nil; !g.facts.SEVDevice {
		return // a conclusion of its own
	}
	device, err := psp.Open(g.root, g.kernel)
	if err != nil {
		g.unread(psp.DevicePath, err, "run this as root")
		return
	}
	defer device.Close() //nolint:errcheck // nothing was written
	const remedy = "look for \"ccp\" in the kernel log"
	if status, err := device.PlatformStatus(); err != nil {
		g.unread(psp.DevicePath, err, remedy)
	} else {
		g.facts.SEVFirmware = &status
	}
	if ids, err := device.ChipIDs(); err != nil {
		g.unread(psp.DevicePath, err, remedy)
	} else {
		for _, id := range ids {
			g.facts.ChipIDs = append(g.facts.ChipIDs, hex.EncodeToString(id[:]))
		}
	}
	if on, _ := parseBool(g.facts.Modules.KVMAMD["sev_snp"]); !on {
		return
	}
	if status, err := device.SNPPlatformStatus(); err != nil {
		g.unread(psp.DevicePath, err, remedy)
	} else {
		g.facts.SNPFirmware = &status
	}
}
