// Package domain renders a guest's specification to libvirt's domain XML, in
// slices: an ordered list of small functions, each of which adds one concern.
// It also refuses what libvirt lets through although it cannot work under
// SEV-SNP. Pure; no I/O.
//
// Facts behind the slices: libvirt 11.3 formatdomain, QEMU 10.0 sev.c.
package domain

import (
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/vm"
)

// MetadataNamespace marks domains as ours in their metadata.
const MetadataNamespace = "https://github.com/confidential-node/agent/ns/domain/1"

// Bounds of a specification.
const (
	maxVCPUs    = 512
	minMemory   = 256
	maxMemory   = 16 << 20 // 16 TiB; far above any host, below what overflows
	maxDisks    = 16
	hostDataLen = 32
	policyOne   = 1 << 17
	policyBad   = 1<<18 | 1<<19 // migration agent, debug
	policyKnown = 1<<26 - 1
)

// slice adds one concern of a specification to a domain.
type slice func(vm.Spec, *libvirtxml.Domain) error

// rendering is the slices in order. Reading the list is reading the domain.
func rendering() []slice {
	return []slice{identity, machine, processor, memory, boot, disks, nic, console, devices, placement, window, tee}
}

// Render checks a specification and returns its domain XML.
func Render(s vm.Spec) (string, error) {
	if err := Check(s); err != nil {
		return "", err
	}
	d := &libvirtxml.Domain{}
	for _, add := range rendering() {
		if err := add(s, d); err != nil {
			return "", err
		}
	}
	text, err := marshal(d, s.IOMMUFD)
	if err != nil {
		return "", fmt.Errorf("rendering domain of guest %s: %w", s.GuestID, err)
	}
	return text + "\n", nil
}

// Check refuses what cannot work, with a remedy.
func Check(s vm.Spec) error {
	switch {
	case !regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(s.GuestID):
		return refuse("guest id %q is not a lower-case UUID", s.GuestID)
	case s.Generation == 0:
		return refuse("generation is 0")
	case s.VCPUs < 1 || s.VCPUs > maxVCPUs:
		return refuse("%d vCPUs are not within 1..%d", s.VCPUs, maxVCPUs)
	case s.MemoryMiB < minMemory || s.MemoryMiB > maxMemory:
		return refuse("%d MiB of memory are not within %d..%d", s.MemoryMiB, minMemory, maxMemory)
	case !regexp.MustCompile(`^[A-Za-z0-9._-]{0,64}$`).MatchString(s.CPUModel):
		return refuse("CPU model %q is not a name", s.CPUModel)
	case s.CPUModel == "" || strings.HasPrefix(s.CPUModel, "host") || s.CPUModel == "max":
		return refuse("CPU model %q makes the launch digest depend on the host; use a named one (EPYC-v4)", s.CPUModel)
	case s.Kernel == "":
		return refuse("kernel hashes without a kernel make QEMU abort")
	case (s.TEE.SNP == nil) == (s.TEE.Emulated == nil):
		return refuse("exactly one TEE is needed")
	}
	for _, path := range []string{s.Firmware, s.Kernel, s.Initrd} {
		if !filepath.IsAbs(path) {
			return refuse("path %q is not absolute", path)
		}
	}
	if s.ConsoleLog != "" && !filepath.IsAbs(s.ConsoleLog) {
		return refuse("path %q is not absolute", s.ConsoleLog)
	}
	// XML and shells of tools change other bytes silently, and every byte of
	// the command line is measured.
	if strings.ContainsFunc(s.Cmdline, func(r rune) bool { return r < ' ' || r > '~' }) || strings.TrimSpace(s.Cmdline) != s.Cmdline {
		return refuse("kernel command line %q is not printable ASCII without blanks around it", s.Cmdline)
	}
	if err := checkDevices(s); err != nil {
		return err
	}
	if err := checkPassthrough(s); err != nil {
		return err
	}
	if s.TEE.Emulated != nil {
		return checkEmulated(s.TEE.Emulated)
	}
	return checkSNP(s.TEE.SNP)
}

func refuse(format string, args ...any) error {
	return contract.Refuse("vm.spec-refused", "correct the launch command or the host's policy", "the guest cannot be started: "+format, args...)
}

