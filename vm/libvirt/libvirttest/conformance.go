// Package libvirttest says what every driver of guests owes its caller, as
// tests that run against libvirt's own test driver without a daemon and
// against a real libvirtd with QEMU. It keeps no state.
package libvirttest

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

// Driver is what is tested.
type Driver interface {
	List(ctx context.Context) ([]vm.Observed, error)
	Destroy(ctx context.Context, guestID string) error
	Shutdown(ctx context.Context, guestID string) error
	Subscribe() (events <-chan vm.Event, cancel func())
	Versions(ctx context.Context) (libvirtVersion, hypervisor string, err error)
}

// World is a connected driver and two ways to start domains.
type World struct {
	Driver Driver
	// Start starts a guest as the driver does.
	Start func(ctx context.Context, guestID string, generation uint64) error
	// Foreign starts a domain without our mark, and returns a function that
	// says whether it still runs.
	Foreign func(ctx context.Context, name, id string) (runs func() bool, err error)
}

// Ids of the domains the tests start.
const (
	guest      = "11111111-2222-4333-8444-555555555501"
	unmarked   = "11111111-2222-4333-8444-555555555502"
	stranger   = "11111111-2222-4333-8444-555555555503"
	eventLimit = time.Minute
)

// Conformance runs all tests one after the other; they share the world.
func Conformance(t *testing.T, w World) {
	t.Helper()
	t.Run("a guest is started once, listed, ended once and seen to", w.life)
	t.Run("a foreign domain is neither listed nor ended", func(t *testing.T) { w.foreign(t, "theirs", stranger, false) })
	t.Run("a domain with our name and no mark is reported and not ended", func(t *testing.T) { w.foreign(t, vm.NamePrefix+unmarked, unmarked, true) })
	t.Run("what never existed is ended already", func(t *testing.T) {
		for _, end := range []func(context.Context, string) error{w.Driver.Destroy, w.Driver.Shutdown} {
			if err := end(t.Context(), "00000000-0000-4000-8000-000000000000"); err != nil {
				t.Errorf("ending: %v", err)
			}
		}
	})
	t.Run("versions are told", func(t *testing.T) {
		if lib, hv, err := w.Driver.Versions(t.Context()); err != nil || lib == "" || hv == "" {
			t.Errorf("libvirt %q, hypervisor %q, %v", lib, hv, err)
		}
	})
}

func (w World) life(t *testing.T) {
	events, cancel := w.Driver.Subscribe()
	defer cancel()
	if err := w.Start(t.Context(), guest, 3); err != nil {
		t.Fatal(err)
	}
	Await(t, events, guest, vm.StateRunning)
	if err := w.Start(t.Context(), guest, 3); err != nil {
		t.Errorf("starting the same generation again: %v", err)
	}
	for _, other := range []uint64{2, 4} {
		if err := w.Start(t.Context(), guest, other); err == nil || contract.AsRefusal(err).Code != "vm.generation-conflict" {
			t.Errorf("starting generation %d beside 3: %v", other, err)
		}
	}
	all, err := w.Driver.List(t.Context())
	if found := find(all, guest); err != nil || len(found) != 1 || found[0].Generation != 3 || found[0].State != vm.StateRunning ||
		found[0].VCPUs < 1 || found[0].MemoryMiB < 1 {
		t.Errorf("listed %+v, %v; want one that runs with generation 3, and its size", found, err)
	}
	for range 2 {
		if err := w.Driver.Destroy(t.Context(), guest); err != nil {
			t.Errorf("destroying: %v", err)
		}
	}
	Await(t, events, guest, vm.StateGone)
	if found, err := w.Driver.List(t.Context()); err != nil || len(find(found, guest)) != 0 {
		t.Errorf("after the end: %+v, %v", found, err)
	}
	// The id is free again, as after a host's reboot.
	if err := w.Start(t.Context(), guest, 4); err != nil {
		t.Errorf("starting a later generation after the end: %v", err)
	}
	if err := w.Driver.Destroy(t.Context(), guest); err != nil {
		t.Errorf("destroying: %v", err)
	}
}

func (w World) foreign(t *testing.T, name, id string, listed bool) {
	t.Helper()
	runs, err := w.Foreign(t.Context(), name, id)
	if err != nil {
		t.Fatal(err)
	}
	found, err := w.Driver.List(t.Context())
	if err != nil || (len(find(found, id)) != 0) != listed {
		t.Errorf("listed %+v, %v", found, err)
	}
	for _, o := range find(found, id) {
		if o.Generation != 0 {
			t.Errorf("a domain without our mark has generation %d", o.Generation)
		}
	}
	for what, f := range map[string]func() error{
		"destroy":  func() error { return w.Driver.Destroy(t.Context(), id) },
		"shutdown": func() error { return w.Driver.Shutdown(t.Context(), id) },
		"start":    func() error { return w.Start(t.Context(), id, 1) },
	} {
		err := f()
		if refusal, ok := errors.AsType[*contract.Refusal](err); !ok || refusal.Code != "vm.foreign-domain" || refusal.Remedy == "" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if !runs() {
		t.Error("the foreign domain was ended")
	}
}

func find(all []vm.Observed, id string) []vm.Observed {
	return slices.DeleteFunc(slices.Clone(all), func(o vm.Observed) bool { return o.GuestID != id })
}

// Await reads events until the guest reaches the state.
func Await(tb testing.TB, events <-chan vm.Event, guestID string, want vm.State) {
	tb.Helper()
	limit := time.After(eventLimit)
	for {
		select {
		case e := <-events:
			if e.GuestID == guestID && e.State == want {
				return
			}
			tb.Logf("event: guest %q is %q: %s", e.GuestID, e.State, e.Reason)
		case <-limit:
			tb.Fatalf("guest %s does not become %q", guestID, want)
		}
	}
}
