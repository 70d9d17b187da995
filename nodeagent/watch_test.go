package main

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
	"github.com/confidential-node/agent/nodeagent/inbox/inboxtest"
	"github.com/confidential-node/agent/nodeagent/watchdog"
)

// stuck is an inbox, and a store, that can be made to hang: the seam.
type stuck struct {
	*clocktest.Host
	hangs atomic.Bool
	over  chan struct{}
}

func (s *stuck) wait() {
	if s.hangs.Load() {
		<-s.over
	}
}

func (s *stuck) Receive(context.Context, []byte) error { s.wait(); return nil }

func (s *stuck) SaveLastSeen(seen clock.Instant) error {
	s.wait()
	return s.Host.SaveLastSeen(seen)
}

// pings counts what systemd hears in an hour of fake time.
func pings(heard *atomic.Int32) int32 {
	before := heard.Load()
	time.Sleep(time.Hour) //nolint:forbidigo // fake time
	return heard.Load() - before
}

func newTestWatchdog(ctx context.Context, t *testing.T) (*watchdog.Watchdog, *atomic.Int32) {
	t.Helper()
	heard := &atomic.Int32{}
	w := watchdog.New(time.Minute, func(state string) {
		if state == daemon.SdNotifyWatchdog {
			heard.Add(1)
		}
	}, hclog.NewNullLogger())
	go func() { _ = w.Run(ctx) }()
	return w, heard
}

// An idle link and one without a server turn; one whose inbox hangs does not.
func TestALinkThatHangsStarvesTheWatchdog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		server, inbox := controltest.NewFake(controltest.Host), &stuck{over: make(chan struct{})}
		w, heard := newTestWatchdog(ctx, t)
		cfg := config.Default()
		link, err := control.New(control.Deps{
			Transport: watched{server, w.Loop("link", linkPatience(cfg))}, Inbox: inbox, Outbox: inboxtest.New(1), HostID: controltest.Host,
			Heartbeat: func() *api.Heartbeat { return &api.Heartbeat{} }, Capability: func() *api.Capability { return &api.Capability{} },
			Interval: time.Duration(cfg.Control.Heartbeat), DeadMan: time.Duration(cfg.Control.DeadMan), Logger: hclog.NewNullLogger(),
		})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- link.Run(ctx) }()
		if n := pings(heard); n < 120 {
			t.Errorf("an idle link: systemd hears %d times", n)
		}
		inbox.hangs.Store(true)
		server.Send(t, []byte("a command"))
		pings(heard)
		if n := pings(heard); n != 0 {
			t.Errorf("a link that hangs: systemd hears %d times", n)
		}
		close(inbox.over)
		time.Sleep(time.Minute) //nolint:forbidigo // fake time
		if n := pings(heard); n < 120 {
			t.Errorf("it goes on: systemd hears %d times", n)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestAStoreThatHangsStarvesTheWatchdog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		disk := &stuck{Host: clocktest.New(time.Now()), over: make(chan struct{})}
		w, heard := newTestWatchdog(ctx, t)
		c, err := clock.New(clock.Deps{
			Read: disk.Read, Synchronised: disk.Synchronised, Records: disk, Logger: hclog.NewNullLogger(), Saved: w.Loop("store", storePatience),
		})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- c.Run(ctx) }()
		if n := pings(heard); n < 120 {
			t.Errorf("systemd hears %d times", n)
		}
		disk.hangs.Store(true)
		pings(heard)
		if n := pings(heard); n != 0 {
			t.Errorf("a store that hangs: systemd hears %d times", n)
		}
		if c.Doubt() != nil {
			t.Error("whoever asks for the time waits for the store, or doubts it")
		}
		close(disk.over)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
