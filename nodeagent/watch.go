package main

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/nodeagent/watchdog"
)

// How long a loop may be silent before it counts as hung; see package
// watchdog.
const (
	// guestsPatience: a minute between two looks, a minute for libvirt's
	// answer, and then what is swept, each part with its own deadline.
	guestsPatience = 10 * time.Minute
	// storePatience: a minute between two records of the time, then fsync. A
	// disk may be slow for longer than anybody likes; one that takes minutes
	// serves nobody.
	storePatience = 5 * time.Minute
)

// linkPatience: a dial, the pause before the next one, and one command put on
// disk.
func linkPatience(cfg config.Config) time.Duration {
	return time.Duration(cfg.Control.DeadMan) + storePatience
}

// tellSystemd tells systemd what the agent does, if systemd started it.
func tellSystemd(log hclog.Logger) func(state string) {
	return func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("systemd could not be told", "state", state, "err", err)
		}
	}
}

// openStore opens the store, and with it what the agent knows of the time and
// of its own work.
func (a *agent) openStore() error {
	clocks, err := clock.NewHost("/")
	if err != nil {
		return err
	}
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("reading how often systemd wants to hear of the agent: %w", err)
	}
	a.watchdog = watchdog.New(limit, tellSystemd(a.log), a.log)
	if a.store, err = store.Open(storeFile(a.cfg), func() time.Time { return clocks.Read().Wall }, a.log); err != nil {
		return err
	}
	a.clock, err = clock.New(clock.Deps{
		Read: clocks.Read, Synchronised: clocks.Synchronised, Records: a.store, Built: buildTime(), Logger: a.log,
		Saved: a.watchdog.Loop("store", storePatience),
	})
	if err != nil {
		return errors.Join(err, a.store.Close())
	}
	a.started = a.clock.Now()
	return nil
}

// buildTime is that of the commit the agent was built from: no clock of a host
// that runs it can be before it. Zero for builds that do not know.
func buildTime() time.Time {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return time.Time{}
	}
	for _, s := range info.Settings {
		if s.Key != "vcs.time" {
			continue
		}
		if at, err := time.Parse(time.RFC3339, s.Value); err == nil {
			return at
		}
	}
	return time.Time{}
}

// watched is a transport whose user is seen to go on: a link that turns dials,
// or asks for the next command every few seconds.
type watched struct {
	control.Transport
	turned func()
}

// Dial implements control.Transport.
func (w watched) Dial(ctx context.Context) (control.Conn, error) {
	w.turned()
	conn, err := w.Transport.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return watchedConn{conn, w.turned}, nil
}

type watchedConn struct {
	control.Conn
	turned func()
}

// Next implements control.Conn.
func (w watchedConn) Next(ctx context.Context, idle time.Duration) (control.Message, error) {
	w.turned()
	return w.Conn.Next(ctx, idle)
}
