// Package libvirt drives guests through libvirtd: one connection, kept alive
// and rebuilt for ever, transient domains that carry guest id and generation
// in their metadata, and lifecycle events.
//
// A libvirtd that hangs must not hang the agent: every call runs in its own
// goroutine with a deadline, and the number of calls that may be stuck is
// bounded. Silence is an error, never an answer: nobody may conclude from it
// that a guest is gone. Domains that are not ours are never touched.
//
// A Driver is safe for concurrent use. It never stops a guest on its own.
package libvirt

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"libvirt.org/go/libvirt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/domain"
)

const (
	// callTimeout bounds a call whose context has no nearer deadline.
	callTimeout = 30 * time.Second
	// maxStuck bounds the threads a hung libvirtd can hold.
	maxStuck = 16
	// keepAlive is the interval in seconds, keepAliveCount the misses.
	keepAlive, keepAliveCount = 5, 3
	// reconnectMin and reconnectMax bound the back-off between attempts.
	reconnectMin, reconnectMax = 200 * time.Millisecond, 5 * time.Second
	// eventBuffer is how many events a slow subscriber may be behind; later
	// ones are dropped, which is why subscribers also list.
	eventBuffer = 256
)

// ErrNoConnection means libvirtd cannot be reached at the moment.
var ErrNoConnection = errors.New("no connection to libvirtd")

// ErrStuck means that too many calls hang in libvirtd.
var ErrStuck = errors.New("libvirtd does not answer: too many calls hang")

// Driver is one connection to libvirtd.
type Driver struct {
	uri   string
	log   hclog.Logger
	slots chan struct{}

	mu          sync.Mutex
	conn        *libvirt.Connect
	lastErr     error
	connected   chan struct{} // closed while connected
	subscribers map[chan vm.Event]struct{}
}

// New returns a driver that connects once Run runs.
func New(uri string, logger hclog.Logger) *Driver {
	return &Driver{
		uri: uri, log: logger.Named("libvirt"), slots: make(chan struct{}, maxStuck),
		connected: make(chan struct{}), subscribers: map[chan vm.Event]struct{}{},
	}
}

// eventLoop starts libvirt's event loop, which exists once per process and
// must run before the first connection is opened.
//
//nolint:gochecknoglobals // libvirt's own loop is global to the process
var eventLoop = sync.OnceValue(func() error {
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return fmt.Errorf("registering libvirt's event loop: %w", err)
	}
	go func() {
		for libvirt.EventRunDefaultImpl() == nil {
		}
	}()
	return nil
})

