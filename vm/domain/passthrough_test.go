package domain

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm"
)

const gib = 1 << 30

func gpus(count int, bar0, bar1 uint64) (out []vm.PCIDevice) {
	for i := range count {
		out = append(out, vm.PCIDevice{
			Address: fmt.Sprintf("0000:%02x:00.0", 0x18+i*0x10), Kind: vm.KindGPU,
			BARs: []uint64{bar0, bar1, 32 << 20}, IOMMUGroup: 40 + i,
		})
	}
	return out
}

func hopper(count int) []vm.PCIDevice { return gpus(count, 16<<20, 128*gib) }

func board() []vm.PCIDevice {
	out := hopper(8)
	for i := range 4 {
		out = append(out, vm.PCIDevice{Address: fmt.Sprintf("0000:%02x:00.0", 5+i), Kind: vm.KindNVSwitch, BARs: []uint64{32 << 20}, IOMMUGroup: 60 + i})
	}
	return out
}

func with(devices []vm.PCIDevice) vm.Spec {
	s := spec()
	s.Devices = devices
	return s
}

func profiles() map[string]vm.Spec {
	p := map[string]vm.Spec{
		"gpu-1-type1.xml":       with(hopper(1)),
		"gpu-1-iommufd.xml":     with(hopper(1)),
		"gpu-8-hgx.xml":         with(gpus(8, 64<<20, 256*gib)),
		"gpu-8-ppcie.xml":       with(board()),
		"gpu-2-blackwell.xml":   with(gpus(2, 64<<20, 256*gib)),
		"gpu-4-numa-placed.xml": with(hopper(4)),
	}
	s := p["gpu-1-iommufd.xml"]
	s.IOMMUFD = true
	p["gpu-1-iommufd.xml"] = s
	s = p["gpu-4-numa-placed.xml"]
	s.CPUs = []int{3, 2, 1, 0}
	p["gpu-4-numa-placed.xml"] = s
	return p
}

// That VFIO maps, that firmware places the BARs, and that memory lands on its
// node is for hardware to settle.
func TestEveryGPUProfileIsTheGoldenOne(t *testing.T) {
	t.Parallel()
	for name, s := range profiles() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			golden(t, name, s)
			text, err := Render(s)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(text, "hugepages") || strings.Contains(text, `managed="yes"`) {
				t.Errorf("hugepages, or a managed device:\n%s", text)
			}
			if err := CheckDevices(text, s.Devices); err != nil {
				t.Errorf("what was rendered is not what was asked for: %v", err)
			}
		})
	}
}

// libvirt 11.3 does not know the element; without it the domain is the one
// that it does know.
func TestIOMMUFDIsOneElementMore(t *testing.T) {
	t.Parallel()
	s := profiles()["gpu-1-iommufd.xml"]
	text, err := Render(s)
	if err != nil {
		t.Fatal(err)
	}
	s.IOMMUFD = false
	plain, err := Render(s)
	if err != nil {
		t.Fatal(err)
	}
	const element = "  <iommufd enabled=\"yes\"></iommufd>\n"
	if strings.Count(text, element) != 1 || strings.Replace(text, element, "", 1) != plain {
		t.Errorf("more differs than one element:\n%s", text)
	}
}

