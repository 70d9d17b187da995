package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/durable"
)

// Entry is one complete file of a spool.
type Entry struct {
	Name   string
	SHA256 [32]byte
	Size   int64
}

// SpoolConfig says how results are taken and sent.
type SpoolConfig struct {
	// MaxBytes bounds the files of all spools together.
	MaxBytes int64
	// Parts sent at a time for one guest; 0 means 8. Nobody's upload waits for
	// another guest's.
	Parts int
	// CheckHeader refuses what is not sealed; it sees the start of a result.
	CheckHeader func(io.Reader) error
	// Stall is how long 64 KiB may take to go; 0 means 30 seconds.
	Stall time.Duration
	// Space says what is free under a path; nil asks the file system.
	Space func(path string) (bytes, inodes uint64, err error)
	// Clock says whether a URL has expired; time.Now when nil.
	Clock func() time.Time
}

// Spools is the folder that holds every guest's spool.
type Spools struct {
	dir    string
	cfg    SpoolConfig
	client *http.Client
	log    hclog.Logger
	budget *budget
}

// OpenSpools opens or makes the folder, 0700. What was cut off while it was
// received is removed.
func OpenSpools(dir string, cfg SpoolConfig, client *http.Client, logger hclog.Logger) (*Spools, error) {
	if cfg.CheckHeader == nil || cfg.MaxBytes <= 0 {
		return nil, errors.New("opening spools: CheckHeader and MaxBytes are required")
	}
	if cfg.Parts == 0 {
		cfg.Parts = 8
	}
	if cfg.Stall == 0 {
		cfg.Stall = stallTimeout
	}
	if cfg.Space == nil {
		cfg.Space = space
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making spools: %w", err)
	}
	s := &Spools{dir: dir, cfg: cfg, client: client, log: logger.Named("spool"), budget: &budget{max: cfg.MaxBytes}}
	ids, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		used, err := swept(filepath.Join(dir, id))
		if err != nil {
			return nil, fmt.Errorf("reading spool: %w", err)
		}
		s.budget.used += used
	}
	return s, nil
}

// Spool takes what one guest delivers.
type Spool struct {
	s     *Spools
	dir   string
	most  map[string]int64
	quota int64

	mu sync.Mutex // one result at a time: the quota is for all together
	// deliveries were begun, and had so many bytes.
	deliveries int
	received   int64
}

// A guest delivers each file once, and again after an error. One that never
// ends to deliver wears out the disk.
const (
	maxDeliveries = 16 // per file, on the average
	maxReceived   = 4  // times the quota
)

// Open makes a guest's spool for files of these names, each with its most
// bytes, quota bytes together, or opens the one that is there.
func (s *Spools) Open(guestID string, most map[string]int64, quota int64) (*Spool, error) {
	if !contract.ValidFileName(guestID) {
		return nil, fmt.Errorf("opening spool: guest id %q is malformed", guestID)
	}
	dir := filepath.Join(s.dir, guestID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, diskError(fmt.Errorf("making spool: %w", err))
	}
	return &Spool{s: s, dir: dir, most: most, quota: quota}, nil
}

// Remove removes a guest's spool. None is no error.
func (s *Spools) Remove(guestID string) error {
	if !contract.ValidFileName(guestID) {
		return fmt.Errorf("removing spool: guest id %q is malformed", guestID)
	}
	dir := filepath.Join(s.dir, guestID)
	used, err := swept(dir)
	if err != nil {
		return fmt.Errorf("removing spool: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing spool: %w", err)
	}
	s.budget.giveBack(used)
	return nil
}

// List returns the guests that have a spool.
func (s *Spools) List() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing spools: %w", err)
	}
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids, nil
}

// partialSuffix marks a file that is being received. Names of results start
// with no dot, so none can be taken for one.
const partialSuffix = ".partial"

