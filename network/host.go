package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/time/rate"

	"github.com/confidential-node/agent/firmware/contract"
)

// undoTimeout is what cleaning up may take when the caller has given up.
const undoTimeout = 30 * time.Second

// links is what Host needs of the host's links; kernelLinks is the real one.
type links interface {
	list() ([]Tap, error)
	ensure(g Guest, l Link) (made bool, err error)
	up(l Link) error
	down(tap string) error
	remove(tap string) error
	forget(addr netip.Addr) error
	forwarding() (bool, error)
	setForwarding(on bool) error
	changes() (notifier, error)
	listening() (map[uint16]bool, error)
	ephemeral() (given func(port uint16) bool, err error)
}

// notifier tells when nftables changed. Close ends a wait.
type notifier interface {
	wait() error
	Close() error
}

// filter is what Host needs of nftables; nft is the real one.
type filter interface {
	write(ctx context.Context, t table) error
	read(ctx context.Context) (string, error)
	erase(ctx context.Context) error
	ruleset(ctx context.Context) ([]byte, error)
	legacyFindings(ctx context.Context) ([]Finding, error)
}

// Host is the guests' network on this host.
type Host struct {
	cfg      Config
	log      hclog.Logger
	links    links
	filter   filter
	portFree func(ctx context.Context, port uint16) error
	// restores bounds how often the table is put back before somebody else
	// is taken to insist.
	restores *rate.Limiter

	mu     sync.Mutex
	guests map[string]member
	// written is the table's text as it was right after the last write; ""
	// when nothing was written by this process.
	written string
	// lost is why the table is not in force; nil when it is.
	lost error
}

// New checks the configuration. It changes nothing on the host.
func New(cfg Config, logger hclog.Logger) (*Host, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Root == "" {
		cfg.Root = "/"
	}
	return &Host{
		cfg: cfg, log: logger.Named("network"), links: kernelLinks{cfg.Root}, filter: &nft{table: cfg.table(), root: cfg.Root}, portFree: portFree,
		restores: rate.NewLimiter(rate.Every(3*time.Second), 20), guests: map[string]member{},
	}, nil
}

// portFree fails when a process of the host listens on the port: publishing
// it would take its connections away.
func portFree(ctx context.Context, port uint16) error {
	var cfg net.ListenConfig
	l, err := cfg.Listen(ctx, "tcp4", ":"+strconv.Itoa(int(port)))
	if err != nil {
		return err
	}
	return l.Close()
}

// Add gives a guest its network and returns when it is in force. Adding a
// guest that has it changes nothing and repairs what is missing; it also takes
// over the tap of a guest that an earlier run of the agent started. On error
// nothing new is left behind.
func (h *Host) Add(ctx context.Context, g Guest) error { return h.Adopt(ctx, []Guest{g}) }

// Adopt adds several guests at once. After a restart it should get all running
// guests in one call: taps of guests it does not know are cut off whenever the
// table is written. A guest that cannot be added is left out, the others are
// added all the same; the error joins what was wrong with each.
func (h *Host) Adopt(ctx context.Context, guests []Guest) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.guests
	next, made := maps.Clone(before), map[string]bool{}
	var taken, failed []member
	var errs []error
	for _, g := range guests {
		m, fresh, err := h.prepareLocked(ctx, g, next)
		if err != nil {
			errs = append(errs, fmt.Errorf("network of guest %s: %w", g.ID, err))
			continue
		}
		next[g.ID], made[g.ID] = m, fresh
		taken = append(taken, m)
	}
	h.guests = next
	if len(taken) > 0 {
		if err := h.writeLocked(ctx); err != nil {
			return errors.Join(append(errs, err, h.withdrawLocked(ctx, before, taken, made))...)
		}
	}
	for _, m := range taken {
		if err := h.links.up(m.link); err != nil {
			errs, failed = append(errs, fmt.Errorf("network of guest %s: %w", m.guest.ID, err)), append(failed, m)
			continue
		}
		h.log.Info("guest network in force", "guest_id", m.guest.ID, "tap", m.link.Tap, "published", len(m.guest.Ports))
	}
	if len(failed) > 0 || len(taken) == 0 {
		errs = append(errs, h.withdrawLocked(ctx, before, failed, made))
	}
	if len(failed) < len(taken) {
		errs = append(errs, h.regainLocked())
	}
	return errors.Join(errs...)
}

// prepareLocked checks one guest against the others and makes its links. On
// error none is left that was not there.
func (h *Host) prepareLocked(ctx context.Context, g Guest, others map[string]member) (m member, fresh bool, err error) {
	l, err := Describe(h.cfg, g)
	if err != nil {
		return m, false, err
	}
	if old, ok := others[g.ID]; ok && old.guest.Index != g.Index {
		return m, false, contract.Refuse("network.slot-changed", "stop the guest before it gets another slot",
			"guest %s has slot %d, not %d", g.ID, old.guest.Index, g.Index)
	}
	g.Ports, g.MAC = slices.Clone(g.Ports), slices.Clone(g.MAC)
	if err := conflict(g, others); err != nil {
		return m, false, err
	}
	fresh, err = h.links.ensure(g, l)
	if err != nil || !fresh {
		return member{g, l}, false, err
	}
	for _, p := range g.Ports {
		if portErr := h.portFree(ctx, p.Host); portErr != nil {
			err = fmt.Errorf("probing port: %w: %w", refusePort(p.Host, "a process of the host"), portErr)
		}
	}
	if err == nil {
		err = h.links.forget(l.GuestAddr.Addr())
	}
	if err != nil {
		return m, false, errors.Join(err, h.links.remove(l.Tap))
	}
	return member{g, l}, true, nil
}

