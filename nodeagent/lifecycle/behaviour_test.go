package lifecycle_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/lifecycle/lifecycletest"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vm"
)

const (
	stopped  = api.GuestStatus_GUEST_STATUS_STOPPED
	failed   = api.GuestStatus_GUEST_STATUS_FAILED
	finished = api.GuestStatus_GUEST_STATUS_FINISHED
)

func (h *host) stop(ctx context.Context, m *lifecycle.Manager, grace time.Duration) {
	h.t.Helper()
	cmd := &api.Command{CommandId: api.NewID(), Verb: &api.Command_StopGuest{StopGuest: &api.StopGuest{
		GuestId: guestID, Generation: 1, Grace: durationpb.New(grace),
	}}}
	if err := h.execute(ctx, m, cmd); err != nil {
		h.t.Fatal(err)
	}
}

// started launches the guest and returns when its domain runs.
func (h *host) started(ctx context.Context, m *lifecycle.Manager) {
	h.t.Helper()
	if err := h.execute(ctx, m, h.command(nil)); err != nil {
		h.t.Fatal(err)
	}
	h.until("the domain runs", func() bool { return h.world.Running(guestID) })
}

// until waits for a condition.
func (h *host) until(what string, is func() bool) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	for !is() {
		if ctx.Err() != nil {
			h.t.Fatalf("never so: %s", what)
		}
		pause(ctx)
	}
}

// ends checks how the guest ends, and that nothing is left.
func (h *host) ends(ctx context.Context, want api.GuestStatus, code string) *api.GuestState {
	h.t.Helper()
	s := h.ended(ctx)
	if s.GetStatus() != want || s.GetRefusal().GetCode() != code {
		h.t.Errorf("ended as %v, want %s %q", s, want, code)
	}
	if code != "" && (s.GetRefusal().GetRemedy() == "" || s.GetRefusal().GetMessage() == "") {
		h.t.Errorf("%v says not what happened or what to do", s.GetRefusal())
	}
	h.clean()
	return s
}

// refused checks that a command is refused, with a remedy.
func (h *host) refused(ctx context.Context, m *lifecycle.Manager, cmd *api.Command, code string) {
	h.t.Helper()
	err := h.execute(ctx, m, cmd)
	if r, ok := errors.AsType[*contract.Refusal](err); !ok || r.Code != code || r.Remedy == "" {
		h.t.Errorf("not refused as %s: %v", code, err)
	}
}

// reached runs an agent and says when it passes a point.
func (h *host) reached(ctx context.Context, point string) (*lifecycle.Manager, <-chan struct{}) {
	h.t.Helper()
	there := make(chan struct{}, 100)
	m := h.life(ctx, func(p string) {
		if p == point {
			there <- struct{}{}
		}
	})
	return m, there
}

func TestAStopDuringALaunchEndsIt(t *testing.T) {
	t.Parallel()
	for op, point := range map[string]string{"fetch": "begun:blobs", "adopt": "begun:tap", "metadata": "begun:metadata", "start": "begun:domain"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.world.Block(op, true)
			m, there := h.reached(t.Context(), point)
			if err := h.execute(t.Context(), m, h.command(nil)); err != nil {
				t.Fatal(err)
			}
			<-there
			h.stop(t.Context(), m, time.Hour)
			h.world.Block(op, false)
			h.ends(t.Context(), stopped, "")
		})
	}
}

func TestAGuestGetsItsGraceAndNoMore(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		obeys bool
		grace time.Duration
		asked int32
	}{
		"it obeys": {true, time.Hour, 1}, "it does not": {false, time.Hour, 1}, "there is none": {true, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			var asked atomic.Int32
			h.world.OnShutdown(func(id string) {
				asked.Add(1)
				if c.obeys {
					h.world.PowerOff(id)
				}
			})
			m := h.life(t.Context(), nil)
			h.started(t.Context(), m)
			h.stop(t.Context(), m, c.grace)
			h.until("it is asked", func() bool { return asked.Load() >= c.asked })
			if !c.obeys {
				if !h.world.Running(guestID) {
					t.Error("it ended before its grace was over")
				}
				h.ahead.Store(int64(2 * c.grace))
			}
			h.ends(t.Context(), stopped, "")
			if asked.Load() != c.asked {
				t.Errorf("its power button was pressed %d times, want %d", asked.Load(), c.asked)
			}
			h.stop(t.Context(), m, c.grace) // once more changes nothing
		})
	}
}

func TestALaunchThatTakesTooLongEndsTyped(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ block, says string }{
		"the input never comes": {"fetch", "not ready"}, "the hypervisor hangs": {"start", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.world.Block(c.block, true)
			m := h.life(t.Context(), nil)
			launch := h.command(func(l *api.LaunchGuest) { l.StartTimeout = durationpb.New(200 * time.Millisecond) })
			if err := h.execute(t.Context(), m, launch); err != nil {
				t.Fatal(err)
			}
			if s := h.ends(t.Context(), failed, "guest.start-timeout"); !strings.Contains(s.GetRefusal().GetMessage(), c.says) {
				t.Errorf("%v does not say %q", s.GetRefusal(), c.says)
			}
		})
	}
}

