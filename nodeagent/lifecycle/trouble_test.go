package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle/lifecycletest"
	"github.com/confidential-node/agent/nodeagent/store"
)

// fullDisk refuses changes of guests while it is full.
type fullDisk struct {
	*store.Store
	full atomic.Bool
}

func (d *fullDisk) PutGuest(g store.Guest, events ...*api.Event) error {
	if d.full.Load() {
		return fmt.Errorf("writing: %w", syscall.ENOSPC)
	}
	return d.Store.PutGuest(g, events...)
}

func TestAFullDiskClosesAdmissionAndLosesNothing(t *testing.T) {
	t.Parallel()
	for point, c := range map[string]struct {
		want api.GuestStatus
		code string
	}{
		"begun:blobs": {failed, "agent.launch-interrupted"}, "did:tap": {failed, "agent.launch-interrupted"}, "did:domain": {finished, ""},
		"undoing": {finished, ""}, "undone:tap": {finished, ""}, "settled:out": {finished, ""},
	} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			disk := &fullDisk{Store: h.store}
			h.records = disk
			there := make(chan struct{})
			var once sync.Once
			m := h.life(t.Context(), func(p string) {
				if p == point {
					once.Do(func() { disk.full.Store(true); close(there) })
				}
			})
			go h.guest(t.Context())
			if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
				t.Fatal(err)
			}
			<-there
			h.refused(t.Context(), m, h.other(1), "host.disk-full")
			h.until("status says so", func() bool {
				for _, v := range m.Snapshot() {
					if strings.Contains(v.Finding, "no space left") {
						return true
					}
				}
				return false
			})
			disk.full.Store(false)
			h.ends(t.Context(), c.want, c.code)
		})
	}
}

func TestResultsThatCannotBeDeliveredFailTheGuest(t *testing.T) {
	t.Parallel()
	expired := "https://store.example/out?X-Amz-Date=20200101T000000Z&X-Amz-Expires=60"
	upload := func(url string) func(*api.LaunchGuest) {
		return func(l *api.LaunchGuest) { l.Results.Uploads[0].PutUrl = url }
	}
	for name, c := range map[string]struct {
		url    string
		broken error
		want   api.GuestStatus
		code   string
	}{
		"the store refuses":                    {outURL, contract.Refuse("blob.forbidden", "r", "m"), failed, "blob.forbidden"},
		"the store is away, the URL expires":   {expired, errors.New("away"), failed, "results.upload-expired"},
		"only the host's clock says it is old": {expired, nil, finished, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.world.Fail("upload out", c.broken)
			m := h.life(t.Context(), nil)
			go h.guest(t.Context())
			if err := h.execute(t.Context(), m, h.command(upload(c.url))); err != nil {
				t.Fatal(err)
			}
			h.ends(t.Context(), c.want, c.code)
			if there := h.world.Uploaded(listURL) != nil; there != (c.want == finished) {
				t.Errorf("the list of results is there: %t", there)
			}
		})
	}
}

func TestAnUploadOutlivesItsStoresAbsenceAndTheAgent(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.world.Fail("upload", errors.New("away"))
	ctx, cancel := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	go h.guest(t.Context())
	if err := h.execute(ctx, m, h.command(nil)); err != nil {
		t.Fatal(err)
	}
	h.until("status says what is waited for", func() bool {
		v := m.Snapshot()
		return len(v) == 1 && v[0].Undoing && strings.Contains(v[0].Finding, "away")
	})
	cancel()
	<-over
	h.world.ProcessDied()
	h.life(t.Context(), nil)
	h.world.Fail("upload", nil)
	h.ends(t.Context(), finished, "")
	if h.world.Uploaded(outURL) == nil || h.world.Uploaded(listURL) == nil {
		t.Error("results were lost")
	}
}

