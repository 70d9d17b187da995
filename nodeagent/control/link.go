// Package control is the link between the node and its control plane: it
// fetches commands and hands them to the inbox, publishes the outbox, and
// says that the host is alive.
//
// It is outbound only and believes nothing it is told: whether a command is
// genuine is the inbox's to judge. A command is acknowledged after the inbox
// has stored it, an event dropped from the outbox after the server has stored
// it. Nothing secret goes into logs or status; commands are never logged.
//
// Connections are thrown away, not repaired: a broken one, and one on which
// nothing was confirmed for the dead-man time, is closed, and another is
// dialled, resolving names again, for ever, with jitter. Link is safe for
// concurrent use; Run is called once.
package control

import (
	"context"
	cryptorand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

const (
	// A thousand hosts that lost the same server come back spread over the
	// second half of each delay.
	firstDelay, lastDelay = time.Second, time.Minute
	// maxIdle bounds the time between two confirmations of a quiet link.
	maxIdle = 5 * time.Second
	// answerTimeout bounds one publish or acknowledgement.
	answerTimeout = 10 * time.Second
	// outboxBatch events are read from the store at a time.
	outboxBatch = 64
	// outboxLook is how often the outbox is looked at without a signal.
	outboxLook = 30 * time.Second
)

// CodeEventOversize takes the place of an event that is too large.
const CodeEventOversize = "event.oversize"

// Log keys.
const (
	keyServer = "server"
	keyState  = "state"
	keyError  = "err"
	keyEvent  = "event_id"
)

// Receiver takes commands: the inbox. After nil the command is acknowledged.
type Receiver interface {
	Receive(ctx context.Context, raw []byte) error
}

// Outbox holds events until they are stored elsewhere.
type Outbox interface {
	// NextEvents returns the oldest events with their sequence.
	NextEvents(limit int) ([]*api.Event, error)
	// DropEvents forgets events up to and including a sequence.
	DropEvents(upTo uint64) error
	// OutboxChanged signals or is closed when events were appended after the
	// call.
	OutboxChanged() <-chan struct{}
}

// Deps are what a Link is made of.
type Deps struct {
	Transport Transport
	Inbox     Receiver
	Outbox    Outbox
	HostID    string
	// Heartbeat and Capability describe the host now. Capability is sent
	// after every connect and Announce.
	Heartbeat  func() *api.Heartbeat
	Capability func() *api.Capability
	// Confirmed, unless nil, is given every heartbeat that the server stored.
	Confirmed func(*api.Heartbeat)
	// Interval between heartbeats.
	Interval time.Duration
	// DeadMan is how long nothing need be confirmed before the connection is
	// thrown away.
	DeadMan time.Duration
	// Clock is time.Now when nil.
	Clock  func() time.Time
	Logger hclog.Logger
}

// Status is the state of the link.
type Status struct {
	Connected bool
	State     State
	// Server is the one connected to, or last connected to.
	Server string
	// LastRoundTrip is when a server last confirmed something.
	LastRoundTrip time.Time
	// LastError is why State is not StateConnected, with what to do.
	LastError string
	// Cloned says that somebody else speaks as this host.
	Cloned bool
}

// Link is the node's side of the control link.
type Link struct {
	d        Deps
	announce chan struct{}
	pulse    pulse // beats only

	mu       sync.Mutex // guards below
	status   Status
	problems map[string]error // by loop, of the current connection
	heard    time.Time        // monotonic time of the last round trip
}

// New makes a link; Run starts it.
func New(d Deps) (*Link, error) {
	if d.Transport == nil || d.Inbox == nil || d.Outbox == nil || d.Heartbeat == nil || d.Capability == nil || d.Logger == nil {
		return nil, errors.New("making control link: transport, inbox, outbox, heartbeat, capability and logger are required")
	}
	if !api.ValidHostID(d.HostID) || d.Interval <= 0 || d.DeadMan <= 0 {
		return nil, errors.New("making control link: host id, heartbeat interval and dead-man time are required")
	}
	if d.Clock == nil {
		d.Clock = time.Now
	}
	d.Logger = d.Logger.Named("control")
	l := &Link{d: d, announce: make(chan struct{}, 1), status: Status{State: StateConnecting}}
	if _, err := cryptorand.Read(l.pulse.instance[:]); err != nil {
		return nil, fmt.Errorf("making control link: %w", err)
	}
	return l, nil
}

// Status returns a copy of the link's state.
func (l *Link) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status
}

