package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/nvidia"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/capability"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

const gpuAddress = "0000:41:00.0"

// gpuDesk is an agent's GPUs behind its socket: a real pool, over a kernel and
// an H100 that are played.
type gpuDesk struct {
	socket string
	kernel *vfiotest.Kernel
	h100   *gputest.Emulator
	pool   *pool.Pool
}

func newGPUDesk(t *testing.T) *gpuDesk {
	t.Helper()
	dir := t.TempDir()
	k, err := vfiotest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	model := gputest.H100()
	model.Timing = gputest.Timing{}
	d := &gpuDesk{socket: filepath.Join(dir, "s"), kernel: k, h100: gputest.New(model)}
	if err := k.Add(vfiotest.Device{
		Address: gpuAddress, Vendor: 0x10de, Device: model.Device, SubVendor: 0x10de, SubDevice: model.Subsystem, Class: model.Class, Group: "41",
		Driver: "nvidia", BAR: model.BAR, ResetMethods: []string{"flr", "bus"}, Hardware: d.h100,
	}); err != nil {
		t.Fatal(err)
	}
	records, err := store.Open(filepath.Join(dir, "state", "state.db"), nil, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	d.pool, err = pool.New(pool.Deps{Records: records, Host: k.Host(), System: k, Logger: hclog.NewNullLogger()},
		pool.Config{Manage: []string{gpuAddress, "0000:99:00.0"}, BootID: "boot"})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.pool.Settle(func(string) bool { return false }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var tasks sync.WaitGroup
	tasks.Go(func() { _ = d.pool.Run(ctx) })
	tasks.Go(func() {
		if err := admin.New(d.socket, nil, nil, gpuDoor{d.pool}).Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); tasks.Wait(); _ = records.Close() })
	for d.state() != pool.Clean || !exists(d.socket) {
		<-d.changed(ctx)
	}
	return d
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// changed is a moment later, or after the next change.
func (d *gpuDesk) changed(ctx context.Context) <-chan struct{} {
	soon, cancel := context.WithTimeout(ctx, 1e6)
	context.AfterFunc(soon, cancel)
	return soon.Done()
}

func (d *gpuDesk) state() pool.State {
	views, _ := d.pool.Snapshot()
	return views[0].State
}

func (d *gpuDesk) run(t *testing.T, verb string, args ...string) (int, string, string) {
	t.Helper()
	return run(t, append([]string{"gpu", verb, "--socket", d.socket}, args...)...)
}

func TestTheOperatorSeesAndOrdersGPUs(t *testing.T) {
	t.Parallel()
	d := newGPUDesk(t)
	code, out, stderr := d.run(t, "list", "-o", "json")
	matchesSchema(t, out)
	if !strings.Contains(out, `"agent_running": true`) {
		t.Error(out)
	}
	var list admin.GPUList
	if err := json.Unmarshal([]byte(out), &list); code != exitOK || err != nil || len(list.GPUs) != 1 || len(list.Problems) != 1 || list.Problems[0].Code != "vfio.no-device" {
		t.Fatalf("exit %d, %s%s, %v", code, out, stderr, err)
	}
	code, out, _ = d.run(t, "list")
	for _, want := range []string{gpuAddress, "H100 SXM", "clean", "on", "0000:99:00.0  vfio.no-device", "what to do"} {
		if code != exitOK || !strings.Contains(out, want) {
			t.Errorf("exit %d, no %q in\n%s", code, want, out)
		}
	}

	if code, _, stderr = d.run(t, "release", gpuAddress); code != exitPrecondition || !strings.Contains(stderr, "CC is switched off") || d.state() != pool.Clean {
		t.Errorf("without consent: exit %d, %s", code, stderr)
	}
	if code, out, stderr = d.run(t, "release", gpuAddress, "--accept-consequences", "-o", "json"); code != exitOK || d.kernel.Driver(gpuAddress) != "nvidia" {
		t.Errorf("release: exit %d, %s, on %s", code, stderr, d.kernel.Driver(gpuAddress))
	}
	matchesSchema(t, out)
	if !strings.Contains(stderr, gpuAddress+": release ordered") {
		t.Errorf("no progress: %q", stderr)
	}
	if code, _, stderr = d.run(t, "reset", gpuAddress); code != exitOK || d.state() != pool.Clean {
		t.Errorf("back on duty: exit %d, %s, %s", code, stderr, d.state())
	}

	d.h100.SetKnob(8, 0)
	d.h100.SetKnob(7, 0) // the BMC locks it with CC off
	if code, out, stderr = d.run(t, "reset", gpuAddress, "-o", "json"); code != exitPrecondition || !strings.Contains(stderr, "gpu.in-band-disabled") || !strings.Contains(stderr, "BMC") {
		t.Errorf("a reset that does not help: exit %d, %s", code, stderr)
	}
	matchesSchema(t, out)
	code, out, _ = d.run(t, "show", gpuAddress)
	for _, want := range []string{"gpu.in-band-disabled", "seen", "after a function reset", "way out", "original driver  nvidia", "2921ce551e4eeda3"} {
		if code != exitOK || !strings.Contains(out, want) {
			t.Errorf("exit %d, no %q in\n%s", code, want, out)
		}
	}
	d.h100.SetKnob(7, 1)
	if code, _, stderr = d.run(t, "reset", "41:00.0"); code != exitOK {
		t.Errorf("once the BMC lets us: exit %d, %s", code, stderr)
	}

	if code, _, stderr = d.run(t, "quarantine", gpuAddress, "--reason", "fan rattles"); code != exitOK || d.state() != pool.Quarantined {
		t.Errorf("quarantine: exit %d, %s", code, stderr)
	}
	if code, out, _ = d.run(t, "show", gpuAddress, "-o", "yaml"); code != exitOK || !strings.Contains(out, "fan rattles") || !strings.Contains(out, "kind: GPU") {
		t.Errorf("exit %d, %s", code, out)
	}
}

func TestOrdersThatCannotBeHaveTheirExitCodes(t *testing.T) {
	t.Parallel()
	d := newGPUDesk(t)
	if err := d.pool.Reserve("g", "H100", 1); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want int
		says string
	}{
		"a guest has it":    {[]string{"reset", gpuAddress}, exitConflict, "guest g has it"},
		"not managed":       {[]string{"reset", "0000:98:00.0"}, exitNotFound, "gpu.manage"},
		"not managed, show": {[]string{"show", "0000:98:00.0"}, exitNotFound, "gpu.manage"},
		"no address":        {[]string{"show", "GPU0"}, exitUsage, "PCI address"},
		"no reason":         {[]string{"quarantine", gpuAddress}, exitUsage, "--reason"},
		"too many":          {[]string{"list", "x"}, exitUsage, "argument"},
	} {
		code, _, stderr := d.run(t, c.args[0], c.args[1:]...)
		if code != c.want || !strings.Contains(stderr, c.says) {
			t.Errorf("%s: exit %d, %q; want %d and %q", name, code, stderr, c.want, c.says)
		}
	}
	none := filepath.Join(t.TempDir(), "none")
	if code, _, stderr := run(t, "gpu", "list", "--socket", none, "--config", none); code != exitNotFound {
		t.Errorf("no agent and no configuration: exit %d, %s", code, stderr)
	}
	if code, _, stderr := run(t, "gpu", "release", gpuAddress, "--accept-consequences", "--socket", none); code != exitUnreachable {
		t.Errorf("no agent: exit %d, %s", code, stderr)
	}
	if err := d.pool.Return(t.Context(), "g"); err != nil {
		t.Fatal(err)
	}
	d.kernel.Hang(gpuAddress)
	defer d.kernel.Release()
	if code, _, stderr := d.run(t, "reset", gpuAddress, "--timeout", "2s"); code != exitTimeout || !strings.Contains(stderr, "goes on with it") || !strings.Contains(stderr, gpuAddress+": dirty") {
		t.Errorf("hanging: exit %d, %s", code, stderr)
	}
	if code, _, stderr := d.run(t, "reset", gpuAddress); code != exitConflict || !strings.Contains(stderr, "step verify") {
		t.Errorf("busy: exit %d, %s", code, stderr)
	}
}

func TestTheGPUSchemasNameEveryField(t *testing.T) {
	t.Parallel()
	for kind, typ := range map[string]reflect.Type{"GPU": reflect.TypeFor[gpuShown](), "GPUList": reflect.TypeFor[admin.GPUList]()} {
		text, err := schemas.ReadFile("schemas/" + kind + ".json")
		if err != nil {
			t.Fatal(err)
		}
		var schema map[string]any
		if err := json.Unmarshal(text, &schema); err != nil {
			t.Fatal(err)
		}
		compareFields(t, kind, typ, schema)
	}
}

func TestTheCapabilityListsGPUs(t *testing.T) {
	t.Parallel()
	d := newGPUDesk(t)
	if err := d.pool.Quarantine(gpuAddress, "fan rattles"); err != nil {
		t.Fatal(err)
	}
	got := localGPUs(t.Context(), d.socket, d.kernel.Host(), hclog.NewNullLogger())
	if len(got) != 2 || got[0].State != "quarantined" || got[0].Offered || got[0].Why.Code != "gpu.by-operator" || got[1].Why.Code != "vfio.no-device" {
		t.Errorf("by the agent: %+v", got)
	}
	if err := d.kernel.Add(vfiotest.Device{Address: "0000:42:00.0", Vendor: 0x10de, Device: 0x20b0, Class: 0x030200, Group: "42"}); err != nil {
		t.Fatal(err)
	}
	if got = localGPUs(t.Context(), d.socket, d.kernel.Host(), hclog.NewNullLogger()); len(got) != 3 || got[2].State != "refused" {
		t.Errorf("by the agent, with one it does not manage: %+v", got)
	}
	got = localGPUs(t.Context(), filepath.Join(t.TempDir(), "none"), d.kernel.Host(), hclog.NewNullLogger())
	if len(got) != 2 || got[0].Model != "H100" || got[0].State != "unmanaged" || got[1].Why.Code != "gpu.unsupported-model" {
		t.Errorf("without: %+v", got)
	}
	ecc := true
	capability.AddDriver(got, nvidia.Report{GPUs: []nvidia.GPU{{Address: gpuAddress, Name: "NVIDIA H100", VBIOS: "96.00.5E.00.01", ECC: &ecc, Rows: &nvidia.RemappedRows{}, Xids: []uint64{79}}}})
	if got[0].Driver == nil || got[1].Driver != nil {
		t.Errorf("the driver's facts: %+v", got)
	}
	doc := capabilityDocument{Header: output.NewHeader("Capability"), Report: capability.Judge(capability.Facts{GPUs: got})}
	var out strings.Builder
	if err := printCapability(&out, doc); err != nil || !strings.Contains(out.String(), "gpu.unsupported-model") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func TestTheSelectorOfAllIsOneWord(t *testing.T) {
	t.Parallel()
	if config.AllCapable != pool.AllCapable {
		t.Errorf("the configuration says %q, the pool understands %q", config.AllCapable, pool.AllCapable)
	}
}

func TestTheHiddenWriterWrites(t *testing.T) {
	t.Parallel()
	h := pciHost("/host")
	w, ok := h.Writer.(vfio.Disposable)
	if !ok || len(w.Command) != 2 || w.Command[1] != writeVerb || h.Sysfs != "/host/sys" || w.Command[0] != "/host/proc/self/exe" {
		t.Fatalf("%+v", h)
	}
	if code, _, stderr := run(t, writeVerb); code != exitUsage {
		t.Errorf("without a file: exit %d, %s", code, stderr)
	}
	if code, _, _ := run(t, writeVerb, filepath.Join(t.TempDir(), "none")); code == exitOK {
		t.Error("a file that is not there was written")
	}
}