// The control plane or the operator need not wait till a URL expires.
func TestAFurtherStopGivesUpResultsThatWait(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		grace time.Duration
		want  api.GuestStatus
		code  string
	}{
		"at once":               {0, failed, "results.given-up"},
		"in an hour, back soon": {time.Hour, finished, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.world.Fail("upload", errors.New("away"))
			m := h.life(t.Context(), nil)
			go h.guest(t.Context())
			if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
				t.Fatal(err)
			}
			h.until("the results wait", func() bool {
				v := m.Snapshot()
				return len(v) == 1 && v[0].Undoing && strings.Contains(v[0].Finding, "away")
			})
			h.stop(t.Context(), m, c.grace)
			if c.code == "" {
				h.world.Fail("upload", nil)
			}
			h.ends(t.Context(), c.want, c.code)
			events, err := h.store.NextEvents(1000)
			if err != nil {
				t.Fatal(err)
			}
			var told []string
			for _, e := range events {
				if r := e.GetResultGivenUp(); r != nil {
					told = append(told, r.GetName()+" "+r.GetRefusal().GetCode())
				}
			}
			if want := []string{"out results.given-up", contract.ResultsManifestName + " results.incomplete"}; c.code != "" && !slices.Equal(told, want) || c.code == "" && told != nil {
				t.Errorf("events say %q", told)
			}
		})
	}
}

func TestSilenceOfTheHypervisorDecidesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.dies()
	h.world.Fail("list", lifecycletest.ErrSilent)
	h.world.Fail("shutdown", lifecycletest.ErrSilent)
	before, asked := h.world.Leftovers(), h.world.Calls("list")
	m := h.life(t.Context(), nil)
	h.until("the hypervisor was asked again and again", func() bool { return h.world.Calls("list") > asked+3 })
	select {
	case <-m.Ready():
		t.Fatal("commands are taken before anything is known")
	default:
	}
	if after := h.world.Leftovers(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("there was %v, there is %v", before, after)
	}
	h.world.Fail("list", nil)
	<-m.Ready()
	h.until("the guest is adopted", func() bool { _, ok := h.world.Session(guestID); return ok })
	h.world.Fail("list", lifecycletest.ErrSilent)
	h.refused(t.Context(), m, h.other(1), "admit.hypervisor-silent")
	if !h.world.Running(guestID) {
		t.Error("the guest ended")
	}
	h.world.Fail("list", nil)
	h.world.Fail("shutdown", nil)
	go h.guest(t.Context())
	h.ends(t.Context(), finished, "")
}

// A hypervisor lost during a start is not asked again: a guest that had
// started and ended would start twice.
func TestAHypervisorLostDuringAStartIsLookedAt(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		op   string
		want api.GuestStatus
		code string
	}{
		"before the guest started": {"start", failed, "vm.start-lost"}, "after it": {"start-answer", finished, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.world.Fail(c.op, lifecycletest.ErrSilent)
			m, there := h.reached(t.Context(), "did:domain")
			if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
				t.Fatal(err)
			}
			<-there
			h.world.Fail(c.op, nil)
			go h.guest(t.Context())
			h.ends(t.Context(), c.want, c.code)
		})
	}
}

func TestAGuestNobodyCanServeCanStillBeStopped(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"adopt", "metadata", "spool"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.dies()
			h.world.Fail(op, errors.New("broken"))
			m := h.life(t.Context(), nil)
			<-m.Ready()
			h.until("status says so", func() bool { v := m.Snapshot(); return len(v) == 1 && strings.Contains(v[0].Finding, "broken") })
			if !h.world.Running(guestID) {
				t.Fatal("the guest ended")
			}
			h.stop(t.Context(), m, 0)
			h.until("its machine has ended", func() bool { return !h.world.Running(guestID) })
			h.world.Fail(op, nil)
			h.ends(t.Context(), stopped, "")
		})
	}
}

func TestWhatCannotBeUndoneIsSaidAndTriedAgain(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"destroy", "remove", "release"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			m := h.life(t.Context(), nil)
			h.started(t.Context(), m)
			h.world.Fail(op, errors.New("broken"))
			h.stop(t.Context(), m, 0)
			h.until("status says so", func() bool { v := m.Snapshot(); return len(v) == 1 && strings.Contains(v[0].Finding, "broken") })
			h.world.Fail(op, nil)
			h.ends(t.Context(), stopped, "")
		})
	}
}
