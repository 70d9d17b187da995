package gpu_test

import (
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/vfio"
)

func function(device, subsystem uint16, class uint32) vfio.Function {
	return vfio.Function{Address: "0000:41:00.0", Vendor: 0x10de, Device: device, SubsystemDevice: subsystem, Class: class}
}

func TestBoardsAreAllowedByTheirIDs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		device, subsystem uint16
		class             uint32
		name              string
		code, says        string
	}{
		{0x2331, 0x1626, 0x030200, "H100", "", ""},
		{0x2330, 0x16c1, 0x030200, "H100", "", ""},
		{0x2335, 0x18be, 0x030200, "H200", "", ""},
		{0x2322, 0x17a4, 0x030200, "H800", "", ""},
		{0x2329, 0x198b, 0x030200, "H20", "", ""},
		{0x2901, 0x1999, 0x030200, "B200", "", ""},
		{0x3182, 0x20e6, 0x030200, "B300", "", ""},
		{0x31c2, 0x20e5, 0x030200, "B300", "", ""},
		{0x2bb5, 0x204e, 0x030000, "RTX PRO 6000", "", ""},
		{0x22a3, 0x1796, 0x068000, "NVSwitch", "", ""},

		{0x31c2, 0x21f1, 0x030200, "GB300", "gpu.unsupported-model", "Grace"},
		{0x2342, 0x16eb, 0x030200, "GH200", "gpu.unsupported-model", "Grace"},
		{0x2941, 0x2046, 0x030200, "GB200", "gpu.unsupported-model", "Grace"},
		{0x20b0, 0x1450, 0x030200, "A100", "gpu.unsupported-model", "Ampere"},
		{0x2684, 0x16f4, 0x030000, "RTX 4090", "gpu.unsupported-model", "Ada"},
		{0x26b9, 0x1851, 0x030200, "L40S", "gpu.unsupported-model", "Ada"},
		{0x2bb1, 0x204b, 0x030000, "RTX PRO 6000 Workstation Edition", "gpu.unsupported-model", "Server Edition"},
		{0x2330, 0x9999, 0x030200, "", "gpu.unknown-model", "9999"},
		{0x2b85, 0x1234, 0x030000, "", "gpu.unknown-model", "2b85"},
		{0x22e8, 0x204e, 0x040300, "", "gpu.not-a-gpu", ""},
	} {
		model, err := gpu.Identify(function(c.device, c.subsystem, c.class))
		got := ""
		if err != nil {
			r := contract.AsRefusal(err)
			if got = r.Code; r.Remedy == "" || !strings.Contains(r.Message, c.says) {
				t.Errorf("%04x:%04x: %+v", c.device, c.subsystem, r)
			}
		}
		if model.Name != c.name || got != c.code {
			t.Errorf("%04x:%04x is %q, %q; want %q, %q", c.device, c.subsystem, model.Name, got, c.name, c.code)
		}
		if c.code == "" {
			if _, err := ccmode.ChipOf(0x10de, c.device); err != nil {
				t.Errorf("%s may be rented out, and its mode cannot be set: %v", c.name, err)
			}
			if c.name != "NVSwitch" && gpu.Rule(c.name, 1) != nil {
				t.Errorf("%s may be rented out, and no count of it is allowed", c.name)
			}
		}
	}
}

func TestOthersDevicesAreNobodysBusiness(t *testing.T) {
	t.Parallel()
	nic := vfio.Function{Address: "0000:01:00.0", Vendor: 0x15b3, Device: 0x1021, Class: 0x020000}
	a100 := function(0x20b0, 0, 0x030200)
	a100.Address = "0000:42:00.0"
	capable, refused := gpu.Capable([]vfio.Function{nic, function(0x2330, 0x16c1, 0x030200), a100})
	if len(capable) != 1 || capable["0000:41:00.0"].Name != "H100" || len(refused) != 1 || refused["0000:42:00.0"] == nil {
		t.Errorf("capable %v, refused %v", capable, refused)
	}
}
