package domain

import (
	"fmt"
	"strings"
	"testing"

	"github.com/confidential-node/agent/vm"
)

// gpus are devices from bus 0x41 on, on one NUMA node.
func gpus(count int, bar uint64, node int) (devices []vm.PCIDevice) {
	for i := range count {
		devices = append(devices, vm.PCIDevice{Address: fmt.Sprintf("0000:%02x:00.0", 0x41+i), LargestBAR: bar, NUMANode: node, LocalCPUs: "32-63,96-127"})
	}
	return devices
}

const gib = 1 << 30

// One H100 as on libvirt before 12.2; eight B200 of both sockets with iommufd;
// an HGX Hopper board with its switches.
func TestDomainsWithDevicesAreTheGoldenOnes(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*vm.Spec){
		"snp-gpu.xml":         func(s *vm.Spec) { s.Devices = gpus(1, 128*gib, 0) },
		"snp-gpu-iommufd.xml": func(s *vm.Spec) { s.Devices, s.IOMMUFD = gpus(8, 256*gib, 0), true; s.Devices[7].NUMANode = 1 },
		"snp-gpu-ppcie.xml": func(s *vm.Spec) {
			s.Devices = gpus(12, 128*gib, -1)
			for i := range s.Devices[8:] {
				s.Devices[8+i].LargestBAR = 32 << 20
			}
		},
	} {
		s := spec()
		change(&s)
		golden(t, name, s)
	}
}

func TestAGuestStaysBesideItsDevices(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		devices []vm.PCIDevice
		want    bool
	}{
		"one node":         {gpus(2, gib, 1), true},
		"two nodes":        {append(gpus(1, gib, 0), vm.PCIDevice{Address: "0000:c1:00.0", LargestBAR: gib, NUMANode: 1}), false},
		"an unknown node":  {gpus(1, gib, -1), false},
		"no device at all": {nil, false},
	} {
		s := spec()
		s.Devices = c.devices
		text, err := Render(s)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(text, `nodeset="1"`) && strings.Contains(text, `cpuset="32-63,96-127"`); got != c.want {
			t.Errorf("%s: %v\n%s", name, got, text)
		}
		if strings.Contains(text, "hugepages") {
			t.Errorf("%s: huge pages", name)
		}
	}
}

// The sizes are NVIDIA's published one and its multiples.
func TestTheMMIOWindowHoldsEveryGPU(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		count int
		bar   uint64
		want  uint64
	}{
		{0, 0, 0},
		{1, 128 * gib, 262144},
		{2, 128 * gib, 524288},
		{4, 128 * gib, 1048576},
		{8, 128 * gib, 2097152},
		{1, 256 * gib, 524288},
		{2, 256 * gib, 1048576},
		{4, 256 * gib, 2097152},
		{8, 256 * gib, 4194304},
		{1, 512 * gib, 1048576},
		{8, 512 * gib, 8388608},
		{3, 128 * gib, 1048576},
		{8, 1024 * gib, 16777216},
		{1, 1 << 20, 2},
	} {
		if got, err := windowMiB(gpus(c.count, c.bar, 0)); err != nil || got != c.want {
			t.Errorf("%d GPUs of %d GiB: %d (%v), want %d", c.count, c.bar/gib, got, err, c.want)
		}
	}
	mixed := append(gpus(1, 1<<20, 0), gpus(1, 128*gib, 0)...)
	if got, err := windowMiB(mixed); err != nil || got != 524288 {
		t.Errorf("the largest BAR does not decide: %d, %v", got, err)
	}
	for _, bar := range []uint64{0, 3 << 30, 1 << 19, 1 << 63, 16384 * gib} {
		if got, err := windowMiB(gpus(1, bar, 0)); err == nil || got != 0 {
			t.Errorf("a BAR of %d gives a window of %d MiB", bar, got)
		}
	}
}