// Announce sends Capability again, because what the host can do has changed.
func (l *Link) Announce() {
	select {
	case l.announce <- struct{}{}:
	default:
	}
}

// Run keeps the link up until ctx ends, which is not an error.
func (l *Link) Run(ctx context.Context) error {
	for attempt := 0; ; attempt++ {
		confirmed, err := l.session(ctx)
		if over(ctx) {
			return nil
		}
		if confirmed {
			attempt = 0
		}
		delay := backoff(attempt)
		l.d.Logger.Warn("control link down", keyState, stateOf(err), keyError, err, "retry_in", delay.Round(time.Millisecond))
		if !wait(ctx, delay) {
			return nil
		}
	}
}

// backoff doubles from firstDelay to lastDelay; the second half is random.
func backoff(attempt int) time.Duration {
	d := lastDelay
	if attempt < 6 {
		d = min(firstDelay<<attempt, lastDelay)
	}
	return d/2 + rand.N(d/2)
}

// over reports whether the link or its connection is to end.
func over(ctx context.Context) bool { return ctx.Err() != nil }

// wait reports whether the time passed before ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// session is the life of one connection. confirmed tells whether the server
// ever confirmed anything on it.
func (l *Link) session(ctx context.Context) (confirmed bool, err error) {
	started := time.Now()
	defer func() { l.down(err) }()
	dialCtx, cancel := context.WithTimeout(ctx, max(l.d.DeadMan, answerTimeout))
	defer cancel()
	conn, err := l.d.Transport.Dial(dialCtx)
	if err != nil {
		return false, fmt.Errorf("dialling control plane: %w", err)
	}
	defer conn.Close()
	l.up(conn.Server(), started)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-conn.Failed():
			return fmt.Errorf("connection to %s: %w", conn.Server(), conn.Err())
		}
	})
	group.Go(func() error { return l.watch(ctx) })
	group.Go(func() error { return l.commands(ctx, conn) })
	group.Go(func() error { return l.events(ctx, conn) })
	group.Go(func() error { return l.beats(ctx, conn) })
	err = group.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.heard.After(started), err
}

func (l *Link) up(server string, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problems, l.heard = map[string]error{}, at
	l.status.Connected, l.status.Server, l.status.State = true, server, StateConnecting
	l.d.Logger.Info("control link up", keyServer, server)
}

func (l *Link) down(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problems = nil
	l.status.Connected = false
	if err != nil {
		l.status.State, l.status.LastError = stateOf(err), err.Error()
	}
}

// loops of a session, in the order in which their problems matter.
const (
	loopCommands = "commands"
	loopEvents   = "events"
	loopBeats    = "heartbeats"
)

// report notes how one loop fares; nil is a confirmed round trip.
func (l *Link) report(loop string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		if previous := l.problems[loop]; previous == nil || previous.Error() != err.Error() {
			l.d.Logger.Warn("control link disturbed", "loop", loop, keyState, stateOf(err), keyError, err)
		}
		l.problems[loop] = err
	} else {
		delete(l.problems, loop)
		l.heard, l.status.LastRoundTrip = time.Now(), l.d.Clock()
	}
	l.status.State, l.status.LastError = StateConnected, ""
	for _, loop := range []string{loopBeats, loopEvents, loopCommands} {
		if p := l.problems[loop]; p != nil {
			l.status.State, l.status.LastError = stateOf(p), p.Error()
		}
	}
}

// watch is the dead man's switch. What the library and TCP believe about the
// connection does not count, only what the server confirmed.
func (l *Link) watch(ctx context.Context) error {
	for {
		l.mu.Lock()
		left := l.d.DeadMan - time.Since(l.heard)
		l.mu.Unlock()
		if left <= 0 {
			return &LinkError{
				StateSilent, "the link is dialled anew; if it repeats, look at the server and the network between",
				fmt.Errorf("nothing was confirmed for %s", l.d.DeadMan),
			}
		}
		if !wait(ctx, left) {
			return nil
		}
	}
}