// withdrawLocked puts guests back to what they were before, and the table.
func (h *Host) withdrawLocked(ctx context.Context, before map[string]member, failed []member, made map[string]bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	var errs []error
	for _, m := range slices.Backward(failed) {
		id := m.guest.ID
		if made[id] {
			errs = append(errs, h.links.remove(m.link.Tap))
		}
		delete(h.guests, id)
		if old, known := before[id]; known {
			h.guests[id] = old
		}
	}
	if len(h.guests) > 0 || h.written != "" {
		return errors.Join(append(errs, h.writeLocked(ctx))...)
	}
	// Taps of an earlier run are up. Its table may still be there; if it is
	// not, nothing holds them back.
	if _, err := h.filter.read(ctx); err != nil {
		errs = append(errs, h.loseLocked(err))
	}
	return errors.Join(errs...)
}

// writeLocked puts the planned table into the kernel and remembers its text.
func (h *Host) writeLocked(ctx context.Context) error {
	taps, err := h.links.list()
	if err != nil {
		return err
	}
	var strays []string
	// A chain on a missing device would make nft refuse the whole table.
	members := make(map[string]member, len(h.guests))
	for _, t := range taps {
		if m, known := h.guests[t.GuestID]; known && m.link.Tap == t.Name {
			members[t.GuestID] = m
		} else {
			strays = append(strays, t.Name)
		}
	}
	t := plan(h.cfg, members, strays)
	if err := h.filter.write(ctx, t); err != nil {
		return err
	}
	text, err := h.filter.read(ctx)
	if err != nil {
		return fmt.Errorf("reading back nft table: %w", err)
	}
	if n := strings.Count(text, ` comment "`); n != t.rules() {
		return fmt.Errorf("reading back nft table: %d rules in force, %d written", n, t.rules())
	}
	h.written = text
	return nil
}

// Remove takes a guest's network away. A guest that has none is removed.
func (h *Host) Remove(ctx context.Context, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.removeLocked(ctx, id)
}

func (h *Host) removeLocked(ctx context.Context, id string) error {
	taps, err := h.links.list()
	if err != nil {
		return err
	}
	m, known := h.guests[id]
	removed := false
	for _, t := range taps {
		if t.GuestID != id && (!known || t.Name != m.link.Tap) {
			continue
		}
		// Frames stop before rules go.
		if err := errors.Join(h.links.down(t.Name), h.links.remove(t.Name)); err != nil {
			return err
		}
		removed = true
		h.log.Info("guest network removed", "guest_id", id, "tap", t.Name)
	}
	switch {
	case !known && h.written == "":
		// The table is an earlier run's and may still publish the guest's
		// ports. While taps are left it is rewritten with their adoption.
		return h.eraseUnusedLocked(ctx)
	case !known && removed:
		return h.writeLocked(ctx)
	case !known:
		return nil
	}
	delete(h.guests, id)
	if err := h.writeLocked(ctx); err != nil {
		h.guests[id] = m
		return err
	}
	return h.links.forget(m.link.GuestAddr.Addr())
}

// Observe lists the taps that are ours, known guests' or not.
func (h *Host) Observe(ctx context.Context) ([]Tap, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return h.links.list()
}

// Sweep removes every tap of ours whose guest's id is not in keep, and half-made
// ones.
func (h *Host) Sweep(ctx context.Context, keep map[string]bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	taps, err := h.links.list()
	if err != nil {
		return err
	}
	var errs []error
	gone := map[string]bool{}
	for id := range h.guests {
		gone[id] = !keep[id]
	}
	for _, t := range taps {
		switch {
		case t.GuestID == "":
			errs = append(errs, h.links.remove(t.Name))
		case !keep[t.GuestID]:
			gone[t.GuestID] = true
		}
	}
	for id, out := range gone {
		if out {
			errs = append(errs, h.removeLocked(ctx, id))
		}
	}
	return errors.Join(errs...)
}

// Close removes the table if no tap of ours is left. With guests running it
// does nothing: they outlive the agent, and so do their rules.
func (h *Host) Close(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.eraseUnusedLocked(ctx)
}

func (h *Host) eraseUnusedLocked(ctx context.Context) error {
	taps, err := h.links.list()
	if err != nil || len(taps) > 0 {
		return err
	}
	if h.written == "" {
		if _, err := h.filter.read(ctx); errors.Is(err, errTableMissing) {
			return nil
		}
	}
	h.written = ""
	return h.filter.erase(ctx)
}

// HoldForwarding makes the host forward IPv4 (net.ipv4.ip_forward). Where it
// did not, a note in RunDir says so, before anything is changed: like the
// setting itself, it ends with the boot, and it outlives the agent and its
// state.
func (h *Host) HoldForwarding() error {
	on, err := h.links.forwarding()
	if err != nil || on {
		return err
	}
	if err := os.WriteFile(h.forwardingNote(), nil, 0o600); err != nil {
		return fmt.Errorf("noting that the host did not forward IPv4: %w", err)
	}
	h.log.Info("enabling IPv4 forwarding")
	return h.links.setForwarding(true)
}

// ReturnForwarding undoes HoldForwarding, of whichever run of the agent, when
// the last guest's network is gone for good.
func (h *Host) ReturnForwarding() error {
	if _, err := os.Stat(h.forwardingNote()); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("reading whether the host forwarded IPv4: %w", err)
	}
	if err := h.links.setForwarding(false); err != nil {
		return err
	}
	h.log.Info("IPv4 forwarding is off again")
	if err := os.Remove(h.forwardingNote()); err != nil {
		return fmt.Errorf("forgetting that the host did not forward IPv4: %w", err)
	}
	return nil
}

func (h *Host) forwardingNote() string { return filepath.Join(h.cfg.RunDir, "forwarding-was-off") }
