package pool_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/ccmode"
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
		time.Sleep(20 * time.Second)
	}
	t.Fatalf("no rest: %v", states(p))
}

func code(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}

func TestALifeFromTheDriverAndBack(t *testing.T) {
	for _, c := range []struct {
		name    string
		a       vfio.Address
		devices []vfiotest.Device
		model   string
	}{
		{"H100", first, []vfiotest.Device{device(first, gputest.H100(), "nvidia")}, "NVIDIA H100"},
		{"B200", b200, []vfiotest.Device{device(b200, gputest.B200(), "")}, "b200"},
		{"RTX PRO 6000 with audio", vga, []vfiotest.Device{
			device(vga, gputest.RTXPRO6000(), "nouveau"),
			{Address: sound, Vendor: 0x10de, Device: 0x22e8, Class: 0x040300, Group: "44", Driver: "snd_hda_intel"},
		}, "RTX PRO 6000 Server Edition"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, c.devices...)
				p, stop := w.life()
				defer stop()
				rest(t, p)
				if v := view(t, p, c.a); v.State != pool.Clean || v.Mode != ccmode.On || v.PDI == "" || w.kernel.Driver(c.a) != "vfio-pci" {
					t.Fatalf("taken over: %+v on %s", v, w.kernel.Driver(c.a))
				}
				if err := errors.Join(p.Reserve(guest, c.model, 1), p.Attach(t.Context(), guest)); err != nil {
					t.Fatal(err)
				}
				if held := p.Held(guest); len(held) != 1 || held[0].State != pool.Attached {
					t.Errorf("held: %+v", held)
				}
				if err := p.Reserve(other, c.model, 1); code(err) != "gpu.capacity" {
					t.Errorf("the same one twice: %v", err)
				}
				for verb, err := range map[string]error{"release": p.Release(c.a, true), "reset": p.Reset(c.a), "quarantine": p.Quarantine(c.a, "")} {
					if code(err) != pool.CodeInUse {
						t.Errorf("%s under a guest: %v", verb, err)
					}
				}
				resets := w.hardware[c.a].Resets()
				if err := p.Return(t.Context(), guest); err != nil {
					t.Fatal(err)
				}
				if v := view(t, p, c.a); v.State != pool.Clean || v.Guest != "" || w.hardware[c.a].Resets() <= resets {
					t.Errorf("returned: %+v after %d resets", v, w.hardware[c.a].Resets()-resets)
				}
				if err := p.Release(c.a, false); err != nil {
					t.Fatal(err)
				}
				rest(t, p)
				if v := view(t, p, c.a); v.State != pool.Unmanaged || v.Duty || w.hardware[c.a].Knob(8) != 0 {
					t.Errorf("released: %+v, CC knob %d", v, w.hardware[c.a].Knob(8))
				}
				for _, d := range c.devices {
					if now := w.binding(d.Address); now != w.before[d.Address] {
						t.Errorf("%s is %s, was %s", d.Address, now, w.before[d.Address])
					}
				}
				if w.kernel.Held() != 0 {
					t.Errorf("%d files left open", w.kernel.Held())
				}
			})
		})
	}
}

func TestEveryIntentIsOnDiskBeforeItsEffect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), "nvidia"))
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if err := errors.Join(p.Reserve(guest, "H100", 1), p.Attach(t.Context(), guest), p.Return(t.Context(), guest), p.Release(first, false)); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		var trail []string
		for _, r := range w.disk.seen {
			trail = append(trail, strings.TrimSuffix(string(r.State)+" "+string(r.Step), " "))
		}
		want := []string{
			"unmanaged bind", "bound", "bound verify", "clean", "reserved", "reserved check", "attached", "dirty", "dirty verify", "clean",
			"clean", "clean off", "clean return", "clean return", "unmanaged",
		}
		if !slices.Equal(trail, want) {
			t.Errorf("on disk, in order:\n%q, want\n%q", trail, want)
		}
	})
}