// commands hands commands to the inbox, one at a time.
func (l *Link) commands(ctx context.Context, conn Conn) error {
	idle := min(maxIdle, l.d.DeadMan/3)
	for failures := 0; ; {
		msg, err := conn.Next(ctx, idle)
		switch {
		case over(ctx):
			return nil
		case errors.Is(err, ErrIdle):
			failures = 0
			l.report(loopCommands, nil)
			continue
		case err != nil:
			l.report(loopCommands, err)
			if !wait(ctx, backoff(failures)) {
				return nil
			}
			failures++
			continue
		}
		failures = 0
		l.report(loopCommands, nil)
		l.settle(ctx, msg)
	}
}

// settle acknowledges what the inbox took, and asks for the rest again. A
// lost acknowledgement costs a redelivery, which the inbox recognises.
func (l *Link) settle(ctx context.Context, msg Message) {
	if err := l.d.Inbox.Receive(ctx, msg.Data()); err != nil {
		l.d.Logger.Error("command not stored, it will come again; see that the disk of state_dir has space and can be written", keyError, err)
		delay := backoff(int(min(msg.Attempt(), 10)))
		if err := msg.Nak(ctx, delay); err != nil {
			l.d.Logger.Warn("command not handed back", keyError, err)
		}
		return
	}
	ackCtx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	if err := msg.Ack(ackCtx); err != nil {
		l.d.Logger.Warn("command not acknowledged", keyError, err)
		return
	}
	l.report(loopCommands, nil)
}

// events publishes the outbox in order.
func (l *Link) events(ctx context.Context, conn Conn) error {
	for failures := 0; ; {
		changed := l.d.Outbox.OutboxChanged()
		sent, err := l.publishBatch(ctx, conn)
		switch {
		case over(ctx):
			return nil
		case err != nil:
			l.report(loopEvents, err)
			if !wait(ctx, backoff(failures)) {
				return nil
			}
			failures++
			continue
		}
		failures = 0
		if sent > 0 {
			continue
		}
		timer := time.NewTimer(outboxLook)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
		if over(ctx) {
			return nil
		}
	}
}

func (l *Link) publishBatch(ctx context.Context, conn Conn) (int, error) {
	events, err := l.d.Outbox.NextEvents(outboxBatch)
	if err != nil {
		return 0, fmt.Errorf("reading outbox: %w", err)
	}
	for i, e := range events {
		_, err := l.publish(ctx, conn, e, 0)
		if errors.Is(err, ErrTooLarge) {
			// It can never leave, and would hold back all others for ever. Its
			// command must not stay without an outcome.
			l.d.Logger.Error("event too large, told so instead", keyEvent, e.GetEventId(), "kind", api.EventKind(e), keyError, err)
			_, err = l.publish(ctx, conn, l.tooLarge(e), 0)
		}
		if err != nil {
			return i, err
		}
		l.report(loopEvents, nil)
		if err := l.d.Outbox.DropEvents(e.GetSequence()); err != nil {
			return i, fmt.Errorf("dropping published event: %w", err)
		}
	}
	return len(events), nil
}

// tooLarge takes the place of an event that cannot be published.
func (l *Link) tooLarge(e *api.Event) *api.Event {
	said := api.NewRefused(l.d.HostID, e.GetCommandId(), l.d.Clock(), contract.Refuse(CodeEventOversize,
		"look at the guest with nodeagent status on the host; what it said is too large for the link",
		"an event of kind %s is larger than the link carries", api.EventKind(e)), nil)
	said.EventId, said.Sequence = e.GetEventId(), e.GetSequence()
	return said
}

func (l *Link) publish(ctx context.Context, conn Conn, e *api.Event, after uint64) (uint64, error) {
	data, err := api.MarshalEvent(e)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return conn.Publish(ctx, Outgoing{Subject: api.EventSubject(l.d.HostID, api.EventKind(e)), ID: e.GetEventId(), Data: data, After: after})
}
