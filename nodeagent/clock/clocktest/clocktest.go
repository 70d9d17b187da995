// Package clocktest is a host whose clocks obey the kernel: the time since the
// boot only goes on, the wall clock goes with it until somebody sets it, and
// setting it by hand makes it unsynchronised. For tests only; safe for
// concurrent use.
package clocktest

import (
	"fmt"
	"sync"
	"time"

	"github.com/confidential-node/agent/nodeagent/clock"
)

// Host is one machine over its boots.
type Host struct {
	mu     sync.Mutex
	boots  int
	now    clock.Instant
	synced bool
	seen   clock.Instant
	fail   error
}

// New is a host that was just started.
func New(wall time.Time) *Host {
	h := &Host{now: clock.Instant{Wall: wall}}
	h.Reboot(0)
	return h
}

// Read reads both clocks.
func (h *Host) Read() clock.Instant {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

// Synchronised is what adjtimex says.
func (h *Host) Synchronised() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.synced
}

// Pass lets time go by; a suspended host is no exception.
func (h *Host) Pass(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
}

// Step sets the wall clock by hand, this much ahead or back.
func (h *Host) Step(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now.Wall, h.synced = h.now.Wall.Add(d), false
}

// Synchronise has a time service set the wall clock and keep it.
func (h *Host) Synchronise(wall time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now.Wall, h.synced = wall, true
}

// Reboot starts the host anew; its wall clock moves by this much meanwhile.
func (h *Host) Reboot(off time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.boots++
	h.now = clock.Instant{Wall: h.now.Wall.Add(off), BootID: fmt.Sprintf("boot-%d", h.boots), Up: 10 * time.Second}
	h.synced = false
}

// LastSeen implements clock.Records.
func (h *Host) LastSeen() (clock.Instant, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.seen, h.fail
}

// SaveLastSeen implements clock.Records.
func (h *Host) SaveLastSeen(seen clock.Instant) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fail == nil {
		h.seen = seen
	}
	return h.fail
}

// FailRecords makes the records fail until it is called with nil.
func (h *Host) FailRecords(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail = err
}

// Wall is the time of this process, for tests that need no more.
func Wall() clock.Instant { return clock.Instant{Wall: time.Now()} }
