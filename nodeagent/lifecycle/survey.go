package lifecycle

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/confidential-node/agent/vm"
)

// surveyEvery is how often domains are compared with guests although no event
// came.
const surveyEvery = time.Minute

// strangers are domains of ours that no guest accounts for. A guest that
// begins or ends while the hypervisor is asked is none.
func (m *Manager) strangers(ctx context.Context) (observed, strangers []vm.Observed, err error) {
	ids := map[string]bool{}
	note := func() {
		for _, g := range m.live() {
			ids[g.id] = true
		}
	}
	note()
	observed, err = m.domains.list(ctx)
	note()
	return observed, slices.DeleteFunc(slices.Clone(observed), func(o vm.Observed) bool { return ids[o.GuestID] }), err
}

// report notes the strangers, logs those that are new, and says whether one of
// the old ones is gone.
func (m *Manager) report(strangers []vm.Observed) (gone bool) {
	among := func(all []vm.Observed, o vm.Observed) bool {
		return slices.ContainsFunc(all, func(x vm.Observed) bool { return x.GuestID == o.GuestID })
	}
	m.mu.Lock()
	before := m.unaccounted
	m.unaccounted = strangers
	m.mu.Unlock()
	for _, o := range strangers {
		if !among(before, o) {
			m.log.Warn("a domain of ours has no record; it is left alone: end it by hand (virsh) if it is not wanted", keyGuest, o.GuestID, "generation", o.Generation, "state", string(o.State))
		}
	}
	return slices.ContainsFunc(before, func(o vm.Observed) bool { return !among(strangers, o) })
}

// survey looks for domains that nobody accounts for: from before the store was
// lost, or begun by a hypervisor that had been silent. What belonged to one is
// removed when the domain is gone.
func (m *Manager) survey(ctx context.Context) error {
	for due := true; ; {
		m.turned()
		if observed, strangers, err := m.strangers(ctx); err == nil {
			due = m.report(strangers) || due
			if due {
				if err := m.sweep(ctx, observed); err != nil {
					return err
				}
				due = false
			}
			m.returnForwarding()
		}
		if err := m.pause(ctx, m.changed, surveyEvery); err != nil {
			return err
		}
	}
}

// sweep removes what neither a guest nor a domain that was observed accounts
// for.
func (m *Manager) sweep(ctx context.Context, observed []vm.Observed) error {
	select {
	case m.admission <- struct{}{}:
		defer func() { <-m.admission }()
	case <-ctx.Done():
		return ctx.Err()
	}
	keep := map[string]bool{}
	for _, o := range observed {
		keep[o.GuestID] = true
	}
	for _, g := range m.live() {
		keep[g.id] = true
	}
	errs := []error{m.d.Network.Sweep(ctx, keep)}
	each := func(ids []string, err error, remove func(string) error) {
		errs = append(errs, err)
		for _, id := range ids {
			if !keep[id] {
				m.log.Info("left-over removed", keyGuest, id)
				errs = append(errs, remove(id))
			}
		}
	}
	owners, err := m.d.Blobs.Owners()
	each(owners, err, m.d.Blobs.Release)
	spools, err := m.d.Spools.List()
	each(spools, err, m.d.Spools.Remove)
	if m.d.GPUs != nil {
		each(m.d.GPUs.Guests(), nil, m.d.GPUs.Abandon)
	}
	entries, err := os.ReadDir(m.c.GuestsDir)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	dirs := make([]string, 0, len(entries))
	for _, e := range entries {
		dirs = append(dirs, e.Name())
	}
	each(dirs, err, func(id string) error { return os.RemoveAll((&guest{m: m, id: id}).dir()) })
	return errors.Join(errs...)
}