func TestTheTableIsClosed(t *testing.T) {
	reached := map[pool.State]bool{pool.Unmanaged: true}
	events := []pool.Event{
		pool.EventBound, pool.EventVerified, pool.EventReserved, pool.EventCancelled, pool.EventAttached, pool.EventReturned,
		pool.EventRecheck, pool.EventFailed, pool.EventReleased,
	}
	rows := 0
	for range pool.States() {
		for s := range maps.Clone(reached) {
			for _, e := range events {
				if next, ok := pool.Next(s, e); ok {
					reached[next] = true
				}
			}
		}
	}
	for _, s := range pool.States() {
		if !reached[s] {
			t.Errorf("%s cannot be reached", s)
		}
		for _, e := range events {
			next, ok := pool.Next(s, e)
			if ok {
				rows++
			}
			if next == pool.Clean && s != pool.Bound && s != pool.Dirty && e != pool.EventCancelled {
				t.Errorf("%s becomes clean by %s, unverified", s, e)
			}
			if next == pool.Attached && s != pool.Reserved {
				t.Errorf("%s becomes attached, unreserved", s)
			}
			if s == pool.Attached && ok && next != pool.Dirty {
				t.Errorf("an attached device becomes %s", next)
			}
		}
	}
	if rows != 22 {
		t.Errorf("%d rows: change the drawing in doc.go too", rows)
	}
	if _, ok := pool.Next("", pool.EventFailed); ok {
		t.Error("no state has a successor")
	}
}

// TestADeathAnywhereIsRepaired is the crash matrix, made from the list of
// steps: before, inside and after each, and after its record.
func TestADeathAnywhereIsRepaired(t *testing.T) {
	for _, s := range pool.Steps() {
		for _, at := range []string{"begun:", "inside:", "did:", "done:"} {
			point := at + string(s)
			t.Run(point, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { dieOnce(t, point) })
			})
		}
	}
}

func dieOnce(t *testing.T, point string) {
	w := newWorld(t, device(first, gputest.H100(), "nvidia"), device(vga, gputest.RTXPRO6000(), "nouveau"),
		vfiotest.Device{Address: sound, Vendor: 0x10de, Device: 0x22e8, Class: 0x040300, Group: "44", Driver: "snd_hda_intel"})
	w.dieAt = point
	p, stop := w.life()
	// A whole life, as far as it comes.
	synctest.Wait()
	time.Sleep(2 * time.Minute)
	_ = p.Reserve(guest, "H100", 1)
	_ = p.Attach(t.Context(), guest)
	_ = p.Return(t.Context(), guest)
	_ = p.Release(vga, false)
	time.Sleep(5 * time.Minute)
	if !w.died(stop) {
		t.Fatalf("the life never came to %s, only to %v", point, w.points)
	}
	leaving := slices.ContainsFunc(w.records(), func(r pool.Record) bool { return r.Address == vga && r.Leaving })
	start := time.Now()
	p, stop = w.life() // no guest is left
	defer stop()
	rest(t, p)
	if took := time.Since(start); took > time.Minute {
		t.Errorf("repaired after %s", took)
	}
	v := view(t, p, first)
	if v.State != pool.Clean || v.Mode != ccmode.On || w.kernel.Driver(first) != "vfio-pci" {
		t.Errorf("the H100 is %s (%+v) on %q", v.State, v.Quarantine, w.kernel.Driver(first))
	}
	v = view(t, p, vga)
	switch {
	case leaving && (v.State != pool.Unmanaged || w.binding(vga) != w.before[vga] || w.binding(sound) != w.before[sound]):
		t.Errorf("asked to leave: %s, %s and %s", v.State, w.binding(vga), w.binding(sound))
	case v.State == pool.Clean && w.kernel.Driver(sound) != "vfio-pci", v.State == pool.Unmanaged && w.binding(sound) != w.before[sound]:
		t.Errorf("half bound: the card is %s, its audio function on %s", v.State, w.kernel.Driver(sound))
	case v.State != pool.Clean && v.State != pool.Unmanaged:
		t.Errorf("the card is %s (%+v)", v.State, v.Quarantine)
	}
	if w.kernel.Held() != 0 {
		t.Errorf("%d files left open", w.kernel.Held())
	}
}

