// Package controltest tests transports of the control link: Suite is what
// every transport must do, Fake is a message server in memory that does it,
// and misbehaves on request. It is for tests only; a Fake is safe for
// concurrent use and uses nothing but channels, timers and mutexes, so that it
// works in a bubble of fake time.
package controltest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
)

const (
	// ackWait is how long a delivery may stay unsettled before it is repeated.
	ackWait = 30 * time.Second
	// duplicates is how long the server recognises an event's id.
	duplicates = 2 * time.Minute
)

// Fake is the message server of one host.
type Fake struct {
	host string

	mu       sync.Mutex
	commands []*queued
	events   []*api.Event
	ids      map[string]put
	last     map[string]uint64 // by subject
	conns    map[*conn]bool
	dials    int
	changed  chan struct{}

	down      bool
	silent    bool
	refuse    error
	noQueue   bool
	noStream  bool
	loseAcks  int
	losePuts  int
	maxEvents int // bytes of one event; 0 means no limit
}

// put is when and where an event was stored.
type put struct {
	when time.Time
	at   uint64
}

type queued struct {
	data     []byte
	attempts uint64
	visible  time.Time
}

// NewFake returns a running server for a host.
func NewFake(host string) *Fake {
	return &Fake{host: host, ids: map[string]put{}, last: map[string]uint64{}, conns: map[*conn]bool{}, changed: make(chan struct{})}
}

// set changes the server under its lock and wakes everybody who waits.
func (f *Fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	close(f.changed)
	f.changed = make(chan struct{})
}

// Transport returns a transport to this server.
func (f *Fake) Transport() control.Transport { return f }

// Send queues a command.
func (f *Fake) Send(_ testing.TB, raw []byte) {
	f.set(func() { f.commands = append(f.commands, &queued{data: bytes.Clone(raw)}) })
}

// Events returns what was stored, in order.
func (f *Fake) Events(testing.TB) []*api.Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*api.Event(nil), f.events...)
}

// Unsettled is the number of commands not yet acknowledged.
func (f *Fake) Unsettled(testing.TB) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.commands)
}

// Dials counts connections made.
func (f *Fake) Dials() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dials
}

// Cut breaks every connection.
func (f *Fake) Cut(testing.TB) {
	f.set(func() {
		for c := range f.conns {
			c.breakLocked(errors.New("connection reset"))
		}
	})
}

// Stop stops the server; Start starts it with everything it had stored.
func (f *Fake) Stop(tb testing.TB) {
	tb.Helper()
	f.set(func() { f.down = true })
	f.Cut(tb)
}

// Start starts a stopped server.
func (f *Fake) Start(testing.TB) { f.set(func() { f.down = false }) }

// SetSilent makes connections stay up and nothing be answered.
func (f *Fake) SetSilent(on bool) { f.set(func() { f.silent = on }) }

// Refuse makes dialling fail with this error; nil ends it.
func (f *Fake) Refuse(err error) { f.set(func() { f.refuse = err }) }

// RemoveQueue takes the host's queue away; false gives it back.
func (f *Fake) RemoveQueue(gone bool) { f.set(func() { f.noQueue = gone }) }

// RemoveStream lets nobody store events; false ends it.
func (f *Fake) RemoveStream(gone bool) { f.set(func() { f.noStream = gone }) }

// LoseQueue implements Server.
func (f *Fake) LoseQueue(testing.TB) { f.RemoveQueue(true) }

// LoseStream implements Server.
func (f *Fake) LoseStream(testing.TB) {
	f.set(func() { f.noStream, f.events, f.ids, f.last = true, nil, map[string]put{}, map[string]uint64{} })
}

// Restore implements Server.
func (f *Fake) Restore(testing.TB) { f.set(func() { f.noQueue, f.noStream = false, false }) }

// Revoke implements Server.
func (f *Fake) Revoke(tb testing.TB) {
	tb.Helper()
	f.Refuse(&control.LinkError{State: control.StateAuthRefused, Remedy: "enrol again", Err: errors.New("revoked")})
	f.Cut(tb)
}

// Renew implements Server.
func (f *Fake) Renew(testing.TB) { f.Refuse(nil) }

// LoseAcks loses the next n acknowledgements on their way.
func (f *Fake) LoseAcks(n int) { f.set(func() { f.loseAcks = n }) }

// LosePublishAnswers stores the next n events without saying so.
func (f *Fake) LosePublishAnswers(n int) { f.set(func() { f.losePuts = n }) }

// LimitEvents refuses events larger than n bytes for good.
func (f *Fake) LimitEvents(n int) { f.set(func() { f.maxEvents = n }) }

// Redeliver makes every unsettled command visible now.
func (f *Fake) Redeliver() {
	f.set(func() {
		for _, q := range f.commands {
			q.visible = time.Time{}
		}
	})
}