func TestAGuestThatNeverSpeaksEndsTyped(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	h.started(t.Context(), m)
	h.until("the start is over", func() bool { return m.Snapshot()[0].Status == api.GuestStatus_GUEST_STATUS_STARTED })
	h.ahead.Store(int64(24 * time.Hour))
	if s := h.ends(t.Context(), failed, "guest.start-timeout"); !strings.Contains(s.GetRefusal().GetMessage(), "OVMF") {
		t.Errorf("%v does not say what hangs without a word", s.GetRefusal())
	}
}

func TestTheEndOfAGuestsMachineIsToldFromItsCrash(t *testing.T) {
	t.Parallel()
	by := func(cause vm.Cause) func(*lifecycletest.World, string) {
		return func(w *lifecycletest.World, id string) { w.End(id, cause) }
	}
	for _, c := range []struct {
		code string
		end  func(*lifecycletest.World, string)
	}{
		{"guest.crashed", (*lifecycletest.World).Crash},
		{"guest.crashed", by(vm.CauseDied)},
		{"guest.destroyed", by(vm.CauseDestroyed)},
		{"guest.ended-early", (*lifecycletest.World).PowerOff},
	} {
		t.Run(c.code, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			m := h.life(t.Context(), nil)
			h.started(t.Context(), m)
			c.end(h.world, guestID)
			h.ends(t.Context(), failed, c.code)
		})
	}
}

// A machine that hangs never takes the message of its power button: the grace
// ends all the same, and with it the guest.
func TestAMachineThatHangsIsEndedWhenItsGraceIsOver(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	h.started(t.Context(), m)
	h.world.Block("shutdown", true)
	h.stop(t.Context(), m, 100*time.Millisecond)
	h.ends(t.Context(), stopped, "")
	if asked := h.world.Calls("shutdown"); asked == 0 {
		t.Error("it was not asked first")
	}
}

// dies runs an agent until its guest runs, and ends it.
func (h *host) dies() {
	h.t.Helper()
	ctx, cancel := context.WithCancel(h.t.Context())
	m, over := h.lifeUntil(ctx, nil)
	h.started(ctx, m)
	h.until("the start is recorded", func() bool {
		g, err := h.store.Guest(guestID)
		return err == nil && g.Status >= api.GuestStatus_GUEST_STATUS_STARTED
	})
	cancel()
	<-over
	h.world.ProcessDied()
}

func TestAHostsRebootEndsItsGuestsTyped(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.dies()
	if err := h.world.Reboot(); err != nil {
		t.Fatal(err)
	}
	h.cfg.BootID = "another boot"
	h.life(t.Context(), nil)
	h.ends(t.Context(), failed, "host.rebooted")
}

// The store is lost while a guest runs: the guest is left alone, what it has
// is not given to others, its id is not taken for a new guest's, and what it
// leaves goes when an operator has ended it.
func TestAGuestOutlivesTheStore(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.dies()
	lost, err := store.Open(filepath.Join(t.TempDir(), "state.db"), time.Now, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lost.Close() })
	h.store, h.records = lost, lost
	h.cfg.Capacity.VCPUs = 4 // two guests of two
	m := h.life(t.Context(), nil)
	h.refused(t.Context(), m, h.command(nil), "launch.domain-exists")
	if v := m.Snapshot(); len(v) != 1 || v[0].ID != guestID || !strings.Contains(v[0].Finding, "virsh") || v[0].VCPUs != 2 {
		t.Errorf("status shows %+v", v)
	}
	if err := h.execute(t.Context(), m, h.other(1)); err != nil {
		t.Fatal(err)
	}
	h.refused(t.Context(), m, h.other(2), "admit.capacity-vcpus")
	h.until("the other guest runs on a tap of its own", func() bool { return h.world.Running(otherID(1)) })
	if !h.world.Running(guestID) {
		t.Error("a guest nobody accounts for was ended")
	}
	h.world.PowerOff(guestID)
	h.until("what it left is gone", func() bool { return !strings.Contains(strings.Join(h.world.Leftovers(), " "), guestID) })
	h.until("it is no finding any more", func() bool { return len(m.Snapshot()) == 1 })
	if broken := h.world.Violations(); len(broken) > 0 {
		t.Errorf("rules broken: %v", broken)
	}
}

func otherID(n int) string { return fmt.Sprintf("01234567-89ab-cdef-0123-%012d", n) }