func (w *world) records() []pool.Record {
	all, err := w.disk.GPUs()
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

func TestWhatASilentSiliconOrKernelDoesIsQuarantined(t *testing.T) {
	devtools := uint32(3)
	for _, c := range []struct {
		name  string
		upset func(w *world)
		want  string
	}{
		{"FSP silent", func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.FSPSilent = true }) }, "gpu.fsp-silent"},
		{"never boots", func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.BootNever = true }) }, "gpu.boot-timeout"},
		{"a reset that changes no mode", func(w *world) {
			w.hardware[first].Break(func(f *gputest.Faults) { f.ModeStuck = true })
			w.hardware[first].SetKnob(8, 0)
		}, ""},
		{"devtools, whatever is set", func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.ModeRegister = &devtools }) }, "gpu.mode-mismatch"},
		{"BMC locks it off", func(w *world) {
			w.hardware[first].SetKnob(8, 0)
			w.hardware[first].SetKnob(7, 0)
		}, "gpu.in-band-disabled"},
		{"off the bus", func(w *world) { w.hardware[first].Vanish() }, "gpu.lost"},
		{"unplugged", func(w *world) {
			if err := w.kernel.Remove(first); err != nil {
				w.t.Fatal(err)
			}
		}, "vfio.no-device"},
		{"reset hangs", func(w *world) { w.kernel.Hang(first) }, "gpu.reset-hung"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, device(first, gputest.H100(), "nvidia"), device(second, gputest.H100(), "nvidia"))
				p, stop := w.life()
				defer stop()
				defer w.kernel.Release()
				rest(t, p)
				if err := errors.Join(p.Reserve(guest, "H100", 1), p.Attach(t.Context(), guest)); err != nil {
					t.Fatal(err)
				}
				c.upset(w)
				start := time.Now()
				if err := p.Return(t.Context(), guest); err != nil {
					t.Fatal(err)
				}
				v := view(t, p, first)
				if c.want == "" {
					if v.State != pool.Clean {
						t.Errorf("%+v", v)
					}
					return
				}
				if v.State != pool.Quarantined || v.Quarantine.Reason.Code != c.want || len(v.Quarantine.Evidence) == 0 ||
					v.Quarantine.Guest != guest || v.Quarantine.Reason.Remedy == "" {
					t.Fatalf("%s %+v", v.State, v.Quarantine)
				}
				if took := time.Since(start); took > 8*time.Minute {
					t.Errorf("quarantined after %s", took)
				}
				if err := p.Reserve(other, "H100", 1); err != nil {
					t.Errorf("the other one: %v", err)
				}
				if err := p.Reserve("x", "H100", 1); code(err) != "gpu.capacity" || !strings.Contains(err.Error(), "1 quarantined") {
					t.Errorf("a quarantined one was offered: %v", err)
				}
			})
		})
	}
}

func TestAnUnbindThatHangsIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), "nvidia"))
		w.kernel.Hang(first)
		defer w.kernel.Release()
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Quarantined || v.Quarantine.Reason.Code != "vfio.stuck" || v.Quarantine.Step != pool.StepBind {
			t.Errorf("%s %+v", v.State, v.Quarantine)
		}
	})
}

// sticky is a GPU that a killed guest left so that only its bus's reset helps.
type sticky struct {
	*gputest.Emulator
}

func (s sticky) SBR() {
	s.Break(func(f *gputest.Faults) { f.FSPSilent = false })
	s.Emulator.SBR()
}

func TestWhereAFunctionResetIsNotEnoughTheBusIsReset(t *testing.T) {
	for name, methods := range map[string][]string{"": {"flr", "bus"}, "gpu.fsp-silent": {"flr"}} {
		synctest.Test(t, func(t *testing.T) {
			d := device(first, gputest.H100(), "nvidia")
			e := d.Hardware.(*gputest.Emulator)
			d.Hardware, d.ResetMethods = sticky{e}, methods
			w := newWorld(t, d)
			p, stop := w.life()
			defer stop()
			rest(t, p)
			if err := errors.Join(p.Reserve(guest, "H100", 1), p.Attach(t.Context(), guest)); err != nil {
				t.Fatal(err)
			}
			e.Break(func(f *gputest.Faults) { f.FSPSilent = true })
			if err := p.Return(t.Context(), guest); err != nil {
				t.Fatal(err)
			}
			v := view(t, p, first)
			if name == "" && v.State != pool.Clean {
				t.Errorf("with a bus reset: %+v", v.Quarantine)
			}
			if name != "" && (v.State != pool.Quarantined || v.Quarantine.Reason.Code != name) {
				t.Errorf("without: %s %+v", v.State, v.Quarantine)
			}
			if name == "" {
				return
			}
			// The operator's way out.
			e.Break(func(f *gputest.Faults) { f.FSPSilent = false })
			if err := p.Reset(first); err != nil {
				t.Fatal(err)
			}
			rest(t, p)
			if v := view(t, p, first); v.State != pool.Clean || v.Quarantine != nil {
				t.Errorf("after the operator's reset: %+v", v)
			}
		})
	}
}

