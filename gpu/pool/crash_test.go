package pool_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

// TestADeathAnywhereIsRepaired is the crash matrix, made from the list of
// steps: before, inside and after each, and after its record.
func TestADeathAnywhereIsRepaired(t *testing.T) {
	for _, point := range pool.Points() {
		t.Run(point, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { dieOnce(t, point) })
		})
	}
}

func dieOnce(t *testing.T, point string) {
	t.Helper()
	w := newWorld(t, device(first, gputest.H100(), "nvidia"), device(vga, gputest.RTXPRO6000(), "nouveau"),
		vfiotest.Device{Address: sound, Vendor: 0x10de, Device: 0x22e8, Class: 0x040300, Group: "44", Driver: "snd_hda_intel"})
	w.dieAt = point
	p, stop := w.life()
	// A whole life, as far as it comes.
	synctest.Wait()
	wait(2 * time.Minute)
	_ = p.Reserve(guest, "H100", 1)
	_ = p.Attach(t.Context(), guest)
	_ = p.Return(t.Context(), guest)
	_ = p.Release(vga, false)
	wait(5 * time.Minute)
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
