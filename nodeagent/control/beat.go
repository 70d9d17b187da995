package control

import (
	"context"
	"errors"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
)

const (
	// overtakenTwice: one heartbeat of somebody else may have been on its way
	// when this instance began; two mean that somebody is there.
	overtakenTwice = 2
	// quietBeats in a row, and the other is gone.
	quietBeats = 10
)

// pulse is what a link knows of its own heartbeats. Each is stored only if
// none came after the one before: two hosts with one identity, as from a
// cloned disk, overtake each other, and both see it. They share the queue of
// commands, so nobody could tell them from outside.
type pulse struct {
	instance [16]byte
	beat     uint64
	// last is where the last heartbeat was stored, 0 when that is not known.
	last      uint64
	overtaken int
	quiet     int
}

// cloned reports whether somebody else speaks as this host.
func (p *pulse) cloned() bool { return p.overtaken >= overtakenTwice }

// stored notes where a heartbeat went that followed one stored at before.
func (p *pulse) stored(at, before uint64, overtaken bool) {
	p.last = at
	switch {
	case overtaken && at > before: // a stream that was wiped counts anew
		p.overtaken, p.quiet = p.overtaken+1, 0
	case overtaken || before == 0:
	default:
		if p.quiet++; p.quiet >= quietBeats {
			p.overtaken = 0
		}
	}
}

// beats says what the host can do, then that it is alive.
func (l *Link) beats(ctx context.Context, conn Conn) error {
	introduced := false
	l.pulse.last = 0 // what is under way on the former connection may still arrive
	for failures := 0; ; {
		err := l.beat(ctx, conn, !introduced)
		if over(ctx) {
			return nil
		}
		l.report(loopBeats, err)
		delay := l.d.Interval
		if err != nil {
			l.pulse.last = 0
			delay = min(delay, backoff(failures))
			failures++
		} else {
			introduced, failures = true, 0
		}
		timer := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-l.announce:
			introduced = false
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (l *Link) beat(ctx context.Context, conn Conn, introduce bool) error {
	if introduce {
		body := &api.Event_Capability{Capability: l.d.Capability()}
		if _, err := l.publish(ctx, conn, api.NewEvent(l.d.HostID, "", l.d.Clock(), body), 0); err != nil {
			return err
		}
	}
	heartbeat := l.d.Heartbeat()
	l.pulse.beat++
	heartbeat.Instance, heartbeat.Beat = l.pulse.instance[:], l.pulse.beat
	event := api.NewEvent(l.d.HostID, "", l.d.Clock(), &api.Event_Heartbeat{Heartbeat: heartbeat})
	before := l.pulse.last
	at, err := l.publish(ctx, conn, event, before)
	overtaken := errors.Is(err, ErrOvertaken)
	if overtaken {
		at, err = l.publish(ctx, conn, event, 0)
	}
	if err != nil {
		return err
	}
	l.pulse.stored(at, before, overtaken)
	l.tellCloned(l.pulse.cloned())
	if l.d.Confirmed != nil {
		l.d.Confirmed(heartbeat)
	}
	return nil
}

func (l *Link) tellCloned(cloned bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cloned && !l.status.Cloned {
		l.d.Logger.Error("somebody else speaks as this host; nothing is launched until it stops. Find the other host or agent with this identity, stop it, and enrol it under a name of its own")
	}
	if !cloned && l.status.Cloned {
		l.d.Logger.Info("nobody else speaks as this host any more")
	}
	l.status.Cloned = cloned
}