// Receive takes one file whole or not at all. The same name again replaces
// the file. Refused are names the spool is not for, more than the quota, and
// anything but the signed list that is not sealed.
func (s *Spool) Receive(_ context.Context, name string, r io.Reader) (entry Entry, err error) {
	most, known := s.most[name]
	if !known {
		return Entry{}, contract.Refuse("results.unknown-name", "name every result in the manifest", "the manifest has no result %q", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	room, err := s.room(name)
	if err != nil {
		return Entry{}, err
	}
	if name == contract.ResultsManifestName {
		most = min(most, contract.MaxResultManifestBytes)
	}
	if err := s.admit(); err != nil {
		return Entry{}, err
	}
	if name != contract.ResultsManifestName {
		if r, err = sealedHead(r, s.s.cfg.CheckHeader, contract.Refuse("results.not-sealed", "use a guest image that seals its results",
			"result %s is not sealed: plaintext is never handled", name)); err != nil {
			return Entry{}, fmt.Errorf("receiving result: %w", err)
		}
	}
	path := filepath.Join(s.dir, "."+name+partialSuffix)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return Entry{}, diskError(fmt.Errorf("receiving result: %w", err))
	}
	taken := &taking{s: s.s}
	defer func() {
		err = errors.Join(err, file.Close())
		if err != nil {
			err = errors.Join(err, removed(path))
			s.s.budget.giveBack(taken.n)
		}
	}()
	limit := min(room, most)
	sum, crc := sha256.New(), newCRC()
	size, err := io.CopyBuffer(io.MultiWriter(taken, file, sum, crc), io.LimitReader(r, limit+1), make([]byte, 256<<10))
	s.received += size
	if err != nil {
		return Entry{}, diskError(fmt.Errorf("receiving result: %w", err))
	}
	if size > most {
		return Entry{}, contract.Refuse("results.too-large", "make the result smaller, or launch with an upload grant in parts for it",
			"result %s has more bytes than its upload can carry: %d", name, most)
	}
	if size > limit {
		return Entry{}, contract.Refuse("results.quota", "make the results smaller, or ask for a larger quota", "the results are larger than %d bytes", s.quota)
	}
	if err := file.Sync(); err != nil {
		return Entry{}, diskError(fmt.Errorf("receiving result: %w", err))
	}
	replaced, err := sizeOf(filepath.Join(s.dir, name))
	if err != nil {
		return Entry{}, fmt.Errorf("receiving result: %w", err)
	}
	if err := errors.Join(forgetSums(s.dir, name), os.Rename(path, filepath.Join(s.dir, name))); err != nil {
		return Entry{}, fmt.Errorf("receiving result: %w", err)
	}
	taken.n = 0 // now the file's
	s.s.budget.giveBack(replaced)
	entry = Entry{name, [32]byte(sum.Sum(nil)), size}
	return entry, errors.Join(keepSums(s.dir, name, sumsOf(entry, crc)), durable.SyncDir(s.dir))
}

// admit refuses what is one delivery too many, and a disk that is full.
func (s *Spool) admit() error {
	if s.deliveries >= maxDeliveries*len(s.most) || s.received/maxReceived > s.quota {
		return contract.Refuse("results.too-often", "deliver each result once", "the guest has begun %d deliveries of %d bytes together", s.deliveries, s.received)
	}
	s.deliveries++
	return s.s.fits()
}

// room is how many bytes a file of this name may have.
func (s *Spool) room(name string) (int64, error) {
	room := s.quota
	for other := range s.most {
		info, err := os.Stat(filepath.Join(s.dir, other))
		if err == nil && other != name {
			room -= info.Size()
		} else if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, fmt.Errorf("reading spool: %w", err)
		}
	}
	return max(room, 0), nil
}

// Entries are the complete files. One that has lost its sums is hashed anew.
func (s *Spool) Entries() ([]Entry, error) {
	found, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading spool: %w", err)
	}
	var entries []Entry
	for _, e := range found {
		if _, known := s.most[e.Name()]; !known {
			continue
		}
		entry, err := digestOf(s.dir, e.Name())
		if err != nil {
			return nil, fmt.Errorf("reading spool: %w", err)
		}
		entries = append(entries, entry)
	}
	return entries, nil
}