func TestBeforeAGuestGetsItTheModeMustBeOn(t *testing.T) {
	for _, c := range []struct {
		name  string
		upset func(e *gputest.Emulator)
		want  string
	}{
		{"devtools staged by the BMC", func(e *gputest.Emulator) { e.SetKnob(6, 1) }, "gpu.mode-mismatch"},
		{"CC off staged by the BMC", func(e *gputest.Emulator) { e.SetKnob(8, 0) }, "gpu.mode-mismatch"},
		{"no mode at all", func(e *gputest.Emulator) {
			two := uint32(2)
			e.Break(func(f *gputest.Faults) { f.ModeRegister = &two })
		}, "gpu.mode-mismatch"},
		{"silent", func(e *gputest.Emulator) { e.Break(func(f *gputest.Faults) { f.FSPSilent = true }) }, "gpu.fsp-silent"},
		{"sound", func(*gputest.Emulator) {}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, device(first, gputest.B200(), ""), device(second, gputest.B200(), ""))
				p, stop := w.life()
				defer stop()
				rest(t, p)
				if err := p.Reserve(guest, "B200", 2); err != nil {
					t.Fatal(err)
				}
				c.upset(w.hardware[second])
				err := p.Attach(t.Context(), guest)
				if code(err) != c.want {
					t.Fatalf("%v, want %q", err, c.want)
				}
				if c.want == "" {
					return
				}
				if s := states(p); s[first] != pool.Reserved || s[second] != pool.Quarantined {
					t.Errorf("%v", s)
				}
				if err := p.Return(t.Context(), guest); err != nil {
					t.Fatal(err)
				}
				if s := states(p); s[first] != pool.Clean || s[second] != pool.Quarantined || w.kernel.Held() != 0 {
					t.Errorf("%v, %d files open", s, w.kernel.Held())
				}
			})
		})
	}
}

func TestAnExchangedBoardIsQuarantined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.B200(), ""))
		p, stop := w.life()
		rest(t, p)
		stop()
		pdi := view(t, p, first).PDI
		r := w.records()[0]
		r.PDI = "00000000000000aa"
		if err := w.disk.PutGPUs(r); err != nil {
			t.Fatal(err)
		}
		p, stop = w.life()
		defer stop()
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Quarantined || v.Quarantine.Reason.Code != "gpu.pdi-changed" {
			t.Fatalf("%s %+v", v.State, v.Quarantine)
		}
		if err := p.Release(first, false); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		if err := p.Reset(first); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Clean || v.PDI != pdi {
			t.Errorf("taken over anew: %s, PDI %s, %+v", v.State, v.PDI, v.Quarantine)
		}
	})
}

func TestAHiddenPDIIsNoFinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), ""))
		w.hardware[first].Break(func(f *gputest.Faults) { f.BlocksPDI = true })
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Clean || v.PDI != "2921ce551e4eeda3" {
			t.Errorf("%s, PDI %q: it can be seen while CC is off", v.State, v.PDI)
		}
	})
}

func TestABoardGoesIntoPPCIeAsAWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all []vfiotest.Device
		for i := range 8 {
			all = append(all, device(vfio.Address(fmt.Sprintf("0000:5%d:00.0", i)), gputest.H100(), ""))
		}
		for i := range 4 {
			all = append(all, device(vfio.Address(fmt.Sprintf("0000:6%d:00.0", i)), gputest.NVSwitch(), ""))
		}
		w := newWorld(t, all...)
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if err := p.Reserve(guest, "H100", 8); err != nil {
			t.Fatal(err)
		}
		if err := p.Reserve(other, "H100", 1); code(err) != "gpu.capacity" {
			t.Errorf("one of eight: %v", err)
		}
		if err := p.Attach(t.Context(), guest); err != nil {
			t.Fatal(err)
		}
		held := p.Held(guest)
		if len(held) != 12 || held[7].Model.Name != "H100" || held[8].Model.Name != "NVSwitch" {
			t.Fatalf("%d devices", len(held))
		}
		for _, r := range held {
			if r.Mode != ccmode.ProtectedPCIe || w.hardware[r.Address].Knob(45) != 1 {
				t.Errorf("%s is in %s", r.Address, r.Mode)
			}
		}
		if err := p.Return(t.Context(), guest); err != nil {
			t.Fatal(err)
		}
		for a, s := range states(p) {
			want := map[bool]ccmode.Mode{true: ccmode.Off, false: ccmode.On}[a >= "0000:60:00.0"]
			if v := view(t, p, a); s != pool.Clean || v.Mode != want {
				t.Errorf("%s is %s in %s, %+v", a, s, v.Mode, v.Quarantine)
			}
		}
		if err := p.Quarantine("0000:63:00.0", "LED is red"); err != nil {
			t.Fatal(err)
		}
		if err := p.Reserve(guest, "H100", 8); code(err) != "gpu.capacity" || len(p.Held(guest)) != 0 {
			t.Errorf("eight GPUs with three switches: %v, %d reserved", err, len(p.Held(guest)))
		}
	})
}

func TestGuestsOfAnEarlierRun(t *testing.T) {
	for name, c := range map[string]struct {
		keep []string
		boot string
		want pool.State
	}{
		"its guest runs":     {[]string{guest}, "boot-1", pool.Attached},
		"its guest is gone":  {nil, "boot-1", pool.Clean},
		"the host rebooted":  {[]string{guest}, "boot-2", pool.Clean},
		"another guest runs": {[]string{other}, "boot-1", pool.Clean},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, device(first, gputest.H100(), "nvidia"))
				p, stop := w.life()
				rest(t, p)
				if err := errors.Join(p.Reserve(guest, "H100", 1), p.Attach(t.Context(), guest)); err != nil {
					t.Fatal(err)
				}
				stop()
				resets := w.hardware[first].Resets()
				w.boot = c.boot
				p, stop = w.life(c.keep...)
				defer stop()
				rest(t, p)
				if s := states(p)[first]; s != c.want {
					t.Errorf("%s, want %s", s, c.want)
				}
				if touched := w.hardware[first].Resets() != resets; touched == (c.want == pool.Attached) {
					t.Errorf("reset: %t", touched)
				}
			})
		})
	}
}

func TestTheOperatorsOwnAreNeverTouched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shared := device("0000:47:00.0", gputest.H100(), "")
		shared.Group = "47"
		w := newWorld(t, device(first, gputest.H100(), "nvidia"), device(second, gputest.H100(), "vfio-pci"), device(b200, gputest.B200(), "nvidia"),
			vfiotest.Device{Address: "0000:45:00.0", Vendor: 0x10de, Device: 0x20b0, Class: 0x030200, Group: "45", Driver: "nvidia"},
			vfiotest.Device{Address: "0000:46:00.0", Vendor: 0x15b3, Device: 0x1021, Class: 0x020000, Group: "46"},
			shared, vfiotest.Device{Address: "0000:47:00.1", Vendor: 0x15b3, Device: 0x1021, Class: 0x020000, Group: "47"})
		if err := w.kernel.Process(77, "trainer", "dev/nvidia0"); err != nil {
			t.Fatal(err)
		}
		p, stop := w.life()
		defer stop()
		time.Sleep(3 * time.Minute)
		for a := range w.before {
			if now := w.binding(a); now != w.before[a] {
				t.Errorf("%s is %s, was %s", a, now, w.before[a])
			}
		}
		_, problems := p.Snapshot()
		var about []string
		for _, pr := range problems {
			about = append(about, pr.About+" "+pr.Why.Code)
		}
		if want := []string{"0000:42:00.0 gpu.operators-own", "0000:45:00.0 gpu.unsupported-model", "0000:47:00.0 vfio.group-shared"}; !slices.Equal(about, want) {
			t.Errorf("problems %q, want %q", about, want)
		}
		if v := view(t, p, first); v.State != pool.Unmanaged || v.Finding == nil || v.Finding.Code != "vfio.in-use" {
			t.Errorf("in use: %+v", v)
		}
		if err := w.kernel.Exit(77); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if s := states(p); s[first] != pool.Clean || s[b200] != pool.Clean {
			t.Errorf("once nobody uses it: %v", s)
		}
	})
}

