package pool_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

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
		wait(3 * time.Minute)
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
		wait(2 * time.Minute)
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
