package keybroker

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
	"github.com/confidential-node/agent/tests/keybroker/hsm"
)

// Versions of a launch's file.
const (
	versionPlain   = 1 // resources as they are
	versionWrapped = 2 // resources wrapped by a key in a token
)

// keptRefusals is how many refusals of a launch are kept. A host may cause
// refusals without end; the tenant needs the latest.
const keptRefusals = 32

// maxLaunches bounds the folder of one broker.
const maxLaunches = 4096

// record is one launch as it is on disk. A record in memory is never changed:
// a new one is written and then put in its place.
type record struct {
	Version  int    `json:"version"`
	LaunchID string `json:"launch_id"`
	// Launch has no resources in version 2: those are in Wrapped.
	Launch       brokeradmin.Launch         `json:"launch"`
	Wrapped      map[string]*hsm.Wrapped    `json:"wrapped,omitempty"`
	Releases     []brokeradmin.Release      `json:"releases"`
	Refusals     []brokeradmin.RefusalEntry `json:"refusals"`
	RefusalCount int                        `json:"refusal_count"`
}

// launchStore holds the registered launches.
type launchStore struct {
	dir   string
	token *hsm.Token // nil keeps resources as they are

	mu      sync.Mutex
	records map[string]*record
}

func openStore(dir string, token *hsm.Token) (*launchStore, error) {
	s, err := loadStore(dir, token)
	if err != nil {
		return nil, err
	}
	for id, r := range s.records {
		if r.Version != s.version() {
			return nil, wrongStore(id, r.Version)
		}
	}
	return s, nil
}

// loadStore reads records of either version.
func loadStore(dir string, token *hsm.Token) (*launchStore, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating launch folder: %w", err)
	}
	s := &launchStore{dir: dir, token: token, records: map[string]*record{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading launch folder: %w", err)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !validLaunchID(id) {
			continue // left over by an interrupted write
		}
		r, err := readRecord(filepath.Join(dir, e.Name()), id)
		if err != nil {
			return nil, err
		}
		s.records[id] = r
	}
	return s, nil
}

func readRecord(path, id string) (*record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading launch record: %w", err)
	}
	var r record
	if err := contract.UnmarshalStrict(data, 4*brokeradmin.MaxLaunchBytes, &r); err != nil {
		return nil, fmt.Errorf("reading launch record %s: %w", path, err)
	}
	plain := r.Version == versionPlain && r.Wrapped == nil
	wrapped := r.Version == versionWrapped && r.Launch.Resources == nil
	if (!plain && !wrapped) || r.LaunchID != id {
		return nil, fmt.Errorf("reading launch record %s: version %d of launch %q", path, r.Version, r.LaunchID)
	}
	return &r, nil
}

// saveLocked writes r and then makes it the current one.
func (s *launchStore) saveLocked(r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding launch record: %w", err)
	}
	path := filepath.Join(s.dir, r.LaunchID+".json")
	if err := renameio.WriteFile(path, data, 0o600, renameio.WithTempDir(s.dir)); err != nil {
		return fmt.Errorf("writing launch record: %w", err)
	}
	if err := s.sync(); err != nil {
		return err
	}
	s.records[r.LaunchID] = r
	return nil
}

// sync makes names in the launch folder last.
func (s *launchStore) sync() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return fmt.Errorf("opening launch folder: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

func unknownLaunch(id string) *contract.Refusal {
	return contract.Refuse("broker.launch-unknown", "let the tenant register the launch at this broker before it starts the guest",
		"launch %.32q is not registered here", id)
}

func (s *launchStore) get(id string) (*record, *contract.Refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[id]
	if r == nil {
		return nil, unknownLaunch(id)
	}
	return r, nil
}

// put registers a launch or replaces its policy and resources.
func (s *launchStore) put(id string, l *brokeradmin.Launch) error {
	if refused := validateLaunch(id, l); refused != nil {
		return refused
	}
	next := &record{LaunchID: id, Launch: *l}
	if err := s.wrap(next); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.records[id]; old != nil {
		if string(old.Launch.Manifest) != string(l.Manifest) {
			return contract.Refuse("broker.launch-conflict", "make a new launch_id for a new manifest",
				"launch %s is registered with another manifest", id)
		}
		next.Releases, next.Refusals, next.RefusalCount = old.Releases, old.Refusals, old.RefusalCount
	} else if len(s.records) >= maxLaunches {
		return contract.Refuse("broker.full", "delete launches that ended", "%d launches are registered, the limit", len(s.records))
	}
	return s.saveLocked(next)
}

// release counts one release of a launch that was judged by the record given.
// Only when it returns nil may keys be given.
func (s *launchStore) release(judged *record, entry brokeradmin.Release) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := judged.LaunchID
	r := s.records[id]
	if r == nil {
		return unknownLaunch(id)
	}
	// Every registration brings a description of its own, see putLaunch.
	if r.Launch.Image != judged.Launch.Image {
		return contract.Refuse("broker.policy-changed", sessionRemedy, "the tenant changed the policy of launch %s while the evidence was judged", id)
	}
	if allowed := maxReleases(&r.Launch); len(r.Releases) >= allowed {
		return contract.Refuse("broker.release-exhausted",
			"deploy again with a new launch, or let the tenant allow more releases if this boot is wanted",
			"the keys of launch %s were released %d time(s), the limit; this may be a second boot of the same job", id, len(r.Releases))
	}
	next := *r
	next.Releases = append(slices.Clone(r.Releases), entry)
	return s.saveLocked(&next)
}