func TestDevicesThatCannotBeAttachedAreRefused(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*vm.Spec){
		"nine GPUs":              func(s *vm.Spec) { s.Devices = hopper(9) },
		"one GPU twice":          func(s *vm.Spec) { s.Devices[1] = s.Devices[0] },
		"upper-case address":     func(s *vm.Spec) { s.Devices[0].Address = "0000:AB:00.0" },
		"address with an option": func(s *vm.Spec) { s.Devices[0].Address += ",x=y" },
		"slot of 32":             func(s *vm.Spec) { s.Devices[0].Address = "0000:01:20.0" },
		"unknown kind":           func(s *vm.Spec) { s.Devices[0].Kind = "nic" },
		"no BAR":                 func(s *vm.Spec) { s.Devices[0].BARs = nil },
		"BAR of no power of two": func(s *vm.Spec) { s.Devices[0].BARs = []uint64{3 * gib} },
		"no IOMMU group":         func(s *vm.Spec) { s.Devices[0].IOMMUGroup = -1 },
		"switches of half a board": func(s *vm.Spec) {
			s.Devices = append(hopper(4), board()[8:]...)
		},
		"a switch alone":       func(s *vm.Spec) { s.Devices = board()[8:] },
		"switch before GPUs":   func(s *vm.Spec) { s.Devices = board(); s.Devices[0], s.Devices[8] = s.Devices[8], s.Devices[0] },
		"switch of a huge BAR": func(s *vm.Spec) { s.Devices = board(); s.Devices[8].BARs = []uint64{64 * gib} },
		"one CPU twice":        func(s *vm.Spec) { s.CPUs = []int{0, 0} },
		"negative CPU":         func(s *vm.Spec) { s.CPUs = []int{-1} },
		"iommufd for nothing":  func(s *vm.Spec) { s.Devices, s.IOMMUFD = nil, true },
		"an emulated guest":    func(s *vm.Spec) { s.TEE = vm.TEE{Emulated: &vm.Emulated{}} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := with(hopper(2))
			change(&s)
			_, err := Render(s)
			if refusal, ok := errors.AsType[*contract.Refusal](err); !ok || refusal.Remedy == "" {
				t.Errorf("not refused with a remedy: %v", err)
			}
		})
	}
}

func TestADomainWithOtherDevicesIsAFinding(t *testing.T) {
	t.Parallel()
	text, err := Render(with(hopper(2)))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text string
		want []vm.PCIDevice
	}{
		"one more":         {text, hopper(1)},
		"one less":         {text, hopper(3)},
		"none asked for":   {text, nil},
		"managed":          {strings.Replace(text, `type="pci" managed="no"`, `type="pci" managed="yes"`, 1), hopper(2)},
		"of another kind":  {strings.Replace(text, "</devices>", `<hostdev mode="subsystem" type="usb"><source><vendor id="0x1"/><product id="0x2"/></source></hostdev></devices>`, 1), hopper(2)},
		"as an interface":  {strings.Replace(text, "</devices>", `<interface type="hostdev"><source><address type="pci" bus="1"/></source></interface></devices>`, 1), hopper(2)},
		"by QEMU argument": {"", hopper(2)},
		"no XML":           {"<domain", nil},
	} {
		if name == "by QEMU argument" {
			s, end := text, "</commandline>"
			if !strings.Contains(s, end) {
				t.Fatalf("no QEMU arguments in\n%s", s)
			}
			c.text = strings.Replace(s, end, `<arg value="vfio-pci,host=01:00.0"></arg>`+end, 1)
		}
		refusal, ok := errors.AsType[*contract.Refusal](CheckDevices(c.text, c.want))
		if !ok || refusal.Code != "vm.devices-differ" {
			t.Errorf("%s: %v", name, refusal)
		}
	}
}

func TestSchemaKnowsTheDomainWithoutIOMMUFD(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("virt-xml-validate"); err != nil {
		skip.Missing(t, "virt-xml-validate (libvirt-clients)")
	}
	s := profiles()["gpu-1-iommufd.xml"]
	text, err := Render(s)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "domain.xml")
	text = strings.Replace(text, "  <iommufd enabled=\"yes\"></iommufd>\n", "", 1)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "virt-xml-validate", file, "domain").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func FuzzPCIAddress(f *testing.F) {
	f.Add("0000:18:00.0")
	f.Add("ffff:ff:1f.7")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := parseAddress(text)
		if err != nil {
			return
		}
		if back := fmt.Sprintf("%04x:%02x:%02x.%x", *a.Domain, *a.Bus, *a.Slot, *a.Function); back != text {
			t.Errorf("%q comes back as %q", text, back)
		}
	})
}

func FuzzCheckDevices(f *testing.F) {
	text, err := Render(with(hopper(1)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add("<domain><devices><hostdev mode='subsystem' type='pci'><source/></hostdev></devices></domain>")
	f.Fuzz(func(t *testing.T, text string) {
		if CheckDevices(text, hopper(1)) == nil && CheckDevices(text, nil) == nil {
			t.Errorf("a device is there and is not: %q", text)
		}
	})
}
