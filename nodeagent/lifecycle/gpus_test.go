package lifecycle_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/passthrough"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/floor"
)

const gpuAddress = vfio.Address("0000:41:00.0")

// gpuHost is a host with one H100.
type gpuHost struct {
	*host
	kernel   *vfiotest.Kernel
	h100     *gputest.Emulator
	versions floor.Versions

	mu   sync.Mutex
	pool *pool.Pool // of the life that began last
}

func newGPUHost(t *testing.T) *gpuHost {
	t.Helper()
	k, err := vfiotest.New(filepath.Join(t.TempDir(), "kernel"))
	if err != nil {
		t.Fatal(err)
	}
	model := gputest.H100()
	model.Timing = gputest.Timing{}
	h := &gpuHost{host: newHost(t), kernel: k, h100: gputest.New(model), versions: floor.Versions{Kernel: "6.17.1", Libvirt: "12.2.0", QEMU: "10.1.0"}}
	if err := k.Add(vfiotest.Device{
		Address: gpuAddress, Vendor: 0x10de, Device: model.Device, SubVendor: 0x10de, SubDevice: model.Subsystem, Class: model.Class, Group: "41",
		Driver: "nvidia", BAR: model.BAR, ResetMethods: []string{"flr", "bus"}, Hardware: h.h100,
	}); err != nil {
		t.Fatal(err)
	}
	before := &process{}
	h.gpus = func(ctx context.Context) lifecycle.GPUs {
		before.dead.Store(true)
		if err := k.ProcessDied(); err != nil {
			t.Error(err)
		}
		now := &process{Kernel: k, Store: h.store}
		before = now
		pci := k.Host()
		pci.Writer = now
		p, err := pool.New(pool.Deps{Records: now, Host: pci, System: now, Logger: hclog.NewNullLogger()},
			pool.Config{Manage: []string{string(gpuAddress)}, BootID: "boot"})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		ctx, stop := context.WithCancel(ctx)
		go func() { defer close(done); _ = p.Run(ctx) }()
		t.Cleanup(func() { stop(); <-done })
		h.mu.Lock()
		defer h.mu.Unlock()
		h.pool = p
		return passthrough.Host{Pool: p, PCI: k.Host(), Versions: func(context.Context) (floor.Versions, error) { return h.versions, nil }}
	}
	return h
}

// process is how one life of the agent reaches kernel and store: no longer,
// once it is dead.
type process struct {
	*vfiotest.Kernel
	*store.Store
	dead atomic.Bool
}

var errDead = errors.New("the process is dead")

func (p *process) Close(fd int) error { return p.Kernel.Close(fd) }

func (p *process) Open(path string) (int, error) {
	if p.dead.Load() {
		return -1, errDead
	}
	return p.Kernel.Open(path)
}

func (p *process) Pwrite(fd int, b []byte, offset int64) (int, error) {
	if p.dead.Load() {
		return 0, errDead
	}
	return p.Kernel.Pwrite(fd, b, offset)
}

func (p *process) Write(ctx context.Context, path, value string) error {
	if p.dead.Load() {
		return errDead
	}
	return p.Kernel.Write(ctx, path, value)
}

func (p *process) PutGPUs(records ...pool.Record) error {
	if p.dead.Load() {
		return errDead
	}
	return p.Store.PutGPUs(records...)
}

func (h *gpuHost) gpu() pool.View {
	h.mu.Lock()
	defer h.mu.Unlock()
	views, _ := h.pool.Snapshot()
	return views[0]
}

// free waits until the GPU can be had.
func (h *gpuHost) free() {
	h.t.Helper()
	h.until("the GPU is clean", func() bool { return h.gpu().State == pool.Clean })
}