func checkDevices(s vm.Spec) error {
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{1,15}$`).MatchString(s.NIC.Tap) {
		return refuse("tap name %q is not 1 to 15 letters, digits, - or _", s.NIC.Tap)
	}
	if mac, err := net.ParseMAC(s.NIC.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return refuse("%q is not the MAC address of one interface", s.NIC.MAC)
	}
	if len(s.Disks) > maxDisks {
		return refuse("%d disks are more than %d", len(s.Disks), maxDisks)
	}
	serials := map[string]bool{}
	for _, d := range s.Disks {
		if !filepath.IsAbs(d.Path) || !regexp.MustCompile(`^[0-9A-Za-z]{1,20}$`).MatchString(d.Serial) {
			return refuse("disk %q with serial %q (virtio-blk cuts serials at 20 characters)", d.Path, d.Serial)
		}
		if serials[d.Serial] {
			return refuse("two disks have the serial %s", d.Serial)
		}
		serials[d.Serial] = true
	}
	return nil
}

func checkLaunch(policy uint64, hostData []byte) error {
	switch {
	case policy&policyOne == 0:
		return refuse("policy %#x lacks bit 17, which must be 1", policy)
	case policy&policyBad != 0:
		return refuse("policy %#x allows debugging or a migration agent", policy)
	case policy&^uint64(policyKnown) != 0:
		return refuse("policy %#x has bits this build does not know", policy)
	case len(hostData) != hostDataLen:
		return refuse("HOST_DATA has %d bytes, want %d", len(hostData), hostDataLen)
	}
	return nil
}

func checkSNP(t *vm.SNP) error {
	if len(t.IDBlock) != 0 || len(t.IDAuth) != 0 {
		pair, err := idblock.Verify(t.IDBlock, t.IDAuth)
		if err != nil {
			return refuse("%v", err)
		}
		if pair.Block.Policy != t.Policy {
			return refuse("the ID block is for policy %#x, the launch has %#x", pair.Block.Policy, t.Policy)
		}
	}
	return checkLaunch(t.Policy, t.HostData)
}

// checkEmulated: the paths become part of QEMU's own arguments, where a comma
// starts another option.
func checkEmulated(t *vm.Emulated) error {
	for _, path := range []string{t.HashTable, t.PSPSocket} {
		if !filepath.IsAbs(path) || strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r > '~' || r == ',' }) {
			return refuse("path %q is not absolute, or has a comma or blank", path)
		}
	}
	if t.HashTableGPA == 0 || t.HashTableGPA >= 1<<32 {
		return refuse("hash table at %#x, want an address below 4 GiB", t.HashTableGPA)
	}
	return checkLaunch(t.Policy, t.HostData)
}

// mark is our metadata element.
type mark struct {
	XMLName    xml.Name `xml:"guest"`
	Namespace  string   `xml:"xmlns,attr"`
	ID         string   `xml:"id,attr"`
	Generation uint64   `xml:"generation,attr"`
}

func identity(s vm.Spec, d *libvirtxml.Domain) error {
	text, err := xml.Marshal(mark{Namespace: MetadataNamespace, ID: s.GuestID, Generation: s.Generation})
	if err != nil {
		return fmt.Errorf("rendering metadata: %w", err)
	}
	d.Name, d.UUID = vm.NamePrefix+s.GuestID, s.GuestID
	d.Metadata = &libvirtxml.DomainMetadata{XML: string(text)}
	return nil
}

// ParseMark reads our metadata element back. libvirt is asked by the namespace
// and answers without it; whoever may talk to libvirt can have written any.
func ParseMark(text string) (guestID string, generation uint64, err error) {
	var m mark
	if err := xml.Unmarshal([]byte(text), &m); err != nil {
		return "", 0, fmt.Errorf("reading domain metadata: %w", err)
	}
	if m.Generation == 0 {
		return "", 0, errors.New("reading domain metadata: there is no generation")
	}
	return m.ID, m.Generation, nil
}

func machine(_ vm.Spec, d *libvirtxml.Domain) error {
	d.OS = &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: "q35", Type: "hvm"}}
	d.Features = &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}}
	// The state of an encrypted vCPU cannot be reset: a reboot is the end.
	d.OnPoweroff, d.OnReboot, d.OnCrash = "destroy", "destroy", "destroy"
	d.Devices = &libvirtxml.DomainDeviceList{
		Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
		MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
	}
	return nil
}

func processor(s vm.Spec, d *libvirtxml.Domain) error {
	d.VCPU = &libvirtxml.DomainVCPU{Placement: "static", Value: uint(s.VCPUs)}
	d.CPU = &libvirtxml.DomainCPU{Mode: "custom", Match: "exact", Check: "none", Model: &libvirtxml.DomainCPUModel{Value: s.CPUModel, Fallback: "forbid"}}
	return nil
}

func memory(s vm.Spec, d *libvirtxml.Domain) error {
	d.Memory = &libvirtxml.DomainMemory{Value: uint(s.MemoryMiB), Unit: "MiB", DumpCore: "off"}
	return nil
}

// boot loads the firmware as a ROM: pflash needs read-only memory slots,
// which private memory has not.
func boot(s vm.Spec, d *libvirtxml.Domain) error {
	d.OS.Loader = &libvirtxml.DomainLoader{Path: s.Firmware, Type: "rom", Stateless: "yes"}
	d.OS.Kernel, d.OS.Initrd, d.OS.Cmdline = s.Kernel, s.Initrd, s.Cmdline
	return nil
}

func disks(s vm.Spec, d *libvirtxml.Domain) error {
	for i, disk := range s.Disks {
		d.Devices.Disks = append(d.Devices.Disks, libvirtxml.DomainDisk{
			Device: "disk",
			Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw"},
			Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{
				File: disk.Path,
				// The blob is shared, readable by all, and stays root's: QEMU's
				// user must not own what the next guest may be given.
				SecLabel: []libvirtxml.DomainDeviceSecLabel{{Model: "dac", Relabel: "no"}},
			}},
			Target:   &libvirtxml.DomainDiskTarget{Dev: "vd" + string(rune('a'+i)), Bus: "virtio"},
			Serial:   disk.Serial,
			ReadOnly: &libvirtxml.DomainDiskReadOnly{},
		})
	}
	return nil
}

func nic(s vm.Spec, d *libvirtxml.Domain) error {
	d.Devices.Interfaces = []libvirtxml.DomainInterface{{
		MAC:    &libvirtxml.DomainInterfaceMAC{Address: s.NIC.MAC},
		Source: &libvirtxml.DomainInterfaceSource{Ethernet: &libvirtxml.DomainInterfaceSourceEthernet{}},
		Target: &libvirtxml.DomainInterfaceTarget{Dev: s.NIC.Tap, Managed: "no"},
		Model:  &libvirtxml.DomainInterfaceModel{Type: "virtio"},
		ROM:    &libvirtxml.DomainROM{Enabled: "no"},
	}}
	return nil
}

func console(s vm.Spec, d *libvirtxml.Domain) error {
	if s.ConsoleLog == "" {
		return nil
	}
	port := uint(0)
	d.Devices.Serials = []libvirtxml.DomainSerial{{
		Source: &libvirtxml.DomainChardevSource{File: &libvirtxml.DomainChardevSourceFile{Path: s.ConsoleLog}},
		Target: &libvirtxml.DomainSerialTarget{Type: "isa-serial", Port: &port},
	}}
	return nil
}

func tee(s vm.Spec, d *libvirtxml.Domain) error {
	if s.TEE.Emulated != nil {
		return emulated(s.TEE.Emulated, d)
	}
	t := s.TEE.SNP
	d.Type = "kvm"
	policy := t.Policy
	d.LaunchSecurity = &libvirtxml.DomainLaunchSecurity{SEVSNP: &libvirtxml.DomainLaunchSecuritySEVSNP{
		KernelHashes: "yes", Policy: &policy, HostData: base64.StdEncoding.EncodeToString(t.HostData),
	}}
	if len(t.IDBlock) == 0 {
		return nil
	}
	pair, err := idblock.Verify(t.IDBlock, t.IDAuth)
	if err != nil {
		return fmt.Errorf("rendering ID block: %w", err)
	}
	snp := d.LaunchSecurity.SEVSNP
	snp.IDBlock, snp.IDAuth = base64.StdEncoding.EncodeToString(pair.RawBlock), base64.StdEncoding.EncodeToString(pair.RawAuth)
	// Firmware looks at the author key only when told that there is one.
	if pair.HasAuthorKey {
		snp.AuthorKey = "yes"
	}
	return nil
}