func TestSelectorsThatNameNothing(t *testing.T) {
	const uuid = "GPU-0fbd31ed-1f0a-4bd0-9bb1-000000000001"
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), "nvidia"), device(second, gputest.H100(), "vfio-pci"))
		w.uuids = map[string]vfio.Address{uuid: first}
		w.manage = []string{uuid, string(first), string(second), "0000:99:00.0", "GPU-ffffffff-1f0a-4bd0-9bb1-000000000001"}
		p, stop := w.life()
		_, problems := p.Snapshot()
		var codes []string
		for _, pr := range problems {
			codes = append(codes, pr.Why.Code)
		}
		if want := []string{"gpu.named-twice", "vfio.no-device", "gpu.unknown-uuid"}; !slices.Equal(codes, want) {
			t.Errorf("%q, want %q", codes, want)
		}
		rest(t, p)
		if s := states(p); s[first] != pool.Clean || s[second] != pool.Clean {
			t.Errorf("named, and yet %v", s)
		}
		stop()
		// The UUID is remembered although no driver tells it any more, and a
		// device that is no longer named stays until it is released.
		w.uuids, w.manage = nil, []string{uuid}
		p, stop = w.life()
		defer func() { stop() }()
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Clean || !v.Named {
			t.Errorf("%+v", v)
		}
		if v := view(t, p, second); v.State != pool.Clean || v.Named {
			t.Errorf("%+v", v)
		}
		if err := p.Reserve(guest, "H100", 1); err != nil || p.Held(guest)[0].Address != first {
			t.Errorf("%v", err)
		}
		if err := p.Reserve(other, "H100", 1); code(err) != "gpu.capacity" {
			t.Errorf("one that is not named was offered: %v", err)
		}
		if err := p.Release(second, false); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		stop()
		p, stop = w.life(guest)
		if s := states(p); len(s) != 1 || len(w.records()) != 1 {
			t.Errorf("released and not named, it is forgotten by the next run: %v", s)
		}
	})
}

func TestReservationsAreRefusedInWords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), ""), device(b200, gputest.B200(), ""))
		p, stop := w.life()
		defer stop()
		for _, c := range []struct {
			model string
			count int
			want  string
		}{
			{"H100", 2, "gpu.unsupported-count"},
			{"A100", 1, "gpu.unsupported-model"},
			{"H200", 1, "gpu.none-of-model"},
			{"H100", 8, "gpu.capacity"},
			{"B200", 4, "gpu.capacity"},
		} {
			if err := p.Reserve(guest, c.model, c.count); code(err) != c.want {
				t.Errorf("%d × %s: %v, want %s", c.count, c.model, err, c.want)
			}
		}
		if err := p.Attach(t.Context(), guest); code(err) != "gpu.not-reserved" {
			t.Errorf("unreserved: %v", err)
		}
		rest(t, p)
		if err := errors.Join(p.Reserve(guest, "H100", 1), p.Reserve(guest, "H100", 1)); err != nil {
			t.Fatal(err)
		}
		resets := w.hardware[first].Resets()
		if err := p.Return(t.Context(), guest); err != nil || states(p)[first] != pool.Clean || w.hardware[first].Resets() != resets {
			t.Errorf("cancelled: %v, %v, %d resets", err, states(p), w.hardware[first].Resets()-resets)
		}
		w.manage = nil
		empty := newWorld(t)
		empty.manage = nil
		q, end := empty.life()
		defer end()
		if err := q.Reserve(guest, "H100", 1); code(err) != "gpu.not-managed" {
			t.Errorf("no GPU at all: %v", err)
		}
	})
}
