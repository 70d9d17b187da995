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
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"libvirt.org/go/libvirt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/domain"
)

const (
	// callTimeout bounds calls that only ask.
	callTimeout = 30 * time.Second
	// startTimeout bounds the creation of a domain: QEMU of an SNP guest with
	// much memory is ready only when all of it was made private.
	startTimeout = 10 * time.Minute
	// endTimeout bounds the end of a domain: libvirt waits up to a minute for
	// a QEMU that has to give back pinned memory.
	endTimeout = 2 * time.Minute
	// maxStuck bounds the threads a hung libvirtd can hold.
	maxStuck = 16
	// keepAlive is the interval in seconds, keepAliveCount the misses.
	keepAlive, keepAliveCount = 5, 3
	// reconnectMin and reconnectMax bound the back-off between attempts.
	reconnectMin, reconnectMax = 200 * time.Millisecond, 5 * time.Second
)

// ErrNoConnection means libvirtd cannot be reached, or was lost during the
// call: what the call did is not known.
var ErrNoConnection = errors.New("no connection to libvirtd")

// ErrStuck means that too many calls hang in libvirtd.
var ErrStuck = errors.New("libvirtd does not answer: too many calls hang")

// Driver is one connection to libvirtd.
type Driver struct {
	uri   string
	log   hclog.Logger
	slots chan struct{}
	// logs is where libvirt keeps what each domain's QEMU said.
	logs string

	mu          sync.Mutex
	conn        *connection
	lastErr     error
	connected   chan struct{} // closed while connected
	subscribers map[*subscriber]struct{}
}

// New returns a driver that connects once Run runs.
func New(uri string, logger hclog.Logger) *Driver {
	return &Driver{
		uri: uri, log: logger.Named("libvirt"), slots: make(chan struct{}, maxStuck), logs: domainLogs,
		connected: make(chan struct{}), subscribers: map[*subscriber]struct{}{},
	}
}

// Run keeps the connection up until ctx ends.
func (d *Driver) Run(ctx context.Context) error {
	loop, err := eventLoop()
	if err != nil {
		return err
	}
	wait := reconnectMin
	for ctx.Err() == nil {
		c, err := d.connect(ctx)
		if err != nil {
			d.noteFailure(err)
			select {
			case <-ctx.Done():
			case <-loop.ended:
				return loop.err
			case <-time.After(wait):
			}
			wait = min(2*wait, reconnectMax)
			continue
		}
		wait = reconnectMin
		d.log.Info("connected", "uri", d.uri)
		d.resync()
		select {
		case <-ctx.Done():
		case <-loop.ended:
			d.disconnect(c)
			return loop.err
		case <-c.closed:
			d.log.Warn("connection lost", "uri", d.uri)
		}
		d.disconnect(c)
	}
	return nil
}

// noteFailure logs the first of a series.
func (d *Driver) noteFailure(err error) {
	d.mu.Lock()
	first := d.lastErr == nil
	d.lastErr = err
	d.mu.Unlock()
	if first {
		d.log.Warn("libvirtd unreachable, trying again", "uri", d.uri, "err", err)
	}
}

func (d *Driver) connect(ctx context.Context) (*connection, error) {
	open := func() (*connection, error) { return dial(d.uri, d.onLifecycle, d.log) }
	// One that comes up after the deadline would deliver every event twice.
	c, err := bounded(ctx, d, callTimeout, open, (*connection).close)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", d.uri, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn, d.lastErr = c, nil
	close(d.connected)
	return c, nil
}