// Run keeps the connection up until ctx ends.
func (d *Driver) Run(ctx context.Context) error {
	if err := eventLoop(); err != nil {
		return err
	}
	wait := reconnectMin
	for ctx.Err() == nil {
		closed, err := d.connect(ctx)
		if err != nil {
			d.mu.Lock()
			first := d.lastErr == nil
			d.lastErr = err
			d.mu.Unlock()
			if first {
				d.log.Warn("libvirtd unreachable, trying again", "uri", d.uri, "err", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
			wait = min(2*wait, reconnectMax)
			continue
		}
		wait = reconnectMin
		d.log.Info("connected", "uri", d.uri)
		select {
		case <-ctx.Done():
		case <-closed:
			d.log.Warn("connection lost", "uri", d.uri)
		}
		d.disconnect()
	}
	return nil
}

func (d *Driver) connect(ctx context.Context) (<-chan struct{}, error) {
	closed := make(chan struct{})
	var conn *libvirt.Connect
	err := d.bounded(ctx, func() error {
		c, err := libvirt.NewConnect(d.uri)
		if err != nil {
			return err
		}
		var once sync.Once
		if err = c.RegisterCloseCallback(func(*libvirt.Connect, libvirt.ConnectCloseReason) { once.Do(func() { close(closed) }) }); err == nil {
			_, err = c.DomainEventLifecycleRegister(nil, d.onLifecycle)
		}
		if err == nil {
			// The test driver has no transport to keep alive.
			if kaErr := c.SetKeepAlive(keepAlive, keepAliveCount); kaErr != nil {
				d.log.Debug("keep-alive not available", "err", kaErr)
			}
			conn = c
			return nil
		}
		_, closeErr := c.Close()
		return errors.Join(err, closeErr)
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", d.uri, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn, d.lastErr = conn, nil
	close(d.connected)
	return closed, nil
}

func (d *Driver) disconnect() {
	d.mu.Lock()
	conn := d.conn
	d.conn, d.connected = nil, make(chan struct{})
	d.lastErr = ErrNoConnection
	d.mu.Unlock()
	// Closing a connection to a dead daemon may hang as well.
	err := d.bounded(context.Background(), func() error { _, err := conn.Close(); return err })
	if err != nil {
		d.log.Debug("closing connection", "err", err)
	}
}

// WaitConnected returns once connected, or with the last error when ctx ends.
func (d *Driver) WaitConnected(ctx context.Context) error {
	d.mu.Lock()
	connected := d.connected
	d.mu.Unlock()
	select {
	case <-connected:
		return nil
	case <-ctx.Done():
		d.mu.Lock()
		defer d.mu.Unlock()
		return errors.Join(ErrNoConnection, d.lastErr)
	}
}

// bounded runs f in a goroutine of its own and gives up on it at the
// deadline; f keeps its slot until it really returns.
func (d *Driver) bounded(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	select {
	case d.slots <- struct{}{}:
	default:
		return ErrStuck
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-d.slots }()
		done <- f()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("libvirtd did not answer: %w", ctx.Err())
	}
}

// call runs f on the connection.
func (d *Driver) call(ctx context.Context, f func(*libvirt.Connect) error) error {
	d.mu.Lock()
	conn, last := d.conn, d.lastErr
	d.mu.Unlock()
	if conn == nil {
		return errors.Join(ErrNoConnection, last)
	}
	return d.bounded(ctx, func() error { return f(conn) })
}

// Start creates the domain and starts it. Started already with the same
// generation is success.
func (d *Driver) Start(ctx context.Context, spec vm.Spec) error {
	text, err := domain.Render(spec)
	if err != nil {
		return err
	}
	return d.call(ctx, func(conn *libvirt.Connect) error {
		existing, err := conn.LookupDomainByUUIDString(spec.GuestID)
		if err == nil {
			defer free(existing)
			return sameGeneration(existing, spec)
		}
		if !isCode(err, libvirt.ERR_NO_DOMAIN) {
			return fmt.Errorf("looking for guest %s: %w", spec.GuestID, err)
		}
		created, err := conn.DomainCreateXML(text, 0)
		if err != nil {
			return contract.Refuse("vm.start-failed", "look at the agent's log and at libvirt's log of the domain on the host",
				"libvirt could not start guest %s", spec.GuestID).Because(err)
		}
		free(created)
		return nil
	})
}

func sameGeneration(dom *libvirt.Domain, spec vm.Spec) error {
	observed, err := observe(dom)
	if err != nil {
		return err
	}
	if observed.Generation != spec.Generation {
		return contract.Refuse("vm.generation-conflict", "stop the running generation first",
			"guest %s runs already with generation %d, not %d", spec.GuestID, observed.Generation, spec.Generation)
	}
	return nil
}

// Shutdown asks the guest to end by itself (ACPI power button).
func (d *Driver) Shutdown(ctx context.Context, guestID string) error {
	return d.withOurs(ctx, guestID, (*libvirt.Domain).Shutdown)
}

// Destroy ends the guest at once. Gone already is success.
func (d *Driver) Destroy(ctx context.Context, guestID string) error {
	return d.withOurs(ctx, guestID, (*libvirt.Domain).Destroy)
}

// withOurs runs f on our domain of that id. No such domain, or one that ends
// meanwhile, is success; a foreign domain with that id is left alone.
func (d *Driver) withOurs(ctx context.Context, guestID string, f func(*libvirt.Domain) error) error {
	err := d.call(ctx, func(conn *libvirt.Connect) error {
		dom, err := conn.LookupDomainByUUIDString(guestID)
		if err != nil {
			return err
		}
		defer free(dom)
		if name, err := dom.GetName(); err != nil || !strings.HasPrefix(name, vm.NamePrefix) {
			return errors.Join(fmt.Errorf("domain %s is not ours: left alone", guestID), err)
		}
		return f(dom)
	})
	if isCode(err, libvirt.ERR_NO_DOMAIN) || isCode(err, libvirt.ERR_OPERATION_INVALID) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ending guest %s: %w", guestID, err)
	}
	return nil
}

// List returns our domains. An error means nothing is known, not that there
// is none.
func (d *Driver) List(ctx context.Context) ([]vm.Observed, error) {
	var out []vm.Observed
	err := d.call(ctx, func(conn *libvirt.Connect) error {
		doms, err := conn.ListAllDomains(0)
		if err != nil {
			return err
		}
		for i := range doms {
			defer free(&doms[i])
		}
		var found []vm.Observed
		for i := range doms {
			observed, err := observe(&doms[i])
			switch {
			case isCode(err, libvirt.ERR_NO_DOMAIN), isCode(err, libvirt.ERR_NO_DOMAIN_METADATA):
				continue // ended meanwhile, or not ours
			case err != nil:
				return err
			}
			found = append(found, observed)
		}
		out = found
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing guests: %w", err)
	}
	return out, nil
}

func observe(dom *libvirt.Domain) (vm.Observed, error) {
	text, err := dom.GetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, domain.MetadataNamespace, 0)
	if err != nil {
		return vm.Observed{}, err
	}
	id, generation, err := domain.ParseMark(text)
	if err != nil {
		return vm.Observed{}, err
	}
	state, _, err := dom.GetState()
	if err != nil {
		return vm.Observed{}, err
	}
	return vm.Observed{GuestID: id, Generation: generation, State: stateOf(state)}, nil
}

func stateOf(s libvirt.DomainState) vm.State {
	switch s { //nolint:exhaustive // every other state is "other"
	case libvirt.DOMAIN_RUNNING, libvirt.DOMAIN_BLOCKED:
		return vm.StateRunning
	case libvirt.DOMAIN_PAUSED, libvirt.DOMAIN_PMSUSPENDED:
		return vm.StatePaused
	case libvirt.DOMAIN_CRASHED:
		return vm.StateCrashed
	case libvirt.DOMAIN_SHUTOFF:
		return vm.StateGone
	default:
		return vm.StateOther
	}
}

// Subscribe returns events of our domains until cancel is called. Events may
// be lost while disconnected or when the reader is slow: list as well.
func (d *Driver) Subscribe() (events <-chan vm.Event, cancel func()) {
	ch := make(chan vm.Event, eventBuffer)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.subscribers[ch] = struct{}{}
	return ch, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.subscribers, ch)
	}
}

