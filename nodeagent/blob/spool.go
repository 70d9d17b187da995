package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Entry is one complete file of a spool.
type Entry struct {
	Name   string
	SHA256 [32]byte
	Size   int64
}

// Spools is the folder that holds every guest's spool.
type Spools struct {
	dir         string
	client      *http.Client
	checkHeader func(io.Reader) error
	stall       time.Duration
	budget      *budget
}

// OpenSpools opens or makes the folder, 0700. All files in it together have at
// most maxBytes; what was cut off while it was received is removed.
func OpenSpools(dir string, maxBytes int64, checkHeader func(io.Reader) error, client *http.Client) (*Spools, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making spools: %w", err)
	}
	s := &Spools{dir, client, checkHeader, stallTimeout, &budget{max: maxBytes}}
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
	names []string
	quota int64

	mu sync.Mutex // one result at a time: the quota is for all together
}

// Open makes a guest's spool for files of these names, quota bytes together,
// or opens the one that is there.
func (s *Spools) Open(guestID string, names []string, quota int64) (*Spool, error) {
	if !contract.ValidFileName(guestID) {
		return nil, fmt.Errorf("opening spool: guest id %q is malformed", guestID)
	}
	dir := filepath.Join(s.dir, guestID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, diskError(fmt.Errorf("making spool: %w", err))
	}
	return &Spool{s: s, dir: dir, names: names, quota: quota}, nil
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
	if !slices.Contains(s.names, name) {
		return Entry{}, contract.Refuse("results.unknown-name", "name every result in the manifest", "the manifest has no result %q", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	room, err := s.room(name)
	if err != nil {
		return Entry{}, err
	}
	if name == contract.ResultsManifestName {
		room = min(room, contract.MaxResultManifestBytes)
	}
	if name != contract.ResultsManifestName {
		if r, err = sealedHead(r, s.s.checkHeader, contract.Refuse("results.not-sealed", "use a guest image that seals its results",
			"result %s is not sealed: plaintext is never handled", name)); err != nil {
			return Entry{}, fmt.Errorf("receiving result: %w", err)
		}
	}
	path := filepath.Join(s.dir, "."+name+partialSuffix)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return Entry{}, diskError(fmt.Errorf("receiving result: %w", err))
	}
	taken := &taking{budget: s.s.budget}
	defer func() {
		err = errors.Join(err, file.Close())
		if err != nil {
			err = errors.Join(err, removed(path))
			s.s.budget.giveBack(taken.n)
		}
	}()
	sum := sha256.New()
	size, err := io.CopyBuffer(io.MultiWriter(taken, file, sum), io.LimitReader(r, room+1), make([]byte, 256<<10))
	if err != nil {
		return Entry{}, diskError(fmt.Errorf("receiving result: %w", err))
	}
	if size > room {
		return Entry{}, contract.Refuse("results.quota", "make the results smaller, or ask for a larger quota", "the results are larger than %d bytes", s.quota)
	}
	if err := file.Sync(); err != nil {
		return Entry{}, diskError(fmt.Errorf("receiving result: %w", err))
	}
	replaced, err := sizeOf(filepath.Join(s.dir, name))
	if err != nil {
		return Entry{}, fmt.Errorf("receiving result: %w", err)
	}
	if err := os.Rename(path, filepath.Join(s.dir, name)); err != nil {
		return Entry{}, fmt.Errorf("receiving result: %w", err)
	}
	taken.n = 0 // now the file's
	s.s.budget.giveBack(replaced)
	return Entry{name, [32]byte(sum.Sum(nil)), size}, syncDir(s.dir)
}

// room is how many bytes a file of this name may have.
func (s *Spool) room(name string) (int64, error) {
	room := s.quota
	for _, other := range s.names {
		info, err := os.Stat(filepath.Join(s.dir, other))
		if err == nil && other != name {
			room -= info.Size()
		} else if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, fmt.Errorf("reading spool: %w", err)
		}
	}
	return max(room, 0), nil
}

// Entries are the complete files, hashed anew.
func (s *Spool) Entries() ([]Entry, error) {
	found, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading spool: %w", err)
	}
	var entries []Entry
	for _, e := range found {
		if strings.HasPrefix(e.Name(), ".") || !slices.Contains(s.names, e.Name()) {
			continue
		}
		sum := sha256.New()
		file, err := os.Open(filepath.Join(s.dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("reading spool: %w", err)
		}
		size, err := io.Copy(sum, file)
		if err := errors.Join(err, file.Close()); err != nil {
			return nil, fmt.Errorf("reading spool: %w", err)
		}
		entries = append(entries, Entry{e.Name(), [32]byte(sum.Sum(nil)), size})
	}
	return entries, nil
}

// Upload puts one complete file of a guest's spool to a presigned URL, and
// checks while sending that it still is that file. A *contract.Refusal is
// final, any other error may pass.
func (s *Spools) Upload(ctx context.Context, guestID string, e Entry, putURL string) error {
	if !contract.ValidFileName(guestID) || !contract.ValidFileName(e.Name) {
		return fmt.Errorf("uploading: names %q, %q are malformed", guestID, e.Name)
	}
	file, err := os.Open(filepath.Join(s.dir, guestID, e.Name))
	if errors.Is(err, os.ErrNotExist) {
		return damaged(e, "is gone")
	}
	if err != nil {
		return fmt.Errorf("uploading result: %w", err)
	}
	defer file.Close() //nolint:errcheck // read only
	info, err := file.Stat()
	if err != nil {
		return fmt.Errorf("uploading result: %w", err)
	}
	if info.Size() != e.Size {
		return damaged(e, fmt.Sprintf("has %d bytes, not %d", info.Size(), e.Size))
	}
	return s.put(ctx, e, file, putURL)
}

func (s *Spools) put(ctx context.Context, e Entry, file io.Reader, putURL string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := request(ctx, http.MethodPut, putURL, http.NoBody)
	if err != nil {
		return err
	}
	body := &sending{r: io.LimitReader(file, e.Size), sum: sha256.New()}
	if e.Size > 0 {
		moving := watch(body, s.stall, cancel)
		defer moving.dog.Stop()
		req.Body, req.ContentLength = io.NopCloser(moving), e.Size
	}
	resp, err := s.client.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("uploading result %s: %w", e.Name, withoutURL(err))
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if err := answered(resp, http.StatusOK, http.StatusCreated, http.StatusNoContent); err != nil {
		return err
	}
	switch got, n := body.sent(); {
	case n != e.Size:
		return fmt.Errorf("uploading result %s: object store answers %s after %d of %d bytes", e.Name, resp.Status, n, e.Size)
	case !bytes.Equal(got, e.SHA256[:]):
		return damaged(e, "has another SHA-256: "+hex.EncodeToString(got))
	}
	return nil
}

func damaged(e Entry, how string) error {
	return contract.Refuse("results.spool-damaged", "launch again; check the host's disk", "result %s changed on the host's disk: it %s", e.Name, how)
}

// sending hashes what is sent. net/http may go on reading a body after the
// answer came.
type sending struct {
	mu  sync.Mutex
	r   io.Reader
	sum hash.Hash
	n   int64
}

func (s *sending) Read(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.r.Read(b)
	s.sum.Write(b[:n])
	s.n += int64(n)
	return n, err
}

func (s *sending) sent() (sum []byte, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sum.Sum(nil), s.n
}
