package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/store"
)

// launch takes the steps. It returns nil when the guest is started or the end
// of it is decided, and an error when neither could be recorded or the agent
// ends: what was begun stays on record and is undone by the next start.
func (g *guest) launch(ctx context.Context) error {
	g.begun = true
	rec := g.record()
	within, cancel := g.m.by(ctx, rec.AcceptedAt.Add(rec.Limits.Start))
	defer cancel()
	g.mu.Lock()
	g.cancel = cancel
	g.mu.Unlock()
	for _, s := range steps() {
		if s.gpus && !g.wantsGPUs() {
			continue
		}
		end, err := g.take(ctx, within, s)
		if err != nil {
			return err
		}
		if end != nil {
			return g.decideEnd(*end)
		}
	}
	g.attached = true
	g.m.log.Info("guest started", keyGuest, g.id)
	return nil
}

// take takes one step, or says how the launch ends instead.
func (g *guest) take(ctx, within context.Context, s step) (*ending, error) {
	if end := g.stopped(); end != nil {
		return end, nil
	}
	if err := g.update(func(r *store.Guest) (announce, bool) {
		r.Steps = append(r.Steps, store.Step{Name: s.name, BegunAt: g.m.now()})
		return false, true
	}); err != nil {
		return nil, err
	}
	err := g.m.hook("begun:" + s.name)
	if err == nil {
		err = g.overseen(within, s)
	}
	if err = cmp.Or(err, g.m.hook("did:"+s.name)); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err() // the agent ends, the launch is undone by the next
		}
		return g.explain(within, s, err), nil
	}
	if s.name == stepDomain {
		return nil, g.started()
	}
	err = g.update(func(r *store.Guest) (announce, bool) {
		find(r.Steps, s.name).DoneAt = g.m.now()
		return false, true
	})
	g.m.mark("done:" + s.name)
	return nil, err
}

// hangGrace is how long a step may go on after its time is up before it is said
// to hang: nothing can end a call that waits for a disk.
const hangGrace = 30 * time.Second

// overseen takes a step and says so when it does not end with its time.
func (g *guest) overseen(within context.Context, s step) error {
	done := make(chan struct{})
	defer close(done)
	defer context.AfterFunc(within, func() {
		timer := time.NewTimer(hangGrace)
		defer timer.Stop()
		select {
		case <-done:
		case <-timer.C:
			g.finding("step " + s.name + " goes on although its time is up: look whether a disk of the host hangs; the guest ends when the step does")
		}
	})()
	return s.do(g, within)
}

// started records that the domain runs.
func (g *guest) started() error {
	err := g.update(func(r *store.Guest) (announce, bool) {
		if domain := find(r.Steps, stepDomain); domain.DoneAt.IsZero() {
			domain.DoneAt = g.m.now()
		}
		r.Status = max(r.Status, api.GuestStatus_GUEST_STATUS_STARTED)
		return true, true
	})
	g.m.mark("done:" + stepDomain)
	return err
}

// stopped says how a launch ends that a StopGuest came for.
func (g *guest) stopped() *ending {
	if g.record().Stop == nil {
		return nil
	}
	return &ending{final: api.GuestStatus_GUEST_STATUS_STOPPED}
}

// explain says how a launch ends whose step failed.
func (g *guest) explain(ctx context.Context, s step, err error) *ending {
	if end := g.stopped(); end != nil {
		return end
	}
	if _, refused := errors.AsType[*contract.Refusal](err); !refused && errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		end := startTimeout(g.record())
		end.why = end.why.Because(fmt.Errorf("in step %s: %w", s.name, err))
		return end
	}
	if _, refused := errors.AsType[*contract.Refusal](err); !refused {
		if r := headroom.Explain(err); r != nil {
			r.Message += " (step " + s.name + ")"
			return &ending{api.GuestStatus_GUEST_STATUS_FAILED, r}
		}
	}
	return &ending{api.GuestStatus_GUEST_STATUS_FAILED, contract.AsRefusal(err)}
}

// follow looks after a guest that runs. Time runs, and a StopGuest counts, even
// while its network or metadata cannot be served.
func (g *guest) follow(ctx context.Context) error {
	rec, now := g.record(), g.m.instant()
	end, at := due(rec, g.m.c, now)
	if end != nil {
		return g.decideEnd(*end)
	}
	switch err := g.adopt(ctx); {
	case err == nil:
		g.finding(g.foreign)
		return g.watch(ctx)
	case ctx.Err() != nil || errors.Is(err, store.ErrDamaged):
		return err
	default:
		g.askToEnd(ctx, rec)
		return g.hold(ctx, "it runs, but nobody serves it: "+err.Error(), min(g.m.c.Poll, at.Sub(now)))
	}
}

