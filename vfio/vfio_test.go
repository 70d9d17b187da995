package vfio_test

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

const (
	h100   = vfio.Address("0000:41:00.0")
	shared = vfio.Address("0000:43:00.0")
	vga    = vfio.Address("0000:44:00.0")
	sound  = vfio.Address("0000:44:00.1")
	nvsw   = vfio.Address("0000:45:00.0")
)

// machine has an H100 behind a port of its own, one that shares its group with
// a network card, a display card with its audio function, and an NVSwitch.
func machine(t *testing.T) *vfiotest.Kernel {
	t.Helper()
	k, err := vfiotest.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	flr := []string{"flr", "bus"}
	for _, d := range []vfiotest.Device{
		{Address: "0000:40:01.0", Vendor: 0x1022, Device: 0x14ab, Class: 0x060400, Group: "10", Driver: "pcieport"},
		{
			Address: h100, Vendor: 0x10de, Device: 0x2330, SubVendor: 0x10de, SubDevice: 0x16c1, Class: 0x030200, Group: "11", Driver: "nvidia",
			Bridge: "0000:40:01.0", NUMANode: 1, BAR: [3]uint64{16 << 20, 128 << 30, 32 << 20}, ResetMethods: flr,
		},
		{Address: shared, Vendor: 0x10de, Device: 0x2330, Class: 0x030200, Group: "12", ResetMethods: flr},
		{Address: "0000:43:00.1", Vendor: 0x15b3, Device: 0x1021, Class: 0x020000, Group: "12", Driver: "", ResetMethods: flr},
		{Address: vga, Vendor: 0x10de, Device: 0x2bb5, Class: 0x030000, Group: "13", Driver: "nouveau", ResetMethods: flr},
		{Address: sound, Vendor: 0x10de, Device: 0x22e8, Class: 0x040300, Group: "13", Driver: "snd_hda_intel"},
		{Address: nvsw, Vendor: 0x10de, Device: 0x22a3, Class: 0x068000, Group: "14"},
		{Address: "0000:46:00.0", Vendor: 0x10de, Device: 0x2330, Class: 0x030200},
	} {
		if err := k.Add(d); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

func code(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}

func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestAFunctionIsReadWhole(t *testing.T) {
	k := machine(t)
	f := must[vfio.Function](t)(k.Host().Function(h100))
	want := vfio.Function{
		Address: h100, Vendor: 0x10de, Device: 0x2330, SubsystemVendor: 0x10de, SubsystemDevice: 0x16c1, Class: 0x030200, Revision: 0xa1,
		Driver: "nvidia", Group: "11", NUMANode: 1, Bridge: "0000:40:01.0", ResetMethods: []string{"flr", "bus"}, PowerState: "D0",
		BARs: []vfio.BAR{
			{Index: 0, Start: 0x10000000000, Size: 16 << 20, Prefetchable: true, Wide: true},
			{Index: 2, Start: 0x10001000000, Size: 128 << 30, Prefetchable: true, Wide: true},
			{Index: 4, Start: 0x12001000000, Size: 32 << 20, Prefetchable: true, Wide: true},
		},
		Link: vfio.Link{Speed: "32.0 GT/s PCIe", Width: 16, MaxSpeed: "32.0 GT/s PCIe", MaxWidth: 16},
	}
	got, _ := json.Marshal(f)
	expected, _ := json.Marshal(want)
	if string(got) != string(expected) {
		t.Errorf("read\n%s, want\n%s", got, expected)
	}
	if _, err := k.Host().Function("0000:99:00.0"); code(err) != "vfio.no-device" {
		t.Errorf("missing device: %v", err)
	}
}

func TestOneBrokenFunctionDoesNotHideTheOthers(t *testing.T) {
	k := machine(t)
	if err := os.WriteFile(filepath.Join(k.Host().Sysfs, "bus/pci/devices", string(shared), "vendor"), []byte("0x10dez\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	functions, err := k.Host().Functions()
	if err == nil || !strings.Contains(err.Error(), string(shared)) || len(functions) != 7 {
		t.Errorf("%d functions, %v: want 7 and an error that names %s", len(functions), err, shared)
	}
}

func TestAGroupMayHoldNobodyElse(t *testing.T) {
	k := machine(t)
	all := must[[]vfio.Function](t)(k.Host().Functions())
	for a, want := range map[vfio.Address]string{h100: "", nvsw: "", vga: "", shared: "vfio.group-shared", "0000:46:00.0": "vfio.no-iommu"} {
		companions, err := vfio.Companions(must[vfio.Function](t)(k.Host().Function(a)), all)
		if code(err) != want {
			t.Errorf("%s: %v, want %q", a, err, want)
		}
		if a == vga && (len(companions) != 1 || companions[0].Address != sound) {
			t.Errorf("companions %v, want the audio function", companions)
		}
	}
}

// snapshot is what the operator can see of a function's binding.
func snapshot(t *testing.T, k *vfiotest.Kernel, a vfio.Address) string {
	t.Helper()
	f := must[vfio.Function](t)(k.Host().Function(a))
	power, _ := os.ReadFile(filepath.Join(k.Host().Sysfs, "bus/pci/devices", string(a), "power/control"))
	d3cold, _ := os.ReadFile(filepath.Join(k.Host().Sysfs, "bus/pci/devices", string(a), "d3cold_allowed"))
	return f.Driver + "/" + f.Override + "/" + strings.TrimSpace(string(power)) + "/" + strings.TrimSpace(string(d3cold))
}

func TestBindingAndGivingBackMayBeRepeated(t *testing.T) {
	for _, a := range []vfio.Address{h100, vga, sound, nvsw} {
		k := machine(t)
		host := k.Host()
		before := snapshot(t, k, a)
		b := must[vfio.Binding](t)(host.Plan(a))
		if now := snapshot(t, k, a); now != before {
			t.Fatalf("%s: planning changed %s to %s", a, before, now)
		}
		for range 2 {
			if err := host.Bind(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			if now := snapshot(t, k, a); now != "vfio-pci/vfio-pci/on/0" {
				t.Errorf("%s bound: %s", a, now)
			}
		}
		for range 2 {
			if err := host.GiveBack(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			if now := snapshot(t, k, a); now != before {
				t.Errorf("%s given back: %s, was %s", a, now, before)
			}
		}
	}
}

// Every write may be the last one before the agent's death.
func TestADeathBetweenTwoWritesIsRepaired(t *testing.T) {
	died := errors.New("died")
	for n := 0; ; n++ {
		k := machine(t)
		host := k.Host()
		before := snapshot(t, k, h100)
		b := must[vfio.Binding](t)(host.Plan(h100))
		mortal := host
		writes := &counting{Writer: host.Writer, left: n, err: died}
		mortal.Writer = writes
		err := mortal.Bind(t.Context(), b)
		if err == nil || n > 20 {
			if n < 4 || n > 20 {
				t.Errorf("binding takes %d writes", n)
			}
			break
		}
		if err := host.GiveBack(t.Context(), b); err != nil {
			t.Fatalf("giving back after %d writes: %v", n, err)
		}
		if now := snapshot(t, k, h100); now != before {
			t.Errorf("after %d writes and giving back: %s, was %s", n, now, before)
		}
		if err := errors.Join(host.Bind(t.Context(), b)); err != nil || snapshot(t, k, h100) != "vfio-pci/vfio-pci/on/0" {
			t.Errorf("binding anew after %d writes: %v", n, err)
		}
	}
}

type counting struct {
	vfio.Writer
	left int
	err  error
}

func (c *counting) Write(ctx context.Context, path, value string) error {
	if c.left--; c.left < 0 {
		return c.err
	}
	return c.Writer.Write(ctx, path, value)
}

func TestADeviceInUseIsLeftAlone(t *testing.T) {
	for _, c := range []struct {
		name string
		a    vfio.Address
		open string
		info bool
		want string
	}{
		{"nvidia, minor known", h100, "dev/nvidia3", true, "vfio.in-use"},
		{"nvidia, another GPU's", h100, "dev/nvidia4", true, ""},
		{"nvidia, minor unknown", h100, "dev/nvidia4", false, "vfio.in-use"},
		{"nvidia, control node only", h100, "dev/nvidiactl", false, ""},
		{"registers", nvsw, "sys/devices/pci0000:00/" + string(nvsw) + "/resource0", false, "vfio.in-use"},
		{"graphics node", vga, "dev/dri/card1", false, "vfio.in-use"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := machine(t)
			host := k.Host()
			if err := os.MkdirAll(filepath.Join(host.Sysfs, "bus/pci/devices", string(vga), "drm/card1"), 0o755); err != nil {
				t.Fatal(err)
			}
			if c.info {
				dir := filepath.Join(host.Proc, "driver/nvidia/gpus", string(h100))
				if err := errors.Join(os.MkdirAll(dir, 0o755),
					os.WriteFile(filepath.Join(dir, "information"), []byte("Model: \t\t NVIDIA H100\nDevice Minor: \t 3\n"), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			if err := k.Process(4711, "nvidia-persiste", c.open); err != nil {
				t.Fatal(err)
			}
			before := snapshot(t, k, c.a)
			_, err := host.Plan(c.a)
			if code(err) != c.want || (c.want != "" && !strings.Contains(err.Error(), "nvidia-persiste (pid 4711")) {
				t.Errorf("%v, want %q with the process", err, c.want)
			}
			f := must[vfio.Function](t)(host.Function(c.a))
			b := vfio.Binding{Address: c.a, Vendor: f.Vendor, Device: f.Device, Driver: f.Driver}
			if err := host.Bind(t.Context(), b); code(err) != c.want {
				t.Errorf("bind: %v, want %q", err, c.want)
			}
			if now := snapshot(t, k, c.a); c.want != "" && now != before {
				t.Errorf("in use and yet changed from %s to %s", before, now)
			}
		})
	}
}

func TestTroubleHasItsName(t *testing.T) {
	for _, c := range []struct {
		name  string
		upset func(k *vfiotest.Kernel) error
		want  string
	}{
		{"no driver", func(k *vfiotest.Kernel) error { return k.Unload("vfio-pci") }, "vfio.no-driver"},
		{"another device came", func(k *vfiotest.Kernel) error {
			return errors.Join(k.Remove(h100), k.Add(vfiotest.Device{Address: h100, Vendor: 0x10de, Device: 0x20b0, Class: 0x030200, Group: "11"}))
		}, "vfio.device-changed"},
		{"device gone", func(k *vfiotest.Kernel) error { return k.Remove(h100) }, "vfio.no-device"},
		{"unbinding hangs", func(k *vfiotest.Kernel) error { k.Hang(h100); return nil }, "vfio.stuck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := machine(t)
			b := must[vfio.Binding](t)(k.Host().Plan(h100))
			if err := c.upset(k); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := k.Host().Bind(ctx, b); code(err) != c.want {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	k := machine(t)
	b := must[vfio.Binding](t)(k.Host().Plan(h100))
	if err := errors.Join(k.Host().Bind(t.Context(), b), k.Unload("nvidia")); err != nil {
		t.Fatal(err)
	}
	if err := k.Host().GiveBack(t.Context(), b); code(err) != "vfio.no-driver" || k.Driver(h100) != "" {
		t.Errorf("old driver gone: %v, now on %q", err, k.Driver(h100))
	}
}

func TestResetsGoByTheMethodAskedFor(t *testing.T) {
	k := machine(t)
	host := k.Host()
	for method, want := range map[string]string{"": "", "flr": "", "bus": "", "pm": "vfio.no-reset"} {
		if err := host.ResetFunction(t.Context(), h100, method); code(err) != want {
			t.Errorf("%q: %v", method, err)
		}
		if f := must[vfio.Function](t)(host.Function(h100)); !slices.Equal(f.ResetMethods, []string{"flr", "bus"}) {
			t.Errorf("%q left reset methods %q", method, f.ResetMethods)
		}
	}
	if err := host.ResetFunction(t.Context(), nvsw, ""); code(err) != "vfio.no-reset" {
		t.Errorf("no method: %v", err)
	}
	k.Hang(h100)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := host.ResetFunction(ctx, h100, "bus"); code(err) != "vfio.stuck" {
		t.Errorf("hanging: %v", err)
	}
	k.Fail("reset", unix.EPERM)
	if err := host.ResetFunction(t.Context(), h100, ""); !errors.Is(err, unix.EPERM) {
		t.Errorf("the kernel's own error is lost: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	for text, want := range map[string]vfio.Address{
		"0000:41:00.0": h100, "41:00.0": h100, "0001:C1:1F.7": "0001:c1:1f.7",
		"": "", "0000:41:20.0": "", "0000:41:00.8": "", "../0000:41:00.0": "", "0000:41:00.0/..": "", "41:00": "",
	} {
		if got, err := vfio.ParseAddress(text); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if h100.Slot() != "0000:41:00" {
		t.Errorf("slot %q", h100.Slot())
	}
}

// FuzzFunction reads attributes with anything in them.
func FuzzFunction(f *testing.F) {
	k, err := vfiotest.New(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	if err := k.Add(vfiotest.Device{Address: h100, Vendor: 0x10de, Device: 0x2330, Class: 0x030200, Group: "1"}); err != nil {
		f.Fatal(err)
	}
	names := slices.Sorted(maps.Keys(map[string]bool{"vendor": true, "class": true, "resource": true, "numa_node": true, "reset_method": true, "driver_override": true}))
	f.Add(uint8(4), "0x0000010000000000 0x0000010000ffffff 0x000000000014220c\n")
	f.Fuzz(func(t *testing.T, which uint8, text string) {
		path := filepath.Join(k.Host().Sysfs, "bus/pci/devices", string(h100), names[int(which)%len(names)])
		old, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.WriteFile(path, old, 0o644) })
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		function, err := k.Host().Function(h100)
		for _, bar := range function.BARs {
			if err == nil && (bar.Size == 0 || bar.Index > 5) {
				t.Errorf("%q became %+v", text, function.BARs)
			}
		}
	})
}
