package lifecycle

import (
	"context"
	"sync"
	"time"

	"github.com/confidential-node/agent/nodeagent/supervise"
	"github.com/confidential-node/agent/vm"
)

// domains asks the hypervisor what there is. Callers at the same time share
// one answer, but never one that was asked for before they called.
type domains struct {
	ask func(context.Context) ([]vm.Observed, error)

	mu sync.Mutex
	// next is the question not asked yet; busy is held while one is asked.
	next *question
	busy sync.Mutex
}

// askTimeout bounds one question.
const askTimeout = time.Minute

type question struct {
	done    chan struct{}
	domains []vm.Observed
	err     error
}

// list returns all domains of ours. An error means that nothing is known.
func (d *domains) list(ctx context.Context) ([]vm.Observed, error) {
	d.mu.Lock()
	q := d.next
	first := q == nil
	if first {
		q = &question{done: make(chan struct{})}
		d.next = q
	}
	d.mu.Unlock()
	if first {
		// Whoever asks must not take the others' answer away by giving up.
		go d.put(context.WithoutCancel(ctx), q)
	}
	select {
	case <-q.done:
		return q.domains, q.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// put asks once the question before is answered; later callers join until then.
func (d *domains) put(ctx context.Context, q *question) {
	d.busy.Lock()
	defer d.busy.Unlock()
	d.mu.Lock()
	d.next = nil
	d.mu.Unlock()
	defer close(q.done)
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	q.err = supervise.Call(ctx, func(ctx context.Context) (err error) {
		q.domains, err = d.ask(ctx)
		return err
	})
}

// see waits until the hypervisor says something of a guest.
func (g *guest) see(ctx context.Context) (sight, error) {
	for wait := g.m.c.Retry; ; wait = min(2*wait, 30*g.m.c.Retry) {
		if domain, _ := g.look(ctx); domain != sightUnknown {
			return domain, nil
		}
		if err := g.m.pause(ctx, nil, wait); err != nil {
			return sightUnknown, err
		}
	}
}

// look says what the hypervisor says of a guest.
func (g *guest) look(ctx context.Context) (s sight, crashed bool) {
	all, err := g.m.domains.list(ctx)
	if err != nil {
		if ctx.Err() == nil {
			g.m.log.Debug("hypervisor silent", keyGuest, g.id, keyError, err)
		}
		return sightUnknown, false
	}
	for _, o := range all {
		if o.GuestID != g.id {
			continue
		}
		if o.Generation != g.record().Generation {
			return sightOther, false
		}
		return sightOurs, o.State == vm.StateCrashed
	}
	return sightAbsent, false
}
