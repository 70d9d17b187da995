package inbox_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
)

const years = 3 * 365 * 24 * time.Hour

// The window of a command that waits is what it had left when it came, by the
// time that has passed: not by a wall clock that was set meanwhile.
func TestAWaitingCommandsWindowOutlivesJumpsOfTheClock(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		meanwhile func(h *clocktest.Host)
		want      string
	}{
		"years forth":                     {func(h *clocktest.Host) { h.Step(years) }, ""},
		"years back":                      {func(h *clocktest.Host) { h.Step(-years) }, ""},
		"suspended":                       {func(h *clocktest.Host) { h.Pass(2 * time.Hour) }, api.CodeExpired},
		"suspended, years back":           {func(h *clocktest.Host) { h.Pass(2 * time.Hour); h.Step(-years) }, api.CodeExpired},
		"rebooted soon":                   {func(h *clocktest.Host) { h.Reboot(10 * time.Minute) }, ""},
		"rebooted late":                   {func(h *clocktest.Host) { h.Reboot(2 * time.Hour) }, api.CodeExpired},
		"half of it gone, then the other": {func(h *clocktest.Host) { h.Pass(30 * time.Minute); h.Step(years); h.Pass(33 * time.Minute) }, api.CodeExpired},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n, h := newNode(t, 1), clocktest.New(time.Now())
				n.clock = h.Read
				n.restart()
				n.receive(n.seal(evidence(1)))
				c.meanwhile(h)
				n.restart()
				n.run()
				if got := n.codes(); !slices.Equal(got, []string{c.want}) {
					t.Errorf("refusals %v, want %q", got, c.want)
				}
			})
		})
	}
}

// In doubt about the clock nothing is launched, whatever the window says, and
// guests can still be stopped. What was refused stays refused.
func TestInDoubtAboutTheClockLaunchesAreRefusedAndStopsAreNot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n, h := newNode(t, 1), clocktest.New(time.Now())
		c, err := clock.New(clock.Deps{Read: h.Read, Synchronised: h.Synchronised, Records: h, Logger: hclog.NewNullLogger()})
		if err != nil {
			t.Fatal(err)
		}
		n.clock, n.doubt = c.Now, c.Doubt
		n.restart()
		h.Step(-years)
		launched := n.seal(launch(1, guestID, 1))
		n.receive(launched)
		n.receive(n.seal(stop(2, guestID, 1)))
		n.run()
		h.Step(years)
		n.restart() // the memory of refusals is gone
		n.receive(launched)
		n.receive(n.seal(launch(3, "01234567-89ab-cdef-0123-000000000002", 1)))
		n.run()
		if got := n.codes(); !slices.Equal(got, []string{clock.CodeJumped, "", ""}) {
			t.Errorf("refusals %v", got)
		}
		if got := n.executor.executed(); len(got) != 2 {
			t.Errorf("executed %v", got)
		}
	})
}

// After a reboot with a clock that lost days, the agent only knows how late it
// is at least. What it refused then is not carried out when the clock is right.
func TestALaunchRefusedInDoubtStaysRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const month = 30 * 24 * time.Hour
		n, h := newNode(t, 1), clocktest.New(time.Now().Add(-month))
		if err := h.SaveLastSeen(h.Read()); err != nil {
			t.Fatal(err)
		}
		h.Reboot(-month)
		c, err := clock.New(clock.Deps{Read: h.Read, Synchronised: h.Synchronised, Records: h, Logger: hclog.NewNullLogger()})
		if err != nil {
			t.Fatal(err)
		}
		n.clock, n.doubt = c.Now, c.Doubt
		n.restart()
		raw := n.seal(launch(1, guestID, 1)) // by the issuer's clock
		n.receive(raw)
		h.Synchronise(time.Now())
		n.restart() // the memory of refusals is gone
		n.receive(raw)
		n.run()
		if got := n.codes(); !slices.Equal(got, []string{clock.CodeBehind}) {
			t.Errorf("refusals %v", got)
		}
		if got := n.executor.executed(); len(got) != 0 {
			t.Errorf("executed %v after it was refused", got)
		}
	})
}

type nothing struct{}

func (nothing) Execute(context.Context, *api.Command) ([]*api.Event, error) { return nil, nil }

// The file is lost, and the issuer has lost its memory too: it opens the same
// epoch again and counts from 1. What was carried out before is refused all
// the same, because it was issued before the epoch was begun for this store.
func TestReplaysAreRefusedAfterTheStoreIsLost(t *testing.T) {
	t.Parallel()
	path, key := filepath.Join(t.TempDir(), "state.db"), ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))
	signed := func(c *api.Command) []byte {
		raw, err := api.SealUnchecked(c, key)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	var s *store.Store
	begin := func(epoch uint64, id [16]byte) *api.Command {
		c := beginEpoch(epoch, 0)
		c.GetBeginEpoch().StoreId = id[:]
		return c
	}
	receive := func(raw []byte) string {
		t.Helper()
		x, err := inbox.New(inbox.Deps{
			Journal: s, Executor: nothing{}, Keys: []ed25519.PublicKey{ed25519.PublicKey(key[32:])}, HostID: host, Logger: hclog.NewNullLogger(), Clock: clocktest.Wall,
		})
		if err != nil {
			t.Fatal(err)
		}
		known, err := s.OutboxLen()
		if err != nil {
			t.Fatal(err)
		}
		if err := x.Receive(t.Context(), raw); err != nil {
			t.Fatal(err)
		}
		events, err := s.NextEvents(1000)
		if err != nil {
			t.Fatal(err)
		}
		if len(events) == known {
			return ""
		}
		return events[len(events)-1].GetCommandRefused().GetRefusal().GetCode()
	}
	open := func() [16]byte {
		t.Helper()
		var err error
		if s, err = store.Open(path, time.Now, hclog.NewNullLogger()); err != nil {
			t.Fatal(err)
		}
		e, err := s.Epoch()
		if err != nil {
			t.Fatal(err)
		}
		return e.StoreID
	}
	check := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	id := open()
	first := signed(begin(1, id))
	check("begin", receive(first), "")
	old, overtaken := signed(command(2)), signed(command(3)) // the second is never delivered
	check("command", receive(old), "")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[16] ^= 1 // of the first meta page
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	anew := open()
	if anew == id {
		t.Fatal("a damaged store is served")
	}
	check("replay before an epoch", receive(old), api.CodeEpochUnknown)
	check("replayed begin", receive(first), api.CodeStoreMismatch)
	check("the issuer forgot, and begins 1 again", receive(signed(begin(1, anew))), "")
	check("replay", receive(old), api.CodeReplayed)
	check("an old one never seen", receive(overtaken), api.CodeReplayed)
	check("a new one", receive(signed(command(2))), "")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
