package gpu

import (
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vfio"
)

// Model is one product whose CC mode a host may rent out.
type Model struct {
	// Name is the marketing name as Rule knows it, "H100"; "NVSwitch" for the
	// switch of HGX Hopper boards, which goes with all eight GPUs or with none.
	Name string `json:"name"`
	// Board says which variant, "SXM", "PCIe", "NVL".
	Board string `json:"board,omitempty"`
}

const (
	vendorNVIDIA = 0x10de
	// anySubsystem stands in the table where every board of a device id counts.
	anySubsystem = 0
)

// board is one device id with the subsystem ids of boards that are known.
type board struct {
	device     uint16
	subsystems []uint16
	model      Model
	// refuse says in words why a known product cannot be rented out.
	refuse string
}

// boards are NVIDIA's device and subsystem ids, of its admin tools v2025.10.20
// and open kernel modules 595.45.04. It is a list of what is allowed: chips of
// consumer boards have the same registers, and firmware decides.
func boards() []board {
	ids := func(subsystems ...uint16) []uint16 { return subsystems }
	const (
		grace       = "its Grace CPU has no TEE"
		workstation = "only the Server Edition has Confidential Computing; workstation boards are announced, not supported"
		ampere      = "Ampere has no CC mode a host can set"
		ada         = "Ada has no CC mode; its driver refuses to load in a confidential guest"
	)
	return []board{
		{0x2331, ids(0x1626), Model{"H100", "PCIe"}, ""},
		{0x2321, ids(0x1839), Model{"H100", "NVL"}, ""},
		{0x2330, ids(0x16c0, 0x16c1, 0x2044, 0x20c1), Model{"H100", "SXM"}, ""},
		{0x2336, ids(0x16c2, 0x16c7), Model{"H100", "SXM"}, ""},
		{0x2337, ids(0x16e5, 0x16ef), Model{"H100", "SXM"}, ""},
		{0x2338, ids(0x16f6, 0x16f7), Model{"H100", "SXM"}, ""},
		{0x2339, ids(0x17d9, 0x17fc), Model{"H100", "SXM"}, ""},
		{0x2313, ids(anySubsystem), Model{"H100", "SXM"}, ""},
		{0x233d, ids(anySubsystem), Model{"H100", "SXM"}, ""},
		{0x2335, ids(0x18be, 0x18bf), Model{"H200", "SXM"}, ""},
		{0x233b, ids(0x1996), Model{"H200", "NVL"}, ""},
		{0x2322, ids(0x17a4), Model{"H800", "PCIe"}, ""},
		{0x233a, ids(0x183a), Model{"H800", "NVL"}, ""},
		{0x2324, ids(0x17a6, 0x17a8), Model{"H800", "SXM"}, ""},
		{0x2328, ids(0x1905, 0x1906), Model{"H20", "SXM"}, ""},
		{0x2329, ids(0x198b, 0x198c), Model{"H20", "SXM"}, ""},
		{0x232c, ids(0x2063, 0x2064), Model{"H20", "SXM"}, ""},
		{0x2309, ids(anySubsystem), Model{"H20", ""}, ""},
		{0x230c, ids(anySubsystem), Model{"H20", ""}, ""},
		{0x230e, ids(0x20df), Model{"H20", ""}, ""},
		{0x2901, ids(0x1999, 0x199b, 0x199d, 0x20da), Model{"B200", "SXM"}, ""},
		{0x3182, ids(0x20e6), Model{"B300", "SXM"}, ""},
		{0x31c2, ids(0x20e5, 0x20e6), Model{"B300", "SXM"}, ""},
		{0x2bb5, ids(0x204e, 0x220b), Model{"RTX PRO 6000", "Server Edition"}, ""},
		{0x22a3, ids(anySubsystem), Model{"NVSwitch", "HGX Hopper"}, ""},

		{0x2342, ids(anySubsystem), Model{Name: "GH200"}, grace},
		{0x2343, ids(anySubsystem), Model{Name: "GH200"}, grace},
		{0x2345, ids(anySubsystem), Model{Name: "GH200"}, grace},
		{0x2348, ids(anySubsystem), Model{Name: "GH200"}, grace},
		{0x2941, ids(anySubsystem), Model{Name: "GB200"}, grace},
		{0x31c2, ids(0x21f1), Model{Name: "GB300"}, grace},
		{0x2bb1, ids(anySubsystem), Model{Name: "RTX PRO 6000 Workstation Edition"}, workstation},
		{0x2bb4, ids(anySubsystem), Model{Name: "RTX PRO 6000 Max-Q"}, workstation},
		{0x20b0, ids(anySubsystem), Model{Name: "A100"}, ampere},
		{0x20b2, ids(anySubsystem), Model{Name: "A100"}, ampere},
		{0x20b5, ids(anySubsystem), Model{Name: "A100"}, ampere},
		{0x20f1, ids(anySubsystem), Model{Name: "A100"}, ampere},
		{0x2684, ids(anySubsystem), Model{Name: "RTX 4090"}, ada},
		{0x26b9, ids(anySubsystem), Model{Name: "L40S"}, ada},
	}
}

// Identify tells what an NVIDIA function is, from ids that can be read in any
// mode. It refuses with gpu.unsupported-model, in words, what is known and
// cannot be rented out confidentially, and with gpu.unknown-model any board
// that is not in the list: its firmware was never validated for CC.
// gpu.not-a-gpu is everything else, an audio function for instance.
func Identify(f vfio.Function) (Model, error) {
	const display, switches = 0x03, vfio.ClassOtherBridge
	if f.Vendor != vendorNVIDIA || (f.Class>>16 != display && f.Kind() != switches) {
		return Model{}, contract.Refuse("gpu.not-a-gpu", "name GPUs and NVSwitches of NVIDIA only",
			"%s (%04x:%04x, class %06x) is neither", f.Address, f.Vendor, f.Device, f.Class)
	}
	for _, b := range boards() {
		known := slices.Contains(b.subsystems, f.SubsystemDevice) || slices.Contains(b.subsystems, anySubsystem)
		if b.device != f.Device || !known {
			continue
		}
		if b.refuse != "" {
			return b.model, contract.Refuse("gpu.unsupported-model", useOther, "%s, %s, cannot be used confidentially: %s", f.Address, b.model.Name, b.refuse)
		}
		return b.model, nil
	}
	return Model{}, contract.Refuse("gpu.unknown-model", useOther+"; a new board needs a newer agent",
		"%s (10de:%04x, subsystem %04x) is no board that this build knows to have Confidential Computing", f.Address, f.Device, f.SubsystemDevice)
}

// Capable splits functions into those that can be rented out and why the
// other NVIDIA ones cannot. Functions of others are left out.
func Capable(functions []vfio.Function) (capable map[vfio.Address]Model, refused map[vfio.Address]*contract.Refusal) {
	capable, refused = map[vfio.Address]Model{}, map[vfio.Address]*contract.Refusal{}
	for _, f := range functions {
		model, err := Identify(f)
		switch {
		case err == nil:
			capable[f.Address] = model
		case contract.AsRefusal(err).Code != "gpu.not-a-gpu":
			refused[f.Address] = contract.AsRefusal(err)
		}
	}
	return capable, refused
}
