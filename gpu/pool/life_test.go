package pool_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

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

func TestABoardGoesIntoPPCIeAsAWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all []vfiotest.Device
		for i := range 8 {
			h100 := device(vfio.Address(fmt.Sprintf("0000:5%d:00.0", i)), gputest.H100(), "")
			h100.ResetTakes = 100 * time.Millisecond
			all = append(all, h100)
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
		// A stop in the middle of the board's resets leaves none stuck.
		hasty, cancel := context.WithTimeout(t.Context(), 1450*time.Millisecond)
		defer cancel()
		if err := p.Attach(hasty, guest); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("called off: %v", err)
		}
		if err := errors.Join(p.Return(t.Context(), guest), p.Reserve(guest, "H100", 8)); err != nil {
			t.Fatalf("%v, %v", err, states(p))
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

func TestTheNUMANodeIsThePlatforms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		apart, near := device(first, gputest.B200(), ""), device(second, gputest.B200(), "")
		third := device(b200, gputest.B200(), "")
		apart.NUMANode, near.NUMANode, third.NUMANode = 0, 1, 1
		p, stop := newWorld(t, apart, near, third).life()
		defer stop()
		rest(t, p)
		if err := p.Reserve(guest, "B200", 2); err != nil {
			t.Fatal(err)
		}
		if s := states(p); s[first] != pool.Clean || s[second] != pool.Reserved || s[b200] != pool.Reserved {
			t.Errorf("two of node 1 are asked for, and %v", s)
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
