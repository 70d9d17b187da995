package libvirt

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"libvirt.org/go/libvirt"
)

// connection is one open connection with its callbacks.
type connection struct {
	*libvirt.Connect
	eventID int
	closed  chan struct{} // closed when libvirt says that it is lost
	log     hclog.Logger
	// inFlight are the calls that use it. A call is added only while the
	// connection is the driver's, under the driver's lock.
	inFlight sync.WaitGroup
}

type lifecycleHandler = func(*libvirt.Connect, *libvirt.Domain, *libvirt.DomainEventLifecycle)

// dial opens a connection and registers for its end and for events.
func dial(uri string, onEvent lifecycleHandler, log hclog.Logger) (*connection, error) {
	raw, err := libvirt.NewConnect(uri)
	if err != nil {
		return nil, err
	}
	c := &connection{Connect: raw, closed: make(chan struct{}), eventID: -1, log: log}
	var once sync.Once
	onClose := func(*libvirt.Connect, libvirt.ConnectCloseReason) { once.Do(func() { close(c.closed) }) }
	// libvirt's own test driver has no transport: nothing to lose or keep alive.
	if err := raw.RegisterCloseCallback(onClose); err != nil && !isCode(err, libvirt.ERR_NO_SUPPORT) {
		c.close()
		return nil, fmt.Errorf("registering for the connection's end: %w", err)
	}
	if c.eventID, err = raw.DomainEventLifecycleRegister(nil, onEvent); err != nil {
		c.eventID = -1
		c.close()
		return nil, fmt.Errorf("registering for events: %w", err)
	}
	if err := raw.SetKeepAlive(keepAlive, keepAliveCount); err != nil && !isCode(err, libvirt.ERR_NO_SUPPORT) {
		c.close()
		return nil, fmt.Errorf("setting keep-alive: %w", err)
	}
	return c, nil
}

// close takes the callbacks off first: each holds a reference, and a
// connection with references left keeps its socket. What a dead daemon
// answers to that does not matter.
func (c *connection) close() {
	var eventErr error
	if c.eventID >= 0 {
		eventErr = c.DomainEventDeregister(c.eventID)
	}
	callbackErr := c.UnregisterCloseCallback()
	left, err := c.Close()
	if left > 0 || err != nil {
		c.log.Warn("connection not released", "references", left, "err", errors.Join(err, eventErr, callbackErr))
	}
}

// call runs f on the connection.
func call[T any](ctx context.Context, d *Driver, limit time.Duration, f func(*libvirt.Connect) (T, error)) (T, error) {
	var none T
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("asking libvirtd: %w", err) // or a domain might start that was called off
	}
	d.mu.Lock()
	c, last := d.conn, d.lastErr
	if c != nil {
		c.inFlight.Add(1)
	}
	d.mu.Unlock()
	if c == nil {
		return none, errors.Join(ErrNoConnection, last)
	}
	run := func() (T, error) {
		defer c.inFlight.Done()
		return f(c.Connect)
	}
	v, err := bounded(ctx, d, limit, run, func(T) {})
	if errors.Is(err, ErrStuck) {
		c.inFlight.Done() // it never ran
	}
	if isTransport(err) {
		return none, errors.Join(ErrNoConnection, err)
	}
	return v, err
}

// bounded runs f in a goroutine of its own and gives up on it at the
// deadline. f keeps its slot until it really returns; a value that comes too
// late goes to late.
func bounded[T any](ctx context.Context, d *Driver, limit time.Duration, f func() (T, error), late func(T)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var none T
	select {
	case d.slots <- struct{}{}:
	case <-ctx.Done():
		return none, fmt.Errorf("%w: %w", ErrStuck, ctx.Err())
	}
	type result struct {
		value T
		err   error
	}
	done := make(chan result)
	go func() {
		defer func() { <-d.slots }()
		v, err := f()
		select {
		case done <- result{v, err}:
		case <-ctx.Done():
			if err == nil {
				late(v)
			}
		}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, fmt.Errorf("libvirtd did not answer: %w", ctx.Err())
	}
}

// loop is libvirt's event loop.
type loop struct {
	ended chan struct{}
	err   error // valid once ended
}

// eventLoop starts libvirt's event loop, which exists once per process and
// must run before the first connection is opened.
//
//nolint:gochecknoglobals // libvirt's own loop is global to the process
var eventLoop = sync.OnceValues(func() (*loop, error) {
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return nil, fmt.Errorf("registering libvirt's event loop: %w", err)
	}
	l := &loop{ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		for l.err == nil {
			l.err = libvirt.EventRunDefaultImpl()
		}
		l.err = fmt.Errorf("running libvirt's event loop: %w", l.err)
	}()
	return l, nil
})

func isCode(err error, code libvirt.ErrorNumber) bool {
	e, ok := errors.AsType[libvirt.Error](err)
	return ok && e.Code == code
}

// isTransport says that the error comes from the way to libvirtd, not from
// libvirtd: whatever was asked may have happened.
func isTransport(err error) bool {
	e, ok := errors.AsType[libvirt.Error](err)
	return ok && (e.Domain == libvirt.FROM_RPC || e.Domain == libvirt.FROM_REMOTE || e.Code == libvirt.ERR_INVALID_CONN)
}

func free(dom *libvirt.Domain) { _ = dom.Free() } // a nil domain only
