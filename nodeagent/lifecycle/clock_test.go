package lifecycle_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/lifecycle/lifecycletest"
)

const years = 3 * 365 * 24 * time.Hour

// runs is a guest that runs on a host with clocks of its own, and whose agent
// is gone.
func (h *host) runs(clocks *clocktest.Host) {
	h.t.Helper()
	h.clock = clocks.Read
	ctx, cancel := context.WithCancel(h.t.Context())
	m, over := h.lifeUntil(ctx, nil)
	h.started(ctx, m)
	h.until("it runs", func() bool {
		return h.world.Say(ctx, guestID, contract.GuestStatus{Phase: contract.PhaseRunning}) == nil
	})
	h.until("that is recorded", func() bool {
		g, err := h.store.Guest(guestID)
		return err == nil && g.Phase == contract.PhaseRunning
	})
	cancel()
	<-over
	h.world.ProcessDied()
}

// looked waits until an agent has looked at its guest anew, so that whatever
// it would do by the clock is done.
func (h *host) looked() {
	h.t.Helper()
	before := h.world.Calls("list")
	h.until("the agent has looked", func() bool { return h.world.Calls("list") >= before+3 })
}

// A guest's time is that of the host's own going on, over restarts of the
// agent and whatever is done to the wall clock.
func TestAGuestsTimeOutlivesJumpsOfTheClock(t *testing.T) {
	t.Parallel()
	for name, jump := range map[string]time.Duration{"years forth": years, "years back": -years} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, clocks := newHost(t), clocktest.New(time.Now())
			h.runs(clocks)
			g, err := h.store.Guest(guestID)
			if err != nil || g.Limits.Run <= time.Hour {
				t.Fatalf("limits %+v, %v", g.Limits, err)
			}
			clocks.Pass(g.Limits.Run - time.Hour) // the host was suspended
			clocks.Step(jump)
			ctx, cancel := context.WithCancel(t.Context())
			_, over := h.lifeUntil(ctx, nil)
			h.looked()
			clocks.Step(-2 * jump) // and under a running agent
			h.looked()
			if !h.world.Running(guestID) {
				t.Fatal("ended before its time")
			}
			cancel()
			<-over
			h.world.ProcessDied()
			h.life(t.Context(), nil)
			h.looked()
			clocks.Pass(time.Hour)
			h.ends(t.Context(), failed, "guest.run-timeout")
		})
	}
}

func TestALaunchsTimeOutlivesJumpsOfTheClock(t *testing.T) {
	t.Parallel()
	h, clocks := newHost(t), clocktest.New(time.Now())
	var reads atomic.Int64
	h.clock = func() clock.Instant {
		reads.Add(1)
		return clocks.Read()
	}
	h.world.Block("fetch", true)
	m := h.life(t.Context(), nil)
	if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
		t.Fatal(err)
	}
	h.until("it waits for its input", func() bool { return h.world.Calls("fetch") > 0 })
	for _, jump := range []time.Duration{years, -2 * years} {
		clocks.Step(jump)
		before := reads.Load()
		h.until("the clock was looked at", func() bool { return reads.Load() >= before+3 })
	}
	g, err := h.store.Guest(guestID)
	if err != nil || g.Undoing {
		t.Fatalf("ended before its time: %+v %v", g.Outcome, err)
	}
	clocks.Pass(g.Limits.Start) // suspended
	h.ends(t.Context(), failed, "guest.start-timeout")
}

func TestAGraceOutlivesJumpsOfTheClock(t *testing.T) {
	t.Parallel()
	h, clocks := newHost(t), clocktest.New(time.Now())
	var asked atomic.Int32
	h.world.OnShutdown(func(string) { asked.Add(1) })
	h.runs(clocks)
	m := h.life(t.Context(), nil)
	h.stop(t.Context(), m, time.Hour)
	h.until("it is asked", func() bool { return asked.Load() > 0 })
	clocks.Step(years)
	h.looked()
	clocks.Step(-2 * years)
	h.looked()
	if !h.world.Running(guestID) {
		t.Error("ended before its grace was over")
	}
	clocks.Pass(time.Hour)
	h.ends(t.Context(), stopped, "")
}

// Nothing is launched in doubt about the clock; what runs goes on, can be
// stopped, and a launch that was taken before is not refused when it comes
// again.
func TestInDoubtAboutTheClockNothingIsLaunchedAndGuestsGoOn(t *testing.T) {
	t.Parallel()
	h, clocks := newHost(t), clocktest.New(time.Now())
	c, err := clock.New(clock.Deps{Read: clocks.Read, Synchronised: clocks.Synchronised, Records: h.store, Logger: hclog.NewNullLogger()})
	if err != nil {
		t.Fatal(err)
	}
	h.clock, h.doubt = c.Now, c.Doubt
	m := h.life(t.Context(), nil)
	h.started(t.Context(), m)
	taken, err := h.store.Guest(guestID)
	if err != nil {
		t.Fatal(err)
	}
	clocks.Step(years)
	h.refused(t.Context(), m, h.other(1), clock.CodeJumped)
	again := h.command(nil)
	again.CommandId = taken.CommandID
	if err := h.execute(t.Context(), m, again); err != nil {
		t.Errorf("the launch of the guest that runs is refused: %v", err)
	}
	h.looked()
	if !h.world.Running(guestID) {
		t.Error("the guest is harmed")
	}
	h.stop(t.Context(), m, 0)
	h.ends(t.Context(), stopped, "")
	if g, err := h.store.Guest(guestID); err != nil || g.EndedAt.Before(g.AcceptedAt.Wall) || g.Status != api.GuestStatus_GUEST_STATUS_STOPPED {
		t.Errorf("recorded as %v, %v to %v, %v", g.Status, g.AcceptedAt.Wall, g.EndedAt, err)
	}
	clocks.Step(-years)
	if err := h.execute(t.Context(), m, h.other(2)); err != nil {
		t.Errorf("refused although the clock agrees again: %v", err)
	}
}

// The loop that compares guests with domains says that it turns, also while
// the hypervisor is silent; one that hangs in the middle says nothing.
func TestTheLoopOverGuestsTellsThatItTurns(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	var turns atomic.Int64
	h.turned = func() { turns.Add(1) }
	h.world.Fail("list", lifecycletest.ErrSilent)
	h.world.Block("sweep", true)
	h.life(t.Context(), nil)
	h.until("it turns although nobody answers", func() bool { return turns.Load() >= 3 })
	h.world.Fail("list", nil)
	h.until("it hangs", func() bool { return h.world.Calls("sweep") == 1 })
	hung := turns.Load()
	for i := range 10 {
		h.world.PowerOff(otherID(i)) // would wake it
		pause(t.Context())
	}
	if now := turns.Load(); now != hung {
		t.Errorf("it hangs, and says that it turned %d times", now-hung)
	}
}
