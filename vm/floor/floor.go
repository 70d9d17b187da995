// Package floor is the least versions of the host's software, with and without
// GPUs, and what they decide. It is the only place that has them: capability
// reports by it, a launch is refused by it. Pure; no I/O.
package floor

import (
	"slices"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Versions names what is installed, each as it names itself.
type Versions struct{ Kernel, Libvirt, QEMU string }

// Rule is the floors of one component.
type Rule struct {
	Name       string
	Plain, GPU string
	// Update is what to do below a floor.
	Update string
	// Of picks the component's version.
	Of func(Versions) string
}

// Rules are the floors, each for what it first has: kernel 6.11 hosts SNP, and NVIDIA
// supports GPUs from 6.17 on; libvirt 10.5.0 has the launch security of SNP,
// and passes GPUs through by type1; QEMU 9.1 has sev-snp-guest, and up to 10.0
// refuses it together with any VFIO device.
func Rules() []Rule {
	return []Rule{
		{"kernel", "6.11", "6.17", "install a newer kernel and reboot", func(v Versions) string { return v.Kernel }},
		{"libvirt", "10.5.0", "10.5.0", "install a newer libvirt", func(v Versions) string { return v.Libvirt }},
		{"qemu", "9.1", "10.1", "install a newer QEMU, for instance from the distribution's backports", func(v Versions) string { return v.QEMU }},
	}
}

// iommufdLibvirt first has <iommufd> in a domain.
const iommufdLibvirt = "12.2.0"

// Attach decides how GPUs are attached: through iommufd or, with an older
// libvirt, through the type1 container. A version that is too old, or not
// known, is refused.
func Attach(v Versions) (iommufd bool, err error) {
	for _, r := range Rules() {
		have := r.Of(v)
		meets, known := AtLeast(have, r.GPU)
		switch {
		case !known:
			return false, contract.Refuse("vm.version-unknown", "see that libvirtd runs and names its versions: `nodeagent capability`",
				"GPUs cannot be attached: %s's version %q is not known, %s is needed", r.Name, have, r.GPU)
		case !meets:
			return false, contract.Refuse("vm.version-too-old", r.Update,
				"GPUs cannot be attached: %s is %s, at least %s is needed", r.Name, have, r.GPU)
		}
	}
	iommufd, _ = AtLeast(v.Libvirt, iommufdLibvirt)
	return iommufd, nil
}

// AtLeast compares numbers that dots separate; what follows them is the
// distribution's. A version of fewer than two numbers is not known.
func AtLeast(observed, floor string) (meets, known bool) {
	have, want := numbers(observed), numbers(floor)
	if len(have) < 2 {
		return false, false
	}
	return slices.Compare(have, want) >= 0 || slices.Equal(have, want[:min(len(have), len(want))]), true
}

func numbers(version string) (out []int) {
	for part := range strings.SplitSeq(version, ".") {
		digits := part[:len(part)-len(strings.TrimLeft(part, "0123456789"))]
		n, err := strconv.Atoi(digits)
		if err != nil {
			return out
		}
		out = append(out, n)
		if digits != part {
			return out
		}
	}
	return out
}