// other is a launch of another guest.
func (h *host) other(n int) *api.Command {
	h.t.Helper()
	cmd := h.command(func(l *api.LaunchGuest) {
		l.GuestId = otherID(n)
		old := []byte(strings.Repeat("0a", 16))
		if !bytes.Contains(l.Manifest, old) {
			h.t.Fatal("the manifest's launch_id is another")
		}
		l.Manifest = bytes.ReplaceAll(l.Manifest, old, fmt.Appendf(nil, "%032x", n))
	})
	cmd.CommandId = api.NewID()
	return cmd
}

func TestGuestsShareNeitherSlotNorId(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	const guests = 8
	for n := range guests {
		if err := h.execute(t.Context(), m, h.other(n)); err != nil {
			t.Fatal(err)
		}
	}
	taps := map[string]bool{}
	for n := range guests {
		h.until("all guests run", func() bool { return h.world.Running(otherID(n)) })
		taps[h.world.Spec(otherID(n)).NIC.Tap] = true
	}
	if len(taps) != guests {
		t.Errorf("%d guests on taps %v", guests, taps)
	}
	again := h.other(0)
	h.refused(t.Context(), m, again, "launch.guest-id-used")
	again.GetLaunchGuest().GuestId = otherID(guests)
	h.refused(t.Context(), m, again, "launch.launch-id-used")
}

// The guest answers, works, ignores the power button, and never finishes.
func TestAGuestThatNeverFinishesIsEndedByItsDeadline(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	h.started(t.Context(), m)
	h.until("the guest works", func() bool {
		return h.world.Say(t.Context(), guestID, contract.GuestStatus{Phase: contract.PhaseRunning}) == nil
	})
	h.ahead.Store(int64(721 * time.Hour))
	h.ends(t.Context(), api.GuestStatus_GUEST_STATUS_FAILED, "guest.run-timeout")
	if h.world.Running(guestID) {
		t.Error("its machine runs on")
	}
}

func TestAGuestWhoseNetworkCannotBeAdoptedStopsNobodyElse(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	const guests, broken = 3, 1
	for n := range guests {
		if err := h.execute(ctx, m, h.other(n)); err != nil {
			t.Fatal(err)
		}
	}
	served := func(n int) bool { _, ok := h.world.Session(otherID(n)); return ok }
	for n := range guests {
		h.until("all guests run", func() bool { return h.world.Running(otherID(n)) && served(n) })
	}
	cancel()
	<-over
	h.world.ProcessDied()
	h.world.Fail("adopt "+otherID(broken), errors.New("its tap is somebody else's"))
	m = h.life(t.Context(), nil)
	<-m.Ready()
	for n := range guests {
		if n != broken {
			h.until("the others are served", func() bool { return served(n) })
		}
	}
	h.until("status names the one", func() bool {
		return slices.ContainsFunc(m.Snapshot(), func(v lifecycle.GuestView) bool {
			return v.ID == otherID(broken) && strings.Contains(v.Finding, "somebody else's")
		})
	})
	if !h.world.Running(otherID(broken)) || served(broken) {
		t.Error("the guest without a network was ended, or is served")
	}
	h.world.Fail("adopt "+otherID(broken), nil)
	h.until("it is adopted once it can be", func() bool { return served(broken) })
}

func TestCommandsForGuestsThatAreNotThereAreRefusedTyped(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	stop := func(generation uint64) *api.Command {
		return &api.Command{Verb: &api.Command_StopGuest{StopGuest: &api.StopGuest{GuestId: guestID, Generation: generation}}}
	}
	h.refused(t.Context(), m, stop(1), "guest.not-found")
	h.refused(t.Context(), m, evidence(), "guest.not-found")
	if err := h.execute(t.Context(), m, h.command(func(l *api.LaunchGuest) { l.Generation = 2 })); err != nil {
		t.Fatal(err)
	}
	h.refused(t.Context(), m, stop(1), "guest.stale-generation")
	h.refused(t.Context(), m, &api.Command{}, api.CodeMalformed)
}

func evidence() *api.Command {
	return &api.Command{CommandId: api.NewID(), Verb: &api.Command_RequestEvidence{RequestEvidence: &api.RequestEvidence{
		GuestId: guestID, Nonce: []byte("a nonce of the verifier"),
	}}}
}

func TestAChallengeReachesTheGuestAndItsAnswerTheVerifier(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	h.started(t.Context(), m)
	challenge := evidence()
	events, err := m.Execute(t.Context(), challenge)
	if err != nil || len(events) != 1 || string(events[0].GetEvidence().GetEvidence()) != "evidence over a nonce of the verifier" ||
		events[0].GetCommandId() != challenge.GetCommandId() || events[0].GetEvidence().GetGuestId() != guestID {
		t.Errorf("%v, %v", events, err)
	}
	h.world.Block("challenge", true)
	h.refused(t.Context(), m, challenge, "evidence.timeout")
	h.world.PowerOff(guestID)
	h.ended(t.Context())
	h.until("the guest is forgotten", func() bool { return len(m.Snapshot()) == 0 })
	h.refused(t.Context(), m, challenge, "guest.not-running")
}