// onLifecycle runs on libvirt's event loop and must not call libvirtd.
func (d *Driver) onLifecycle(_ *libvirt.Connect, dom *libvirt.Domain, e *libvirt.DomainEventLifecycle) {
	name, nameErr := dom.GetName()
	id, idErr := dom.GetUUIDString()
	if nameErr != nil || idErr != nil || !strings.HasPrefix(name, vm.NamePrefix) {
		return
	}
	event := vm.Event{GuestID: id, State: vm.StateOther, Reason: e.String(), At: time.Now()}
	switch e.Event { //nolint:exhaustive // every other event is "other"
	case libvirt.DOMAIN_EVENT_STARTED, libvirt.DOMAIN_EVENT_RESUMED:
		event.State = vm.StateRunning
	case libvirt.DOMAIN_EVENT_SUSPENDED:
		event.State = vm.StatePaused
	case libvirt.DOMAIN_EVENT_STOPPED:
		event.State = vm.StateGone
	case libvirt.DOMAIN_EVENT_CRASHED:
		event.State = vm.StateCrashed
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for ch := range d.subscribers {
		select {
		case ch <- event:
		default:
			d.log.Warn("event dropped for a slow reader", "guest_id", id)
		}
	}
}

// Versions are libvirt's and the hypervisor's, as major.minor.release.
func (d *Driver) Versions(ctx context.Context) (libvirtVersion, hypervisor string, err error) {
	err = d.call(ctx, func(conn *libvirt.Connect) error {
		lib, err := conn.GetLibVersion()
		if err != nil {
			return err
		}
		hv, err := conn.GetVersion()
		if err != nil {
			return err
		}
		libvirtVersion, hypervisor = version(lib), version(hv)
		return nil
	})
	return libvirtVersion, hypervisor, err
}

func version(v uint32) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}

func free(dom *libvirt.Domain) { _ = dom.Free() }

func isCode(err error, code libvirt.ErrorNumber) bool {
	e, ok := errors.AsType[libvirt.Error](err)
	return ok && e.Code == code
}