// disconnect gives the connection up at once, and closes it when the calls
// that still use it have returned.
func (d *Driver) disconnect(c *connection) {
	d.mu.Lock()
	d.conn, d.connected, d.lastErr = nil, make(chan struct{}), nil
	d.mu.Unlock()
	// Closing a connection to a dead daemon may hang as well.
	_, err := bounded(context.Background(), d, callTimeout, func() (struct{}, error) {
		c.inFlight.Wait()
		c.close()
		return struct{}{}, nil
	}, func(struct{}) {})
	if err != nil {
		d.log.Warn("closing connection", "uri", d.uri, "err", err)
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

// Start creates the domain and starts it. Started already with the same
// generation is success. An error that is no refusal leaves open whether the
// domain was started: list, or start again.
func (d *Driver) Start(ctx context.Context, spec vm.Spec) error {
	text, err := domain.Render(spec)
	if err != nil {
		return err
	}
	return d.start(ctx, spec.GuestID, spec.Generation, text, spec.Devices)
}

func (d *Driver) start(ctx context.Context, guestID string, generation uint64, text string, devices []vm.PCIDevice) error {
	_, err := call(ctx, d, startTimeout, func(conn *libvirt.Connect) (struct{}, error) {
		existing, err := conn.LookupDomainByUUIDString(guestID)
		if err == nil {
			defer free(existing)
			if err := runsAlready(existing, guestID, generation); err != nil {
				return struct{}{}, err
			}
			return struct{}{}, hasDevices(existing, guestID, devices)
		}
		if !isCode(err, libvirt.ERR_NO_DOMAIN) {
			return struct{}{}, fmt.Errorf("looking for guest %s: %w", guestID, err)
		}
		// Validation refuses elements that this libvirt would silently ignore.
		began := time.Now()
		created, err := conn.DomainCreateXML(text, libvirt.DOMAIN_START_VALIDATE)
		if err != nil {
			return struct{}{}, d.startError(guestID, began, err)
		}
		defer free(created)
		return struct{}{}, endUnless(hasDevices(created, guestID, devices), created, guestID)
	})
	return err
}

// hasDevices reads the domain back: libvirt let through what was asked for,
// and nobody added to it.
func hasDevices(dom *libvirt.Domain, guestID string, devices []vm.PCIDevice) error {
	text, err := dom.GetXMLDesc(0)
	if err != nil {
		return fmt.Errorf("reading the domain of guest %s back: %w", guestID, err)
	}
	return domain.CheckDevices(text, devices)
}

// CheckDevices refuses with vm.devices-differ when a guest's domain has other
// devices of the host than these.
func (d *Driver) CheckDevices(ctx context.Context, guestID string, want []vm.PCIDevice) error {
	_, err := call(ctx, d, callTimeout, func(conn *libvirt.Connect) (struct{}, error) {
		dom, err := conn.LookupDomainByUUIDString(guestID)
		if err != nil {
			return struct{}{}, fmt.Errorf("looking for guest %s: %w", guestID, err)
		}
		defer free(dom)
		return struct{}{}, hasDevices(dom, guestID, want)
	})
	return err
}

// endUnless ends a domain that was created a moment ago with other devices: a
// refusal says that nothing runs. Where that fails the error is none.
func endUnless(err error, created *libvirt.Domain, guestID string) error {
	if _, refused := errors.AsType[*contract.Refusal](err); !refused {
		return err
	}
	if ended := created.Destroy(); ended != nil && !isCode(ended, libvirt.ERR_NO_DOMAIN) {
		return fmt.Errorf("ending guest %s, which has other devices (%s): %w", guestID, err.Error(), ended)
	}
	return err
}

// runsAlready compares a domain that has the guest's id.
func runsAlready(dom *libvirt.Domain, guestID string, generation uint64) error {
	observed, ours, err := observe(dom)
	switch {
	case err != nil:
		return fmt.Errorf("looking at guest %s: %w", guestID, err)
	case !ours || observed.Generation == 0:
		return contract.Refuse("vm.foreign-domain", "end or rename the domain with this UUID on the host, or launch under another guest id",
			"a domain that is not the agent's has the id %s", guestID)
	case observed.Generation != generation:
		return contract.Refuse("vm.generation-conflict", "stop the running generation first",
			"guest %s runs already with generation %d, not %d", guestID, observed.Generation, generation)
	}
	return nil
}

// Shutdown asks the guest to end by itself (ACPI power button).
func (d *Driver) Shutdown(ctx context.Context, guestID string) error {
	return d.end(ctx, guestID, (*libvirt.Domain).Shutdown)
}

// Destroy ends the guest at once. Gone already is success. Subscribers learn
// of it from here as well: a libvirtd that was restarted a moment ago was seen
// to answer and never send the event. They may hear of one end twice.
func (d *Driver) Destroy(ctx context.Context, guestID string) error {
	err := d.end(ctx, guestID, (*libvirt.Domain).Destroy)
	if isCode(err, libvirt.ERR_OPERATION_TIMEOUT) {
		return stuck(ctx, pidDir, guestID, err)
	}
	if err != nil {
		return err
	}
	d.publish(vm.Event{GuestID: guestID, State: vm.StateGone, Reason: "destroyed by the agent", At: time.Now()})
	return nil
}

// end runs f on our domain of that id. No such domain, or one that ends
// meanwhile, is success; a foreign domain with that id is left alone.
func (d *Driver) end(ctx context.Context, guestID string, f func(*libvirt.Domain) error) error {
	_, err := call(ctx, d, endTimeout, func(conn *libvirt.Connect) (struct{}, error) {
		dom, err := conn.LookupDomainByUUIDString(guestID)
		if err != nil {
			return struct{}{}, err
		}
		defer free(dom)
		observed, ours, err := observe(dom)
		if err != nil {
			return struct{}{}, err
		}
		if !ours || observed.Generation == 0 {
			return struct{}{}, contract.Refuse("vm.foreign-domain", "end it on the host with virsh if it should not run",
				"domain %s does not carry the agent's mark and is left alone", guestID)
		}
		return struct{}{}, f(dom)
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
	found, err := call(ctx, d, callTimeout, func(conn *libvirt.Connect) ([]vm.Observed, error) {
		doms, err := conn.ListAllDomains(0)
		if err != nil {
			return nil, err
		}
		for i := range doms {
			defer free(&doms[i])
		}
		found := []vm.Observed{}
		for i := range doms {
			observed, ours, err := observe(&doms[i])
			switch {
			case isCode(err, libvirt.ERR_NO_DOMAIN): // ended meanwhile
			case err != nil:
				return nil, err
			case ours:
				found = append(found, observed)
			}
		}
		return found, nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing guests: %w", err)
	}
	return found, nil
}

// Versions are libvirt's and the hypervisor's, as major.minor.release.
func (d *Driver) Versions(ctx context.Context) (libvirtVersion, hypervisor string, err error) {
	versions, err := call(ctx, d, callTimeout, func(conn *libvirt.Connect) ([2]uint32, error) {
		lib, err := conn.GetLibVersion()
		if err != nil {
			return [2]uint32{}, err
		}
		hv, err := conn.GetVersion()
		return [2]uint32{lib, hv}, err
	})
	if err != nil {
		return "", "", fmt.Errorf("asking libvirt for versions: %w", err)
	}
	return version(versions[0]), version(versions[1]), nil
}

// Probe connects once to ask for the versions.
func Probe(ctx context.Context, uri string, logger hclog.Logger) (libvirtVersion, hypervisor string, err error) {
	if _, err := eventLoop(); err != nil {
		return "", "", err
	}
	d := New(uri, logger)
	c, err := d.connect(ctx)
	if err != nil {
		return "", "", err
	}
	defer d.disconnect(c)
	return d.Versions(ctx)
}

func version(v uint32) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}
