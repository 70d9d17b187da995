package keybroker

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/hsm"
)

// version is what this store's records have.
func (s *launchStore) version() int {
	if s.token == nil {
		return versionPlain
	}
	return versionWrapped
}

func wrongStore(id string, version int) *contract.Refusal {
	if version == versionWrapped {
		return contract.Refuse("broker.token-required", "give --token-library, --token, --token-pin-file and --token-key as before",
			"the resources of launch %s are wrapped by a key in a token", id)
	}
	return contract.Refuse("broker.store-not-migrated", "stop the broker and run keybroker token migrate",
		"the resources of launch %s are not wrapped by the token yet", id)
}

// binding is what a wrapped resource is bound to: it opens under its own name
// in its own launch only. Neither part can hold the separator.
func binding(launchID, name string) []byte {
	return []byte("keybroker resource v2\x00" + launchID + "\x00" + name)
}

// wrap takes the resources of a new record into the token, and wipes them.
// Without a token they stay as they are.
func (s *launchStore) wrap(r *record) error {
	r.Version = s.version()
	if s.token == nil {
		return nil
	}
	wrapped := make(map[string]*hsm.Wrapped, len(r.Launch.Resources))
	for name, value := range r.Launch.Resources {
		w, err := s.token.Wrap(value, binding(r.LaunchID, name))
		if err != nil {
			return fmt.Errorf("wrapping resource %s: %w", name, err)
		}
		wrapped[name] = w
	}
	for _, value := range r.Launch.Resources {
		clear(value)
	}
	r.Launch.Resources, r.Wrapped = nil, wrapped
	return nil
}

// open returns a copy of a resource, which the caller wipes.
func (s *launchStore) open(r *record, name string) ([]byte, error) {
	if value, ok := r.Launch.Resources[name]; ok {
		return bytes.Clone(value), nil
	}
	w, ok := r.Wrapped[name]
	if !ok {
		return nil, resourceUnknown(name)
	}
	value, err := s.token.Unwrap(w, binding(r.LaunchID, name))
	if err != nil {
		return nil, fmt.Errorf("opening resource %s: %w", name, err)
	}
	return value, nil
}

// opens reports whether every resource can be given, before a release is
// counted: a token that is away must not cost the guest its only one.
func (s *launchStore) opens(r *record) error {
	for name := range r.Wrapped {
		value, err := s.open(r, name)
		if err != nil {
			return err
		}
		clear(value)
	}
	return nil
}

// resources are the names of what is registered, sorted; a record has them in
// one of its two maps.
func (r *record) resources() []string {
	return append(slices.Sorted(maps.Keys(r.Wrapped)), slices.Sorted(maps.Keys(r.Launch.Resources))...)
}

// Rewrapped is what Rewrap found and did.
type Rewrapped struct {
	Key               string // the newest, of every resource now
	Launches, Changed int
}

// Rewrap brings every resource under the token's newest key: those of a store
// without token, and those that older keys wrapped. One launch after another
// is replaced on disk, so that it can be interrupted at any point and run
// again; older keys are needed until it has ended. No broker may run on the
// folder meanwhile.
func Rewrap(stateDir string, token *hsm.Token) (out Rewrapped, err error) {
	unlock, err := lockState(stateDir)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if out.Key, err = token.Newest(); err != nil {
		return out, err
	}
	s, err := loadStore(filepath.Join(stateDir, "launches"), token)
	if err != nil {
		return out, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(s.records)) {
		out.Launches++
		changed, err := s.rewrapLocked(s.records[id], out.Key)
		if err != nil {
			return out, fmt.Errorf("rewrapping launch %s: %w", id, err)
		}
		if changed {
			out.Changed++
		}
	}
	return out, s.sweepLocked()
}

func (s *launchStore) rewrapLocked(r *record, newest string) (bool, error) {
	stale := func(w *hsm.Wrapped) bool { return w.Key != newest }
	if r.Version == versionWrapped && !slices.ContainsFunc(slices.Collect(maps.Values(r.Wrapped)), stale) {
		return false, nil
	}
	next := *r
	next.Launch.Resources, next.Wrapped = map[string][]byte{}, nil
	for _, name := range r.resources() {
		value, err := s.open(r, name)
		if err != nil {
			return false, err
		}
		next.Launch.Resources[name] = value
	}
	if err := s.wrap(&next); err != nil {
		return false, err
	}
	return true, s.saveLocked(&next)
}

// sweepLocked removes what interrupted writes left: it may hold resources as
// they were before.
func (s *launchStore) sweepLocked() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("reading launch folder: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && e.Type().IsRegular() {
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
				return fmt.Errorf("removing an interrupted write: %w", err)
			}
		}
	}
	return s.sync()
}

// lockState makes this process the only one that counts releases in a folder.
// The lock ends with the process.
func lockState(dir string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating state folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		refused := contract.Refuse("broker.state-in-use", "stop the broker or the command that uses the state folder", "another process uses the state folder").Because(err)
		return nil, errors.Join(refused, f.Close())
	}
	return f.Close, nil
}
