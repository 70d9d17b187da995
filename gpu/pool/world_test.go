package pool_test

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

const (
	first  = vfio.Address("0000:41:00.0") // H100
	second = vfio.Address("0000:42:00.0") // H100
	b200   = vfio.Address("0000:43:00.0")
	vga    = vfio.Address("0000:44:00.0") // RTX PRO 6000 with an audio function
	sound  = vfio.Address("0000:44:00.1")
	guest  = "01234567-89ab-cdef-0123-456789abcdef"
	other  = "11234567-89ab-cdef-0123-456789abcdef"
)

var errDied = errors.New("the process died")

// disk is Records as bytes, so that nothing is shared with who wrote it.
type disk struct {
	mu   sync.Mutex
	text map[vfio.Address][]byte
	dead bool
	// seen are the records in the order they were written.
	seen []pool.Record
}

func (d *disk) GPUs() (records []pool.Record, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range slices.Sorted(maps.Keys(d.text)) {
		var r pool.Record
		if err := json.Unmarshal(d.text[a], &r); err != nil {
			return nil, err
		}
		records = append(records, r)
	}
	return records, nil
}

func (d *disk) PutGPUs(records ...pool.Record) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return errDied
	}
	for _, r := range records {
		text, err := json.Marshal(r)
		if err != nil {
			return err
		}
		d.text[r.Address] = text
		d.seen = append(d.seen, r)
	}
	return nil
}

func (d *disk) DeleteGPU(a vfio.Address) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return errDied
	}
	delete(d.text, a)
	return nil
}

// world is a host over several lives of the agent.
type world struct {
	t        *testing.T
	kernel   *vfiotest.Kernel
	disk     *disk
	hardware map[vfio.Address]*gputest.Emulator
	before   map[vfio.Address]string
	boot     string
	manage   []string
	uuids    map[string]vfio.Address
	// dieAt ends the life at the nth passage of a point; 0 and "" never.
	dieAt  string
	points []string
	dead   bool
	mu     sync.Mutex
}

func newWorld(t *testing.T, devices ...vfiotest.Device) *world {
	t.Helper()
	k, err := vfiotest.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		t: t, kernel: k, disk: &disk{text: map[vfio.Address][]byte{}}, hardware: map[vfio.Address]*gputest.Emulator{}, before: map[vfio.Address]string{},
		boot: "boot-1", manage: []string{pool.AllCapable},
	}
	for _, d := range devices {
		if err := k.Add(d); err != nil {
			t.Fatal(err)
		}
		if e, ok := d.Hardware.(*gputest.Emulator); ok {
			w.hardware[d.Address] = e
		}
		w.before[d.Address] = w.binding(d.Address)
	}
	return w
}

func device(a vfio.Address, model gputest.Model, driver string) vfiotest.Device {
	return vfiotest.Device{
		Address: a, Vendor: 0x10de, Device: model.Device, SubVendor: 0x10de, SubDevice: model.Subsystem, Class: model.Class,
		Group: string(a[5:7]), Driver: driver, BAR: model.BAR, ResetMethods: []string{"flr", "bus"}, Hardware: gputest.New(model),
	}
}

// binding is what an operator sees of a device's driver.
func (w *world) binding(a vfio.Address) string {
	f, err := w.kernel.Host().Function(a)
	if err != nil {
		w.t.Fatal(err)
	}
	power, _ := os.ReadFile(filepath.Join(w.kernel.Host().Sysfs, "bus/pci/devices", string(a), "power/control"))
	return f.Driver + "/" + f.Override + "/" + strings.TrimSpace(string(power))
}

// mortal is the kernel for a process that may be dead.
type mortal struct {
	*vfiotest.Kernel
	w *world
}

func (m mortal) gone() bool { m.w.mu.Lock(); defer m.w.mu.Unlock(); return m.w.dead }

func (m mortal) Write(ctx context.Context, path, value string) error {
	if m.gone() {
		return errDied
	}
	return m.Kernel.Write(ctx, path, value)
}

func (m mortal) Open(path string) (int, error) {
	if m.gone() {
		return -1, errDied
	}
	return m.Kernel.Open(path)
}

func (m mortal) Pwrite(fd int, b []byte, offset int64) (int, error) {
	if m.gone() {
		return 0, errDied
	}
	return m.Kernel.Pwrite(fd, b, offset)
}

func (w *world) hook(point string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.points = append(w.points, point)
	if point == w.dieAt {
		w.dead = true
		w.disk.mu.Lock()
		w.disk.dead = true
		w.disk.mu.Unlock()
	}
	if w.dead {
		return errDied
	}
	return nil
}

// life starts an agent that keeps the guests' devices; stop ends it.
func (w *world) life(keep ...string) (p *pool.Pool, stop func()) {
	w.t.Helper()
	k := mortal{w.kernel, w}
	host := w.kernel.Host()
	host.Writer = k
	p, err := pool.New(pool.Deps{
		Records: w.disk, Host: host, System: k, Logger: hclog.NewNullLogger(), Hook: w.hook,
		UUIDs: func() map[string]vfio.Address { return w.uuids },
	}, pool.Config{Manage: w.manage, BootID: w.boot})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := p.Settle(func(id string) bool { return slices.Contains(keep, id) }); err != nil && !w.dead {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := p.Run(ctx); err != nil {
			w.t.Error(err)
		}
	}()
	return p, func() { cancel(); <-done }
}

// died ends a process that met its point.
func (w *world) died(stop func()) bool {
	w.mu.Lock()
	dead := w.dead
	w.mu.Unlock()
	stop()
	if err := w.kernel.ProcessDied(); err != nil {
		w.t.Error(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dead, w.dieAt = false, ""
	w.disk.mu.Lock()
	w.disk.dead = false
	w.disk.mu.Unlock()
	return dead
}

func states(p *pool.Pool) map[vfio.Address]pool.State {
	all := map[vfio.Address]pool.State{}
	views, _ := p.Snapshot()
	for _, v := range views {
		all[v.Address] = v.State
	}
	return all
}

func view(t *testing.T, p *pool.Pool, a vfio.Address) pool.View {
	t.Helper()
	views, _ := p.Snapshot()
	for _, v := range views {
		if v.Address == a {
			return v
		}
	}
	t.Fatalf("%s is not managed", a)
	return pool.View{}
}

// rest waits until no device has anything to do, or a deadline of the bubble's
// clock.
func rest(t *testing.T, p *pool.Pool) {
	t.Helper()
	for range 100 {
		views, _ := p.Snapshot()
		if !slices.ContainsFunc(views, func(v pool.View) bool {
			return v.Finding == nil && (v.State == pool.Bound || v.State == pool.Dirty || v.Leaving || (v.State == pool.Unmanaged && v.Duty))
		}) {
			return
		}
		wait(20 * time.Second)
	}
	t.Fatalf("no rest: %v", states(p))
}

// wait lets the bubble's clock run.
func wait(d time.Duration) { <-time.After(d) }

func code(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}