// Dial implements control.Transport.
func (f *Fake) Dial(ctx context.Context) (control.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case f.refuse != nil:
		return nil, f.refuse
	case f.down:
		return nil, errors.New("connection refused")
	}
	f.dials++
	c := &conn{f: f, failed: make(chan struct{})}
	f.conns[c] = true
	return c, nil
}

type conn struct {
	f      *Fake
	failed chan struct{}
	err    error // under f.mu
}

func (c *conn) breakLocked(err error) {
	if c.err == nil {
		c.err = err
		close(c.failed)
		delete(c.f.conns, c)
	}
}

func (c *conn) Server() string { return "tls://fake.example:4222" }

func (c *conn) Failed() <-chan struct{} { return c.failed }

func (c *conn) Err() error {
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	return c.err
}

func (c *conn) Close() {
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	c.breakLocked(errors.New("closed"))
}

// usable waits while the server is silent.
func (c *conn) usable(ctx context.Context) error {
	for {
		c.f.mu.Lock()
		err, silent, changed := c.err, c.f.silent, c.f.changed
		c.f.mu.Unlock()
		if err != nil {
			return err
		}
		if !silent {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.failed:
		case <-changed:
		}
	}
}

func (c *conn) Next(ctx context.Context, idle time.Duration) (control.Message, error) {
	timer := time.NewTimer(idle)
	defer timer.Stop()
	for {
		if err := c.usable(ctx); err != nil {
			return nil, err
		}
		c.f.mu.Lock()
		if c.f.noQueue {
			c.f.mu.Unlock()
			return nil, &control.LinkError{State: control.StateConsumerMissing, Remedy: "make it", Err: errors.New("no queue")}
		}
		now, next := time.Now(), time.Hour
		for _, q := range c.f.commands {
			if left := q.visible.Sub(now); left > 0 {
				next = min(next, left)
				continue
			}
			q.attempts++
			q.visible = now.Add(ackWait)
			c.f.mu.Unlock()
			return &message{c, q, q.attempts}, nil
		}
		changed := c.f.changed
		c.f.mu.Unlock()
		visible := time.NewTimer(next)
		select {
		case <-ctx.Done():
			visible.Stop()
			return nil, ctx.Err()
		case <-c.failed:
		case <-changed:
		case <-visible.C:
		case <-timer.C:
			visible.Stop()
			if err := c.usable(ctx); err != nil {
				return nil, err
			}
			return nil, control.ErrIdle
		}
		visible.Stop()
	}
}

func (c *conn) Publish(ctx context.Context, o control.Outgoing) (uint64, error) {
	if err := c.usable(ctx); err != nil {
		return 0, err
	}
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	if c.f.noStream {
		return 0, &control.LinkError{State: control.StateStreamMissing, Remedy: "make it", Err: errors.New("no stream")}
	}
	if c.f.maxEvents > 0 && len(o.Data) > c.f.maxEvents {
		return 0, control.ErrTooLarge
	}
	e, err := api.ParseEvent(o.Data)
	if err != nil {
		return 0, err
	}
	if want := api.EventSubject(c.f.host, api.EventKind(e)); o.Subject != want || !strings.HasPrefix(o.Subject, "evt.") || e.GetEventId() != o.ID {
		return 0, fmt.Errorf("published on %s with id %s, want %s, %s", o.Subject, o.ID, want, e.GetEventId())
	}
	at, err := c.f.storeLocked(o, e)
	if err == nil && c.f.losePuts > 0 {
		c.f.losePuts--
		return 0, errors.New("timeout")
	}
	return at, err
}

// storeLocked stores an event unless it is there, or not the next of its
// subject.
func (f *Fake) storeLocked(o control.Outgoing, e *api.Event) (uint64, error) {
	if put, stored := f.ids[o.ID]; stored && time.Since(put.when) <= duplicates {
		return put.at, nil
	}
	if o.After > 0 && f.last[o.Subject] != o.After {
		return 0, control.ErrOvertaken
	}
	f.events = append(f.events, e)
	at := uint64(len(f.events))
	f.ids[o.ID], f.last[o.Subject] = put{time.Now(), at}, at
	return at, nil
}

type message struct {
	c       *conn
	q       *queued
	attempt uint64
}

func (m *message) Data() []byte { return m.q.data }

func (m *message) Attempt() uint64 { return m.attempt }

func (m *message) Ack(ctx context.Context) error {
	if err := m.c.usable(ctx); err != nil {
		return err
	}
	f := m.c.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.loseAcks > 0 {
		f.loseAcks--
		return errors.New("timeout")
	}
	for i, q := range f.commands {
		if q == m.q {
			f.commands = append(f.commands[:i:i], f.commands[i+1:]...)
			break
		}
	}
	return nil
}

func (m *message) Nak(_ context.Context, delay time.Duration) error {
	m.c.f.set(func() { m.q.visible = time.Now().Add(delay) })
	return nil
}
