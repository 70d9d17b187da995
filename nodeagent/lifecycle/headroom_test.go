package lifecycle_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/store"
)

func TestAHostWithoutHeadroomTakesNoGuestAndKeepsThoseItHas(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
		t.Fatal(err)
	}
	h.until("the guest runs", func() bool { return h.world.Running(guestID) })
	plenty := h.left
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EROFS, syscall.EIO, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE} {
		h.left.Shortages = []*contract.Refusal{headroom.Explain(errno)}
		h.refused(t.Context(), m, h.other(1), h.left.Shortages[0].Code)
	}
	h.left = headroom.Left{MemoryMiB: 1}
	h.refused(t.Context(), m, h.other(1), headroom.CodeMemory)
	if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
		t.Errorf("a launch that was carried out is refused when it is repeated: %v", err)
	}
	if starts := h.world.Calls("start"); starts != 1 {
		t.Errorf("%d domains were started", starts)
	}
	h.left = plenty
	if err := h.execute(t.Context(), m, h.other(1)); err != nil {
		t.Errorf("admission does not open by itself: %v", err)
	}
}

// What fails for want of something of the host's says so, whatever it was.
func TestErrorsOfTheHostAreTypedWhereverTheyAppear(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	h.world.Fail("observe", fmt.Errorf("listing: %w", syscall.EMFILE))
	h.refused(t.Context(), m, h.command(nil), headroom.CodeDescriptors)
}

// hungDisk takes no change of guests until it is let go.
type hungDisk struct {
	*store.Store
	mu   sync.Mutex
	hang chan struct{}
}

func (d *hungDisk) PutGuest(g store.Guest, events ...*api.Event) error {
	d.mu.Lock()
	hang := d.hang
	d.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return d.Store.PutGuest(g, events...)
}

func (d *hungDisk) set(hang chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hang = hang
}

// A record that waits for a disk hides neither its guest nor others from
// status and heartbeats, and is written in the end.
func TestADiskThatHangsHidesNoGuest(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	disk := &hungDisk{Store: h.store}
	h.records = disk
	hang := make(chan struct{})
	m := h.life(t.Context(), nil)
	go h.guest(t.Context())
	disk.set(nil)
	if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
		t.Fatal(err)
	}
	disk.set(hang)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 100 {
		seen := make(chan int, 1)
		go func() { seen <- len(m.Snapshot()) }()
		select {
		case n := <-seen:
			if n != 1 {
				t.Fatalf("%d guests are seen", n)
			}
		case <-ctx.Done():
			t.Fatal("status waits for the disk")
		}
		pause(ctx)
	}
	disk.set(nil)
	close(hang)
	h.ends(t.Context(), finished, "")
}

// lastSync stores a new guest and fails all the same, as bbolt does when the
// disk fails at the last sync of a change.
type lastSync struct {
	*store.Store
	failures int
}

func (d *lastSync) PutGuest(g store.Guest, events ...*api.Event) error {
	err := d.Store.PutGuest(g, events...)
	if d.failures--; d.failures >= 0 && err == nil {
		err = syscall.EIO
	}
	return err
}

func TestALaunchRefusedForItsRecordLeavesNone(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.records = &lastSync{h.store, 1}
	m := h.life(t.Context(), nil)
	h.refused(t.Context(), m, h.command(nil), headroom.CodeDiskFailing)
	if guests, err := h.store.Guests(); err != nil || len(guests) != 0 {
		t.Errorf("recorded are %d guests, %v", len(guests), err)
	}
	if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
		t.Errorf("the same guest is refused afterwards: %v", err)
	}
}

// A disk that holds up a sweep holds up no stop.
func TestASweepThatHangsRefusesLaunchesInTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.world.Block("sweep", true)
		ctx, cancel := context.WithCancel(t.Context())
		m, ended := h.lifeUntil(ctx, nil)
		synctest.Wait()
		h.refused(t.Context(), m, h.command(nil), "admit.busy")
		cancel()
		<-ended
	})
}

// hungCache does not notice that its caller gave up, as a write that waits for
// a disk does not.
type hungCache struct {
	lifecycle.Blobs
	hang chan struct{}
}

func (c *hungCache) Fetch(ctx context.Context, b lifecycle.Blob, owner string) (string, error) {
	<-c.hang
	return c.Blobs.Fetch(ctx, b, owner)
}

func TestAStepThatHangsIsSaidToAndEndsWithItsDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		cache := &hungCache{h.blobs, make(chan struct{})}
		h.blobs = cache
		ctx, cancel := context.WithCancel(t.Context())
		m, ended := h.lifeUntil(ctx, nil)
		if err := h.execute(ctx, m, h.command(nil)); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Hour) // longer than any start may take
		if seen := m.Snapshot(); len(seen) != 1 || !strings.Contains(seen[0].Finding, "step blobs") {
			t.Errorf("status shows %+v", seen)
		}
		close(cache.hang)
		h.ends(ctx, failed, "guest.start-timeout")
		cancel()
		<-ended
	})
}
