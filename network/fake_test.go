package network

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"sigs.k8s.io/knftables"
)

// kernel is a host that obeys the rules Host relies on: a tap has to exist
// before it can come up or be named in an ingress chain, addresses go with the
// tap, and writing a table replaces it. It notes every effect in order.
type kernel struct {
	mu      sync.Mutex
	taps    map[string]Tap
	text    string // our table; "" when there is none
	effects []string
	fail    map[string]error // by the first word of an effect
	forward bool
	rules   string // JSON ruleset
	// ephemeralFrom is the first port that the kernel gives away.
	ephemeralFrom uint16
	heard         chan struct{}
	closed        chan struct{}
}

func newKernel() *kernel {
	return &kernel{
		ephemeralFrom: 32768,
		taps:          map[string]Tap{}, fail: map[string]error{}, rules: `{"nftables":[]}`,
		heard: make(chan struct{}, 16), closed: make(chan struct{}),
	}
}

func (k *kernel) note(verb, object string) error {
	k.effects = append(k.effects, verb+" "+object)
	return k.fail[verb]
}

func (k *kernel) list() ([]Tap, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Collect(maps.Values(k.taps)), k.fail["list"]
}

func (k *kernel) ensure(g Guest, l Link) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.taps[l.Tap]; ok {
		return false, nil
	}
	if err := k.note("make", l.Tap); err != nil {
		return false, err
	}
	k.taps[l.Tap] = Tap{Name: l.Tap, GuestID: g.ID}
	return true, nil
}

func (k *kernel) set(verb, tap string, up bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	t, ok := k.taps[tap]
	if !ok && up {
		return fmt.Errorf("bringing up %s: no such link", tap)
	}
	if ok && t.Up == up {
		return nil
	}
	if err := k.note(verb, tap); err != nil || !ok {
		return err
	}
	t.Up = up
	k.taps[tap] = t
	return nil
}

func (k *kernel) up(l Link) error       { return k.set("up", l.Tap, true) }
func (k *kernel) down(tap string) error { return k.set("down", tap, false) }

func (k *kernel) remove(tap string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.taps[tap]; !ok {
		return nil
	}
	if err := k.note("remove", tap); err != nil {
		return err
	}
	delete(k.taps, tap)
	return nil
}

func (k *kernel) forget(addr netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.note("forget", addr.String())
}

func (k *kernel) listening() (map[uint16]bool, error) { return map[uint16]bool{}, nil }

func (k *kernel) ephemeral() (func(uint16) bool, error) {
	return func(port uint16) bool { return port >= k.ephemeralFrom }, nil
}

func (k *kernel) forwarding() (bool, error) { return k.forward, nil }

func (k *kernel) setForwarding(on bool) error {
	k.forward = on
	return nil
}

func (k *kernel) changes() (notifier, error) { return k, nil }

func (k *kernel) wait() error {
	select {
	case <-k.heard:
		return nil
	case <-k.closed:
		return os.ErrClosed
	}
}

func (k *kernel) Close() error {
	close(k.closed)
	return nil
}

func (k *kernel) write(ctx context.Context, t table) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var taps []string
	for _, c := range t.chains {
		if strings.HasPrefix(c.device, wirePrefix) {
			continue
		}
		if _, ok := k.taps[c.device]; c.device != "" && !ok {
			return fmt.Errorf("chain %s: no such device", c.name)
		}
		if c.device != "" {
			taps = append(taps, c.device)
		}
	}
	if err := k.note("write", strings.Join(taps, ",")); err != nil {
		return err
	}
	fake := knftables.NewFake("", "")
	tx := fake.NewTransaction()
	t.fill(tx)
	if err := fake.Run(ctx, tx); err != nil {
		return err
	}
	k.text = fake.Dump()
	return nil
}

func (k *kernel) read(context.Context) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.text == "" {
		return "", errTableMissing
	}
	return k.text, k.fail["read"]
}

func (k *kernel) erase(context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.text = ""
	return k.note("erase", "table")
}

func (k *kernel) ruleset(context.Context) ([]byte, error) { return []byte(k.rules), nil }

func (k *kernel) legacyFindings(context.Context) ([]Finding, error) { return nil, nil }

// flush is somebody else's `nft flush ruleset`.
func (k *kernel) flush() {
	k.mu.Lock()
	k.text = ""
	k.mu.Unlock()
	k.heard <- struct{}{}
}

// take returns the effects since the last call.
// appears puts a table into the kernel as somebody else does.
func (k *kernel) appears(text string) {
	k.mu.Lock()
	k.text = text
	k.mu.Unlock()
	k.heard <- struct{}{}
}

func (k *kernel) take() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := k.effects
	k.effects = nil
	return out
}

func (k *kernel) setFail(verb string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail[verb] = err
}

func (k *kernel) snapshot() map[string]Tap {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.taps)
}

func (k *kernel) isUp() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.taps["nt00000001"].Up
}

func (k *kernel) table() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.text
}
