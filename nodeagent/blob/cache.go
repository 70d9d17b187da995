package blob

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

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
	// Stall is how long 64 KiB may take to come; 0 means 30 seconds.
	Stall time.Duration
	// Space says what is free under a path; nil asks the file system.
	Space func(path string) (bytes, inodes uint64, err error)
	// Clock says whether a URL has expired; time.Now when nil.
	Clock func() time.Time
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
	// reserved are the bytes of blobs whose fetches run, complete or not.
	reserved map[string]int64
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
	if cfg.Space == nil {
		cfg.Space = space
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	c := &Cache{dir: dir, cfg: cfg, client: client, log: logger.Named("blob"), fetching: map[string]*turn{}, reserved: map[string]int64{}}
	// QEMU runs as another user and opens blobs by their names, whatever the
	// umask of the agent.
	for sub, mode := range map[string]fs.FileMode{"": 0o711, "blobs": 0o711, "partial": 0o700, "owners": 0o700} {
		path := filepath.Join(dir, sub)
		if err := errors.Join(os.MkdirAll(path, mode), os.Chmod(path, mode)); err != nil {
			return nil, fmt.Errorf("making blob cache: %w", err)
		}
	}
	// A journal that was being written when an earlier run died.
	halves, err := filepath.Glob(filepath.Join(dir, "partial", "*.new"))
	for _, half := range halves {
		err = errors.Join(err, os.Remove(half))
	}
	if err != nil {
		return nil, fmt.Errorf("clearing blob cache: %w", err)
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
	giveBack, err := c.reserve(name, ref.Size)
	if err != nil {
		return "", err
	}
	defer giveBack()
	if progress == nil {
		progress = func(int64, int64) {}
	}
	if err := diskError(c.fetch(ctx, ref, progress)); err != nil {
		if contract.AsRefusal(err).Code == codeDiskFull {
			err = errors.Join(err, c.discard(name)) // make room for everybody else
		}
		return "", err
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

// claim holds mu: an eviction under way has either seen the claim, or has taken
// the blob before anybody looks for it.
func (c *Cache) claim(owner, name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
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
func (c *Cache) reserve(name string, size int64) (giveBack func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	used, free, err := c.usage(name)
	if err != nil {
		return nil, err
	}
	for {
		no := c.fits(name, size, used)
		if no == nil {
			break
		}
		if len(free) == 0 {
			return nil, no
		}
		victim := free[0]
		free = free[1:]
		if err := errors.Join(removed(c.final(victim.name)), c.discard(victim.name)); err != nil {
			return nil, fmt.Errorf("evicting blob: %w", err)
		}
		c.log.Info("evicted", "blob", victim.name, "bytes", victim.size)
		used -= victim.size
	}
	c.reserved[name] = size
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.reserved, name)
	}, nil
}

// What a fetch leaves free for everybody else on the disk. A blob, its journal
// and its claim are three files.
const (
	keepBytes  = 64 << 20
	keepInodes = 64
)

// fits says why a blob has no room, next to used bytes of the cache.
func (c *Cache) fits(name string, size, used int64) error {
	if size > c.cfg.MaxBytes-used {
		return contract.Refuse("blob.cache-full", "wait for a guest to end, or raise blob.max_bytes",
			"%d bytes do not fit the cache of %d: %d are in use", size, c.cfg.MaxBytes, used)
	}
	free, inodes, err := c.cfg.Space(c.dir)
	if err != nil {
		return fmt.Errorf("asking for free space: %w", err)
	}
	var stat unix.Stat_t
	if unix.Stat(c.partial(name), &stat) == nil {
		size -= min(size, stat.Blocks*512) // allocated already
	}
	if uint64(size)+keepBytes > free {
		return contract.Refuse(codeDiskFull, "free space on the host, or lower blob.max_bytes",
			"%d bytes more do not fit the host's disk: %d are free, %d of them are kept", size, free, keepBytes)
	}
	if inodes < keepInodes {
		return contract.Refuse(codeDiskFull, "remove files on the host's disk", "the host's disk has %d inodes left", inodes)
	}
	return nil
}

// space asks the file system what is free for the agent. File systems without
// a table of inodes report none at all.
func space(path string) (bytes, inodes uint64, err error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return 0, 0, err
	}
	inodes = stat.Ffree
	if stat.Files == 0 {
		inodes = math.MaxUint64
	}
	return stat.Bavail * uint64(stat.Bsize), inodes, nil
}

type victim struct {
	name string
	size int64
	used time.Time
}

// usage sums what is on disk, complete or not, and what fetches that run will
// add, all but the blob that wants room. It returns what nobody claims, oldest
// first. Caller holds mu.
func (c *Cache) usage(wants string) (used int64, free []victim, err error) {
	claimed := map[string]bool{wants: true}
	owners, err := c.Owners()
	if err != nil {
		return 0, nil, err
	}
	for _, owner := range owners {
		claims, err := os.ReadDir(filepath.Join(c.dir, "owners", owner))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // given up meanwhile
			return 0, nil, fmt.Errorf("reading claims on blobs: %w", err)
		}
		for _, claim := range claims {
			claimed[claim.Name()] = true
		}
	}
	for name, size := range c.reserved {
		claimed[name] = true
		used += size
	}
	for _, sub := range []string{"blobs", "partial"} {
		entries, err := os.ReadDir(filepath.Join(c.dir, sub))
		if err != nil {
			return 0, nil, fmt.Errorf("reading blob cache: %w", err)
		}
		for _, e := range entries {
			info, err := e.Info()
			_, reserved := c.reserved[e.Name()]
			if err != nil || e.Name() == wants || reserved || filepath.Ext(e.Name()) != "" {
				continue // gone meanwhile, counted already, or a journal
			}
			used += info.Size()
			if !claimed[e.Name()] {
				free = append(free, victim{e.Name(), info.Size(), info.ModTime()})
			}
		}
	}
	sort.Slice(free, func(i, j int) bool { return free[i].used.Before(free[j].used) })
	return used, free, nil
}