// refuse keeps a refusal where the tenant sees it.
func (s *launchStore) refuse(id string, refusal *contract.Refusal, at time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[id]
	if r == nil {
		return nil
	}
	next := *r
	public := contract.Refusal{Code: refusal.Code, Message: refusal.Message, Remedy: refusal.Remedy}
	next.Refusals = append(slices.Clone(r.Refusals), brokeradmin.RefusalEntry{At: at.UTC(), Refusal: public})
	if extra := len(next.Refusals) - keptRefusals; extra > 0 {
		next.Refusals = slices.Delete(next.Refusals, 0, extra)
	}
	next.RefusalCount++
	return s.saveLocked(&next)
}

func (s *launchStore) setResource(id, name string, value []byte) error {
	if refused := validateResource(name, value); refused != nil {
		return refused
	}
	given := &record{LaunchID: id, Launch: brokeradmin.Launch{Resources: map[string][]byte{name: value}}}
	if err := s.wrap(given); err != nil {
		return err
	}
	return s.changeResources(id, func(next *record) *contract.Refusal {
		put(&next.Launch.Resources, given.Launch.Resources)
		put(&next.Wrapped, given.Wrapped)
		return validateCount(len(next.resources()))
	})
}

func (s *launchStore) withdrawResource(id, name string) error {
	return s.changeResources(id, func(next *record) *contract.Refusal {
		if !slices.Contains(next.resources(), name) {
			return resourceUnknown(name)
		}
		delete(next.Launch.Resources, name)
		delete(next.Wrapped, name)
		return nil
	})
}

// changeResources changes a copy of a record and makes it the current one.
func (s *launchStore) changeResources(id string, change func(*record) *contract.Refusal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[id]
	if r == nil {
		return unknownLaunch(id)
	}
	next := *r
	next.Launch.Resources, next.Wrapped = maps.Clone(r.Launch.Resources), maps.Clone(r.Wrapped)
	if refused := change(&next); refused != nil {
		return refused
	}
	return s.saveLocked(&next)
}

func put[V any](to *map[string]V, from map[string]V) {
	if *to == nil && from != nil {
		*to = map[string]V{}
	}
	maps.Copy(*to, from)
}

func (s *launchStore) remove(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.records[id] == nil {
		return unknownLaunch(id)
	}
	if err := os.Remove(filepath.Join(s.dir, id+".json")); err != nil {
		return fmt.Errorf("removing launch record: %w", err)
	}
	delete(s.records, id)
	return s.sync()
}

func (r *record) status() *brokeradmin.Status {
	host := contract.HostData(r.Launch.Manifest)
	return &brokeradmin.Status{
		LaunchID: r.LaunchID, HostData: hex.EncodeToString(host[:]),
		Releases: r.Releases, MaxReleases: maxReleases(&r.Launch),
		Refusals: r.Refusals, RefusalCount: r.RefusalCount,
		Resources: r.resources(),
	}
}

func maxReleases(l *brokeradmin.Launch) int { return max(l.Releases, 1) }

func validLaunchID(id string) bool {
	raw, err := hex.DecodeString(id)
	return err == nil && len(raw) == 16 && strings.ToLower(id) == id
}

// validateLaunch checks a registration before it is believed for ever after.
func validateLaunch(id string, l *brokeradmin.Launch) *contract.Refusal {
	bad := badRegistration
	m, err := contract.ParseManifest(l.Manifest)
	switch {
	case err != nil:
		return bad("the manifest is not a valid canonical manifest: %v", err)
	case m.LaunchID != id:
		return bad("the manifest's launch_id is %q, the path says %.32q", m.LaunchID, id)
	case l.Image == nil:
		return bad("image: the tenant's copy of image.json is required")
	case len(l.LaunchDigests) == 0 || len(l.LaunchDigests) > 16:
		return bad("launch_digests: need 1 to 16")
	case l.Releases < 0 || l.Releases > brokeradmin.MaxReleases:
		return bad("releases: need 0 to %d", brokeradmin.MaxReleases)
	}
	raw, err := json.Marshal(l.Image)
	if err != nil {
		return bad("image: %v", err)
	}
	if _, err := contract.ParseImageDescription(raw); err != nil {
		return bad("image: %v", err)
	}
	for _, d := range l.LaunchDigests {
		if raw, err := hex.DecodeString(d); err != nil || len(raw) != 48 {
			return bad("launch_digests: %.100q is not 96 hex digits", d)
		}
	}
	for _, c := range l.ChipIDs {
		if raw, err := hex.DecodeString(c); err != nil || len(raw) != 64 {
			return bad("chip_ids: %.140q is not 128 hex digits", c)
		}
	}
	if refused := validateGPUs(m.GPU, l.GPUPDIs); refused != nil {
		return refused
	}
	if err := l.AppraisalPolicy.Demand(&snp.AppraisalPolicy{}); err != nil {
		return bad("appraisal_policy: %v", err)
	}
	for name, value := range l.Resources {
		if refused := validateResource(name, value); refused != nil {
			return refused
		}
	}
	return validateCount(len(l.Resources))
}

func badRegistration(format string, args ...any) *contract.Refusal {
	return contract.Refuse("broker.registration-malformed", "correct the named field and register again", format, args...)
}

func validateResource(name string, value []byte) *contract.Refusal {
	if _, err := contract.ParseResource("kbs:///" + name); err != nil {
		return badRegistration("resources: %.400q is not repository/type/tag", name)
	}
	if len(value) == 0 || len(value) > brokeradmin.MaxResourceBytes {
		return badRegistration("resources: %s has %d bytes, need 1 to %d", name, len(value), brokeradmin.MaxResourceBytes)
	}
	return nil
}

func validateCount(resources int) *contract.Refusal {
	if resources > brokeradmin.MaxResources {
		return badRegistration("resources: at most %d", brokeradmin.MaxResources)
	}
	return nil
}