// adopt makes a guest that runs this process's: its spool, network and
// metadata. It may be repeated.
func (g *guest) adopt(ctx context.Context) error {
	if g.attached {
		return nil
	}
	rec := g.record()
	if err := g.makeSpool(ctx); err != nil {
		return err
	}
	if err := g.m.holdForwarding(); err != nil {
		return err
	}
	if err := g.m.d.Network.Adopt(ctx, []network.Guest{g.m.c.nic(rec)}); err != nil {
		return fmt.Errorf("adopting network of guest %s: %w", g.id, err)
	}
	if err := errors.Join(g.m.d.Metadata.Close(g.id), g.serve(ctx)); err != nil {
		return fmt.Errorf("serving adopted guest %s: %w", g.id, err)
	}
	if err := g.compareDevices(ctx); err != nil {
		return err
	}
	if stageOf(rec) == stageStarting {
		if err := g.started(); err != nil {
			return err
		}
	}
	g.attached = true
	g.m.log.Info("guest adopted", keyGuest, g.id, "phase", string(rec.Phase))
	return nil
}

// watch follows a started guest until its domain is gone or its end is
// decided.
func (g *guest) watch(ctx context.Context) error {
	for {
		rec := g.record()
		if rec.Undoing {
			return nil
		}
		now := g.m.instant()
		end, at := due(rec, g.m.c, now)
		if end != nil {
			return g.decideEnd(*end)
		}
		g.reroute(ctx)
		g.askToEnd(ctx, rec)
		if err := g.m.pause(ctx, g.wake, min(at.Sub(now), g.m.c.Poll)); err != nil {
			return err
		}
		switch domain, crashed := g.look(ctx); {
		case crashed:
			return g.decideEnd(*failed("guest.crashed", "launch again; the host's log of the domain may say more", "the guest's machine crashed%s", lastWord(rec)))
		case domain != sightOurs && domain != sightUnknown:
			return nil
		}
	}
}

// askToEnd drains a guest that is to stop, and presses its power button.
func (g *guest) askToEnd(ctx context.Context, rec store.Guest) {
	if rec.Stop == nil {
		return
	}
	// A machine that hangs takes the button's message never; its grace ends all the same.
	ctx, cancel := context.WithTimeout(ctx, max(rec.Stop.Deadline.Sub(g.m.instant()), 0))
	defer cancel()
	if !g.drained {
		err := g.connect(ctx)
		if g.drained = err == nil; !g.drained {
			g.m.log.Warn("guest still takes new connections while it ends, this is tried again", keyGuest, g.id, keyError, err)
		}
	}
	if g.asked {
		return
	}
	if err := g.m.d.Hypervisor.Shutdown(ctx, g.id); err != nil {
		g.m.log.Warn("guest could not be asked to end, it is ended when its grace is over", keyGuest, g.id, "deadline", rec.Stop.Deadline.Wall, keyError, err)
		return
	}
	g.asked = true
}

// end uploads what the guest delivered, takes everything down in reverse, and
// reports.
func (g *guest) end(ctx context.Context) error {
	for _, s := range slices.Backward(steps()) {
		taken := find(g.record().Steps, s.name)
		if taken == nil || !taken.GoneAt.IsZero() {
			continue
		}
		if s.name == stepSpool {
			if err := g.deliver(ctx); err != nil {
				return err
			}
		}
		if err := g.undo(ctx, s); err != nil {
			return fmt.Errorf("undoing %s of guest %s: %w", s.name, g.id, err)
		}
	}
	// Reserved with the acceptance, before the step of that name.
	if err := g.returnGPUs(ctx); err != nil {
		return fmt.Errorf("returning GPUs of guest %s: %w", g.id, err)
	}
	return g.m.finish(g)
}

// undoTimeout bounds one undo; ending a guest with much pinned memory takes
// libvirt minutes.
const undoTimeout = 5 * time.Minute

// returnTimeout bounds giving GPUs back: each may take two resets, and one that
// hangs has limits of its own.
const returnTimeout = time.Hour

// undo takes one step back and makes sure that nothing of it is left.
func (g *guest) undo(ctx context.Context, s step) error {
	limit := undoTimeout
	if s.name == stepGPUs {
		limit = returnTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	begun := g.m.now()
	if err := s.undo(g, ctx); err != nil {
		return err
	}
	if err := g.m.hook("undone:" + s.name); err != nil {
		return err
	}
	if s.left != nil {
		left, err := s.left(g, ctx)
		if err != nil {
			return err
		}
		if left {
			return errors.New("it is still there after it was removed; look for it on the host, the agent tries again")
		}
	}
	err := g.update(func(r *store.Guest) (announce, bool) {
		taken := find(r.Steps, s.name)
		taken.UndoAt, taken.GoneAt = begun, g.m.now()
		return false, true
	})
	if err == nil {
		g.finding("")
	}
	g.m.mark("gone:" + s.name)
	return err
}
