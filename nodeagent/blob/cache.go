package blob

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
)

// Config of a Cache.
type Config struct {
	// MaxBytes bounds complete and partial blobs together.
	MaxBytes int64
	// Parts fetched at a time for one blob; 0 means 8.
	Parts int
	// PartSize in bytes; 0 means 8 MiB.
	PartSize int64
	// CheckHeader refuses what is not sealed; it sees the start of the blob.
	CheckHeader func(io.Reader) error
	// Stall is how long no byte may come; 0 means 30 seconds.
	Stall time.Duration
}

// Ref is a blob and where to get it.
type Ref struct {
	SHA256 [32]byte
	Size   int64
	// URL is a credential.
	URL string
}

func (r Ref) name() string { return hex.EncodeToString(r.SHA256[:]) }

// Cache is a folder of blobs.
type Cache struct {
	dir    string
	cfg    Config
	client *http.Client
	log    hclog.Logger

	mu sync.Mutex
	// fetching has a lock per digest that somebody fetches.
	fetching map[string]*turn
	// reserved bytes of fetches that run.
	reserved int64
}

type turn struct {
	ch    chan struct{} // holds one token
	users int
}

// Open opens or makes the cache in dir.
func Open(dir string, cfg Config, client *http.Client, logger hclog.Logger) (*Cache, error) {
	if cfg.CheckHeader == nil || cfg.MaxBytes <= 0 {
		return nil, errors.New("opening blob cache: CheckHeader and MaxBytes are required")
	}
	if cfg.Parts == 0 {
		cfg.Parts = 8
	}
	if cfg.PartSize == 0 {
		cfg.PartSize = 8 << 20
	}
	if cfg.Stall == 0 {
		cfg.Stall = stallTimeout
	}
	c := &Cache{dir: dir, cfg: cfg, client: client, log: logger.Named("blob"), fetching: map[string]*turn{}}
	for _, sub := range []string{"", "blobs", "partial", "owners"} {
		// QEMU runs as another user and opens blobs by their names.
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o711); err != nil {
			return nil, fmt.Errorf("making blob cache: %w", err)
		}
	}
	return c, nil
}

func (c *Cache) final(name string) string   { return filepath.Join(c.dir, "blobs", name) }
func (c *Cache) partial(name string) string { return filepath.Join(c.dir, "partial", name) }

// Fetch returns the path of a complete blob, fetching it when it is not there.
// The owner keeps it until Release. progress may be nil; it is called with the
// bytes that are there.
func (c *Cache) Fetch(ctx context.Context, ref Ref, owner string, progress func(done, total int64)) (string, error) {
	if !contract.ValidFileName(owner) || ref.Size <= 0 {
		return "", fmt.Errorf("fetching blob: owner %q or size %d is malformed", owner, ref.Size)
	}
	name := ref.name()
	// The claim comes first: eviction never takes what somebody claims.
	if err := c.claim(owner, name); err != nil {
		return "", err
	}
	release, err := c.wait(ctx, name)
	if err != nil {
		return "", err
	}
	defer release()
	info, err := os.Stat(c.final(name))
	switch {
	case err == nil && info.Size() == ref.Size:
		now := time.Now()
		return c.final(name), os.Chtimes(c.final(name), now, now)
	case err == nil:
		return "", contract.Refuse("blob.size-mismatch", "correct the size in the manifest", "blob %s has %d bytes, not %d", name, info.Size(), ref.Size)
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("looking for blob: %w", err)
	}
	giveBack, err := c.reserve(ref.Size)
	if err != nil {
		return "", err
	}
	defer giveBack()
	if progress == nil {
		progress = func(int64, int64) {}
	}
	if err := c.fetch(ctx, ref, progress); err != nil {
		return "", diskError(err)
	}
	return c.final(name), nil
}

// wait lets one fetcher per digest through.
func (c *Cache) wait(ctx context.Context, name string) (release func(), err error) {
	c.mu.Lock()
	t := c.fetching[name]
	if t == nil {
		t = &turn{ch: make(chan struct{}, 1)}
		c.fetching[name] = t
	}
	t.users++
	c.mu.Unlock()
	leave := func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(c.fetching, name)
		}
	}
	select {
	case t.ch <- struct{}{}:
		return func() { <-t.ch; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

func (c *Cache) claim(owner, name string) error {
	dir := filepath.Join(c.dir, "owners", owner)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return diskError(fmt.Errorf("claiming blob: %w", err))
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return diskError(fmt.Errorf("claiming blob: %w", err))
	}
	return f.Close()
}

// Release gives up everything an owner claimed.
func (c *Cache) Release(owner string) error {
	if !contract.ValidFileName(owner) {
		return fmt.Errorf("releasing blobs: owner %q is malformed", owner)
	}
	if err := os.RemoveAll(filepath.Join(c.dir, "owners", owner)); err != nil {
		return fmt.Errorf("releasing blobs: %w", err)
	}
	return nil
}

// Owners returns who claims something.
func (c *Cache) Owners() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(c.dir, "owners"))
	if err != nil {
		return nil, fmt.Errorf("listing owners of blobs: %w", err)
	}
	owners := make([]string, 0, len(entries))
	for _, e := range entries {
		owners = append(owners, e.Name())
	}
	return owners, nil
}

// reserve makes room for a blob, evicting what nobody claims, oldest first.
func (c *Cache) reserve(size int64) (giveBack func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	used, free, err := c.usage()
	if err != nil {
		return nil, err
	}
	for _, victim := range free {
		if used+c.reserved+size <= c.cfg.MaxBytes {
			break
		}
		if err := os.Remove(victim.path); err != nil {
			return nil, fmt.Errorf("evicting blob: %w", err)
		}
		c.log.Info("evicted", "blob", filepath.Base(victim.path), "bytes", victim.size)
		used -= victim.size
	}
	if used+c.reserved+size > c.cfg.MaxBytes {
		return nil, contract.Refuse("blob.cache-full", "wait for a guest to end, or raise blob.max_bytes",
			"%d bytes do not fit the cache of %d: %d are in use", size, c.cfg.MaxBytes, used+c.reserved)
	}
	c.reserved += size
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.reserved -= size
	}, nil
}

type victim struct {
	path string
	size int64
	used time.Time
}

// usage sums complete blobs and returns those nobody claims, oldest first.
func (c *Cache) usage() (used int64, free []victim, err error) {
	claimed := map[string]bool{}
	claims, err := filepath.Glob(filepath.Join(c.dir, "owners", "*", "*"))
	if err != nil {
		return 0, nil, err
	}
	for _, path := range claims {
		claimed[filepath.Base(path)] = true
	}
	entries, err := os.ReadDir(filepath.Join(c.dir, "blobs"))
	if err != nil {
		return 0, nil, fmt.Errorf("reading blob cache: %w", err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // gone meanwhile
		}
		used += info.Size()
		if !claimed[e.Name()] {
			free = append(free, victim{c.final(e.Name()), info.Size(), info.ModTime()})
		}
	}
	sort.Slice(free, func(i, j int) bool { return free[i].used.Before(free[j].used) })
	return used, free, nil
}