// withGPU lets a launch ask for GPUs.
func withGPU(t *testing.T, model string, count int) func(*api.LaunchGuest) {
	t.Helper()
	return func(l *api.LaunchGuest) {
		m, err := contract.ParseManifest(l.GetManifest())
		if err != nil {
			t.Fatal(err)
		}
		m.GPU = &contract.GPU{Model: model, Count: count}
		if l.Manifest, err = m.Encode(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAGuestGetsItsGPUAndGivesItBack(t *testing.T) {
	t.Parallel()
	h := newGPUHost(t)
	if err := errors.Join(h.kernel.AddNode(0, "0-7,16-23"), h.kernel.AddNode(1, "8-15,24-31")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m := h.life(ctx, nil)
	h.free()
	if err := h.execute(ctx, m, h.command(withGPU(t, "H100", 1))); err != nil {
		t.Fatal(err)
	}
	h.until("the domain runs", func() bool { return h.world.Running(guestID) })
	if cpus := h.world.Spec(guestID).CPUs; len(cpus) != 16 || cpus[7] != 7 || cpus[8] != 16 {
		t.Errorf("vCPUs may run on CPUs %v, want those of node 0", cpus)
	}
	want := vm.PCIDevice{Address: string(gpuAddress), Kind: vm.KindGPU, BARs: []uint64{16 << 20, 256 << 20, 32 << 20}, IOMMUGroup: 41}
	if s := h.world.Spec(guestID); len(s.Devices) != 1 || !s.IOMMUFD || s.Devices[0].Address != want.Address || !slices.Equal(s.Devices[0].BARs, want.BARs) ||
		s.Devices[0].Kind != want.Kind || s.Devices[0].IOMMUGroup != want.IOMMUGroup {
		t.Errorf("devices %+v, iommufd %t", s.Devices, s.IOMMUFD)
	}
	if g := h.gpu(); g.State != pool.Attached || g.Guest != guestID {
		t.Errorf("the GPU is %s, of %q", g.State, g.Guest)
	}
	cmd := h.command(withGPU(t, "H100", 1))
	l := cmd.GetLaunchGuest()
	cmd.CommandId, l.GuestId = api.NewID(), "11111111-89ab-cdef-0123-456789abcdef"
	mf, _ := contract.ParseManifest(l.GetManifest())
	mf.LaunchID = strings.Repeat("0b", 16)
	l.Manifest, _ = mf.Encode()
	h.refused(ctx, m, cmd, "gpu.capacity")
	resets := h.h100.Resets()
	go h.guest(ctx)
	s := h.ended(ctx)
	if s.GetStatus() != finished {
		t.Errorf("ended as %v", s)
	}
	for _, step := range []string{"gpus", "gpu-check", "undo-gpus"} {
		if _, timed := s.GetStepMs()[step]; !timed {
			t.Errorf("step %s is not timed: %v", step, s.GetStepMs())
		}
	}
	// The guest's end was told: the GPU is verified already.
	if g := h.gpu(); g.State != pool.Clean || h.h100.Resets() <= resets || h.kernel.Held() != 0 {
		t.Errorf("the GPU is %s after %d resets, %d files open", g.State, h.h100.Resets()-resets, h.kernel.Held())
	}
	h.clean()
}

func TestALaunchThatAsksForGPUsIsRefusedInWords(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(h *gpuHost)
		model  string
		count  int
		want   string
	}{
		"another model":   {nil, "B200", 1, "gpu.none-of-model"},
		"more than there": {nil, "H100", 8, "gpu.capacity"},
		"old kernel":      {func(h *gpuHost) { h.versions.Kernel = "6.12.0" }, "H100", 1, "vm.version-too-old"},
		"unknown QEMU":    {func(h *gpuHost) { h.versions.QEMU = "" }, "H100", 1, "vm.version-unknown"},
		"quarantined": {func(h *gpuHost) {
			if err := h.pool.Quarantine(gpuAddress, "it smells"); err != nil {
				h.t.Error(err)
			}
		}, "H100", 1, "gpu.capacity"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newGPUHost(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			m := h.life(ctx, nil)
			h.free()
			if c.change != nil {
				c.change(h)
			}
			h.refused(ctx, m, h.command(withGPU(t, c.model, c.count)), c.want)
			if held := h.pool.Held(guestID); len(held) != 0 {
				t.Errorf("%d devices stay reserved", len(held))
			}
		})
	}
	t.Run("none managed", func(t *testing.T) {
		t.Parallel()
		h := newHost(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		h.refused(ctx, h.life(ctx, nil), h.command(withGPU(t, "H100", 1)), "gpu.not-managed")
	})
}

func TestAGPUThatLeftItsModeStartsNoGuest(t *testing.T) {
	t.Parallel()
	h := newGPUHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m := h.life(ctx, func(p string) {
		if p == "begun:gpu-check" {
			h.h100.SetKnob(6, 1) // the BMC stages devtools
		}
	})
	h.free()
	if err := h.execute(ctx, m, h.command(withGPU(t, "H100", 1))); err != nil {
		t.Fatal(err)
	}
	if h.ends(ctx, failed, "gpu.mode-mismatch"); h.world.Calls("start") != 0 {
		t.Error("a domain was started")
	}
	if g := h.gpu(); g.State != pool.Quarantined || g.Quarantine.Guest != guestID {
		t.Errorf("%s %+v", g.State, g.Quarantine)
	}
}

// The crash matrix of a launch with GPUs: points are found by walking it once.
func TestADeathAtAnyBoundaryLeavesNoGPUBehind(t *testing.T) {
	t.Parallel()
	h := newGPUHost(t)
	change := withGPU(t, "H100", 1)
	all := pointsOf(h.ready(), change)
	for _, point := range all {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			h := newGPUHost(t)
			h.ready().diesAt(point, change)
			h.free()
			if h.kernel.Held() != 0 || h.kernel.Driver(gpuAddress) != "vfio-pci" || len(h.pool.Held(guestID)) != 0 {
				t.Errorf("%d files open, on %s", h.kernel.Held(), h.kernel.Driver(gpuAddress))
			}
		})
	}
}

// ready lets each life of the agent begin with what is clean.
func (h *gpuHost) ready() *host {
	begin := h.gpus
	h.gpus = func(ctx context.Context) lifecycle.GPUs { return waiting{begin(ctx), h} }
	return h.host
}

// waiting answers only when nothing is on its way to be clean.
type waiting struct {
	lifecycle.GPUs
	h *gpuHost
}

func (w waiting) Available(model string, count int) *contract.Refusal {
	w.h.until("the GPU is at rest", func() bool { s := w.h.gpu().State; return s == pool.Clean || s == pool.Attached || s == pool.Reserved })
	return w.GPUs.Available(model, count)
}

func TestAnAdoptedGuestKeepsItsGPU(t *testing.T) {
	t.Parallel()
	h := newGPUHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	h.free()
	if err := h.execute(ctx, m, h.command(withGPU(t, "H100", 1))); err != nil {
		t.Fatal(err)
	}
	h.until("the domain runs", func() bool { return h.world.Running(guestID) && h.world.Calls("metadata") == 1 })
	cancel()
	<-over
	h.world.ProcessDied()
	resets := h.h100.Resets()

	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	m = h.life(ctx, nil)
	h.until("it is adopted", func() bool { return h.world.Calls("check-devices") > 0 && h.world.Calls("metadata") == 2 })
	if g := h.gpu(); g.State != pool.Attached || h.h100.Resets() != resets {
		t.Errorf("under a guest that runs: %s, %d resets", g.State, h.h100.Resets()-resets)
	}
	if s := m.Snapshot(); len(s) != 1 || s[0].Finding != "" {
		t.Errorf("%+v", s)
	}
	go h.guest(ctx)
	if s := h.ended(ctx); s.GetStatus() != finished {
		t.Errorf("ended as %v", s)
	}
	h.free()
	h.clean()
}

func TestAnAdoptedGuestWithOtherDevicesIsReported(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	h.started(ctx, m)
	cancel()
	<-over
	h.world.ProcessDied()
	h.world.Fail("check-devices", contract.Refuse("vm.devices-differ", "look", "it has the device %q", "0000:99:00.0"))
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	m = h.life(ctx, nil)
	h.until("it is reported", func() bool {
		s := m.Snapshot()
		return len(s) == 1 && strings.Contains(s[0].Finding, "0000:99:00.0")
	})
	if !h.world.Running(guestID) {
		t.Error("it was ended")
	}
	go h.guest(ctx) // and is served all the same
	if s := h.ended(ctx); s.GetStatus() != finished {
		t.Errorf("ended as %v", s)
	}
}

func TestAGPUOfADomainWithoutARecordIsItsUntilItEnds(t *testing.T) {
	t.Parallel()
	h := newGPUHost(t)
	const stranger = "11111111-89ab-cdef-0123-456789abcdef"
	f, err := h.kernel.Host().Function(gpuAddress)
	if err != nil {
		t.Fatal(err)
	}
	b := vfio.Binding{Address: f.Address, Vendor: f.Vendor, Device: f.Device, Driver: f.Driver}
	if err := h.kernel.Host().Bind(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := h.store.PutGPUs(pool.Record{
		Address: gpuAddress, State: pool.Attached, Duty: true, Guest: stranger, Bindings: []vfio.Binding{b}, BootID: "boot", Since: time.Now(),
	}); err != nil {
		t.Fatal(err)
	}
	h.world.AddDomain(stranger, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m := h.life(ctx, nil)
	<-m.Ready()
	if g := h.gpu(); g.State != pool.Attached || h.h100.Resets() != 0 {
		t.Errorf("%s after %d resets", g.State, h.h100.Resets())
	}
	h.world.PowerOff(stranger)
	h.free()
}
