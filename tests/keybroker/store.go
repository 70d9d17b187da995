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
)

// recordVersion is the version of a launch's file.
const recordVersion = 1

// keptRefusals is how many refusals of a launch are kept. A host may cause
// refusals without end; the tenant needs the latest.
const keptRefusals = 32

// maxLaunches bounds the folder of one broker.
const maxLaunches = 4096

// record is one launch as it is on disk. A record in memory is never changed:
// a new one is written and then put in its place.
type record struct {
	Version      int                        `json:"version"`
	LaunchID     string                     `json:"launch_id"`
	Launch       brokeradmin.Launch         `json:"launch"`
	Releases     []brokeradmin.Release      `json:"releases"`
	Refusals     []brokeradmin.RefusalEntry `json:"refusals"`
	RefusalCount int                        `json:"refusal_count"`
}

// launchStore holds the registered launches.
type launchStore struct {
	dir string

	mu      sync.Mutex
	records map[string]*record
}

func openStore(dir string) (*launchStore, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating launch folder: %w", err)
	}
	s := &launchStore{dir: dir, records: map[string]*record{}}
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
	if r.Version != recordVersion || r.LaunchID != id {
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
	if err := syncDir(s.dir); err != nil {
		return err
	}
	s.records[r.LaunchID] = r
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
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
	s.mu.Lock()
	defer s.mu.Unlock()
	next := &record{Version: recordVersion, LaunchID: id, Launch: *l}
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
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[id]
	if r == nil {
		return unknownLaunch(id)
	}
	next := *r
	next.Launch.Resources = maps.Clone(r.Launch.Resources)
	if value == nil {
		if _, ok := next.Launch.Resources[name]; !ok {
			return resourceUnknown(name)
		}
		delete(next.Launch.Resources, name)
	} else {
		if next.Launch.Resources == nil {
			next.Launch.Resources = map[string][]byte{}
		}
		next.Launch.Resources[name] = value
	}
	if refused := validateLaunch(id, &next.Launch); refused != nil {
		return refused
	}
	return s.saveLocked(&next)
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
	return syncDir(s.dir)
}

func (r *record) status() *brokeradmin.Status {
	host := contract.HostData(r.Launch.Manifest)
	return &brokeradmin.Status{
		LaunchID: r.LaunchID, HostData: hex.EncodeToString(host[:]),
		Releases: r.Releases, MaxReleases: maxReleases(&r.Launch),
		Refusals: r.Refusals, RefusalCount: r.RefusalCount,
		Resources: slices.Sorted(maps.Keys(r.Launch.Resources)),
	}
}

func maxReleases(l *brokeradmin.Launch) int { return max(l.Releases, 1) }

func validLaunchID(id string) bool {
	raw, err := hex.DecodeString(id)
	return err == nil && len(raw) == 16 && strings.ToLower(id) == id
}

// validateLaunch checks a registration before it is believed for ever after.
func validateLaunch(id string, l *brokeradmin.Launch) *contract.Refusal {
	bad := func(format string, args ...any) *contract.Refusal {
		return contract.Refuse("broker.registration-malformed", "correct the named field and register again", format, args...)
	}
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
	case len(l.Resources) > brokeradmin.MaxResources:
		return bad("resources: at most %d", brokeradmin.MaxResources)
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
	if err := l.AppraisalPolicy.Demand(&snp.AppraisalPolicy{}); err != nil {
		return bad("appraisal_policy: %v", err)
	}
	for name, value := range l.Resources {
		if _, err := contract.ParseResource("kbs:///" + name); err != nil {
			return bad("resources: %.400q is not repository/type/tag", name)
		}
		if len(value) == 0 || len(value) > brokeradmin.MaxResourceBytes {
			return bad("resources: %s has %d bytes, need 1 to %d", name, len(value), brokeradmin.MaxResourceBytes)
		}
	}
	return nil
}
