package endorsements

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/confidential-node/agent/firmware/contract"
)

// cacheVersion is the layout of the package comment.
const cacheVersion = 1

// maxDocuments bounds a cache and a bundle: a fleet's.
const maxDocuments = 4096

// cache is the documents on disk.
type cache struct {
	dir string
	checker
}

type versionFile struct {
	Version int `json:"version"`
}

// openCache opens or makes the cache in dir.
func openCache(dir string, c checker) (*cache, error) {
	if err := os.MkdirAll(filepath.Join(dir, "documents"), 0o700); err != nil {
		return nil, fmt.Errorf("making endorsement cache: %w", err)
	}
	path := filepath.Join(dir, "version.json")
	raw, err := readFile(path, maxPace)
	if errors.Is(err, fs.ErrNotExist) {
		if err := renameio.WriteFile(path, fmt.Appendf(nil, `{"version": %d}`+"\n", cacheVersion), 0o600); err != nil {
			return nil, fmt.Errorf("making endorsement cache: %w", err)
		}
		return &cache{dir, c}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("opening endorsement cache: %w", err)
	}
	var v versionFile
	if err := contract.UnmarshalStrict(raw, maxPace, &v); err != nil || v.Version != cacheVersion {
		return nil, contract.Refuse("endorsements.cache-version", "use the agent that wrote it, or move the folder away and let this one begin anew",
			"endorsement cache %s is not of version %d", dir, cacheVersion).Because(err)
	}
	return &cache{dir, c}, nil
}

func (c *cache) path(n name) string {
	return filepath.Join(c.dir, "documents", filepath.FromSlash(n.String()))
}

// raw reads a document without judging it.
func (c *cache) raw(n name) ([]byte, error) { return readFile(c.path(n), maxDocument) }

// get reads a document that checks. One that is not there is fs.ErrNotExist.
func (c *cache) get(n name) ([]byte, error) {
	data, err := c.raw(n)
	if err != nil {
		return nil, err
	}
	if err := c.check(n, data, c.raw); err != nil {
		return nil, fmt.Errorf("document %s in the endorsement cache: %w", n, err)
	}
	return data, nil
}

// has reports whether a document is there and checks.
func (c *cache) has(n name) bool {
	_, err := c.get(n)
	return err == nil
}

// put keeps a document that was checked, and reports whether it was taken: a
// revocation list that is older than the one that is there is not.
func (c *cache) put(ctx context.Context, n name, data []byte) (taken bool, err error) {
	if n.kind != kindCRL {
		return true, c.write(n, data)
	}
	err = locked(ctx, filepath.Join(c.dir, "lock"), func() error {
		taken = true
		if old, err := c.get(n); err == nil {
			before, _, errOld := validity(n, old)
			after, _, errNew := validity(n, data)
			if err := errors.Join(errOld, errNew); err != nil {
				return err
			}
			if after.Before(before) {
				taken, data = false, old // it was asked for all the same
			}
		}
		return c.write(n, data)
	})
	return taken, err
}

// write replaces a file whole. Its time is ours, so that the age of a
// revocation list is told by one clock.
func (c *cache) write(n name, data []byte) (err error) {
	path := c.path(n)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("keeping %s: %w", n, err)
	}
	f, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o600))
	if err != nil {
		return fmt.Errorf("keeping %s: %w", n, err)
	}
	defer func() { err = errors.Join(err, f.Cleanup()) }()
	now := c.now()
	_, errWrite := f.Write(data)
	if err := errors.Join(errWrite, os.Chtimes(f.Name(), now, now)); err != nil {
		return fmt.Errorf("keeping %s: %w", n, err)
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("keeping %s: %w", n, err)
	}
	return nil
}

// age of a document since it was fetched.
func (c *cache) age(n name) (time.Duration, error) {
	info, err := os.Stat(c.path(n))
	if err != nil {
		return 0, err
	}
	return c.now().Sub(info.ModTime()), nil
}

// list returns every document by name, and what lies in the cache without
// being one.
func (c *cache) list() (found []name, strangers []string, err error) {
	root := filepath.Join(c.dir, "documents")
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if strings.HasPrefix(d.Name(), ".") {
			return nil // on its way to its name
		}
		if len(found)+len(strangers) == maxDocuments {
			return fmt.Errorf("more than %d documents", maxDocuments)
		}
		n, err := parseName(filepath.ToSlash(rel))
		if err != nil {
			strangers = append(strangers, filepath.ToSlash(rel))
			return nil //nolint:nilerr // told by its name
		}
		found = append(found, n)
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("listing endorsement cache: %w", err)
	}
	slices.SortFunc(found, name.compare)
	return found, strangers, nil
}

// errTooLarge means that something has more bytes than it may have.
var errTooLarge = errors.New("it is too large")

// readLimited reads all of r, which may have at most limit bytes.
func readLimited(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		return nil, fmt.Errorf("%w: more than %d bytes", errTooLarge, limit)
	}
	return data, err
}
