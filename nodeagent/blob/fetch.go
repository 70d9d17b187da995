package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/firmware/contract"
)

// journal says which parts of a partial blob are on disk.
type journal struct {
	ETag     string `json:"etag"`
	Size     int64  `json:"size"`
	PartSize int64  `json:"part_size"`
	Done     []bool `json:"done"`
}

// maxJournal bounds the file: a byte per part and some more.
const maxJournal = 64 << 20

// download is one fetch.
type download struct {
	c        *Cache
	ref      Ref
	file     *os.File
	progress func(done, total int64)

	mu      sync.Mutex
	journal journal
	hash    hash.Hash
	// hashed is how many parts, in order, went into hash.
	hashed int
	done   int64
}

// fetch makes the blob appear. An object replaced meanwhile is begun anew,
// once.
func (c *Cache) fetch(ctx context.Context, ref Ref, progress func(done, total int64)) error {
	err := c.fetchOnce(ctx, ref, progress)
	if errors.Is(err, errReplaced) {
		c.log.Warn("object replaced while it was fetched, beginning anew", "blob", ref.name())
		if err = c.discard(ref.name()); err == nil {
			err = c.fetchOnce(ctx, ref, progress)
		}
	}
	if errors.Is(err, errReplaced) {
		return contract.Refuse("blob.replaced", "stop writing to the object, then launch again", "the object keeps changing while it is fetched")
	}
	return err
}

func (c *Cache) discard(name string) error {
	return errors.Join(removed(c.partial(name)), removed(c.partial(name)+".json"))
}

func removed(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (c *Cache) fetchOnce(ctx context.Context, ref Ref, progress func(done, total int64)) (err error) {
	file, err := os.OpenFile(c.partial(ref.name()), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("opening partial blob: %w", err)
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := file.Truncate(ref.Size); err != nil {
		return fmt.Errorf("preparing partial blob: %w", err)
	}
	d := &download{c: c, ref: ref, file: file, progress: progress, hash: sha256.New()}
	if err := d.resume(); err != nil {
		return err
	}
	// The first part alone: it pins the object and shows whether it is sealed.
	if err := d.part(ctx, 0); err != nil {
		return err
	}
	if err := c.cfg.CheckHeader(io.NewSectionReader(file, 0, min(ref.Size, d.journal.PartSize))); err != nil {
		return errors.Join(contract.Refuse("blob.not-sealed", "seal the input with age and upload that", "the input is not sealed: plaintext is never handled").Because(err), c.discard(ref.name()))
	}
	work, workCtx := errgroup.WithContext(ctx)
	work.SetLimit(c.cfg.Parts)
	for i := 1; i < len(d.journal.Done); i++ {
		work.Go(func() error { return d.part(workCtx, i) })
	}
	if err := work.Wait(); err != nil {
		return err
	}
	if got := d.hash.Sum(nil); !bytes.Equal(got, ref.SHA256[:]) {
		return errors.Join(contract.Refuse("blob.digest-mismatch", "upload the very file the manifest names", "the object's content is not what the manifest says: SHA-256 is %x", got), c.discard(ref.name()))
	}
	return d.publish()
}

// publish moves a checked blob to its name.
func (d *download) publish() error {
	name := d.ref.name()
	if err := errors.Join(d.file.Chmod(0o444), d.file.Sync()); err != nil {
		return fmt.Errorf("writing blob: %w", err)
	}
	if err := os.Rename(d.c.partial(name), d.c.final(name)); err != nil {
		return fmt.Errorf("publishing blob: %w", err)
	}
	return errors.Join(syncDir(filepath.Join(d.c.dir, "blobs")), removed(d.c.partial(name)+".json"))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// resume takes up what an earlier attempt left, when it was of the same shape.
func (d *download) resume() error {
	parts := int((d.ref.Size + d.c.cfg.PartSize - 1) / d.c.cfg.PartSize)
	d.journal = journal{Size: d.ref.Size, PartSize: d.c.cfg.PartSize, Done: make([]bool, parts)}
	raw, err := os.ReadFile(d.c.partial(d.ref.name()) + ".json")
	if err != nil || len(raw) > maxJournal {
		return nil //nolint:nilerr // nothing to resume
	}
	var old journal
	if json.Unmarshal(raw, &old) == nil && old.Size == d.journal.Size && old.PartSize == d.journal.PartSize && len(old.Done) == parts && old.ETag != "" {
		d.journal = old
		for i, done := range old.Done {
			if done {
				d.done += d.length(i)
			}
		}
	}
	return d.advance()
}

func (d *download) length(i int) int64 {
	return min(d.journal.PartSize, d.journal.Size-int64(i)*d.journal.PartSize)
}

// advance hashes the parts that are complete in order. Caller holds mu, or
// nobody else runs yet.
func (d *download) advance() error {
	for d.hashed < len(d.journal.Done) && d.journal.Done[d.hashed] {
		r := io.NewSectionReader(d.file, int64(d.hashed)*d.journal.PartSize, d.length(d.hashed))
		if _, err := io.CopyBuffer(d.hash, r, make([]byte, 1<<20)); err != nil {
			return fmt.Errorf("hashing partial blob: %w", err)
		}
		d.hashed++
	}
	return nil
}

// part fetches one part, with retries for what may pass.
func (d *download) part(ctx context.Context, i int) error {
	d.mu.Lock()
	there := d.journal.Done[i]
	d.mu.Unlock()
	if there {
		return nil
	}
	var err error
	for attempt := range attempts {
		if err = d.try(ctx, i); err == nil {
			return d.complete(i)
		}
		if _, final := errors.AsType[*contract.Refusal](err); final || errors.Is(err, errReplaced) || ctx.Err() != nil {
			return err
		}
		d.c.log.Debug("part failed, trying again", "blob", d.ref.name(), "part", i, "attempt", attempt, "err", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retryPause << attempt):
		}
	}
	return fmt.Errorf("fetching part %d of blob %s: %w", i, d.ref.name(), err)
}

// complete records a part. The journal is written without fsync: a part it
// claims and the disk lost makes the digest differ, which begins anew.
func (d *download) complete(i int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.journal.Done[i] = true
	d.done += d.length(i)
	d.progress(d.done, d.journal.Size)
	raw, err := json.Marshal(d.journal)
	if err != nil {
		return fmt.Errorf("encoding journal: %w", err)
	}
	if err := renameio.WriteFile(d.c.partial(d.ref.name())+".json", raw, 0o600); err != nil {
		return fmt.Errorf("writing journal: %w", err)
	}
	return d.advance()
}

// try asks for one part once.
func (d *download) try(ctx context.Context, i int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.ref.URL, http.NoBody)
	if err != nil {
		return contract.Refuse("blob.url-malformed", "give a presigned https URL", "the input's URL is malformed")
	}
	first := int64(i) * d.journal.PartSize
	last := first + d.length(i) - 1
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, last))
	d.mu.Lock()
	etag := d.journal.ETag
	d.mu.Unlock()
	if etag != "" {
		req.Header.Set("If-Match", etag)
	}
	resp, err := d.c.client.Do(req)
	if err != nil {
		return withoutURL(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if err := d.accept(resp, first, last, etag); err != nil {
		return err
	}
	watchdog := time.AfterFunc(d.c.cfg.Stall, func() { cancel(errors.New("no byte came for too long")) })
	defer watchdog.Stop()
	body := io.LimitReader(&petted{resp.Body, watchdog, d.c.cfg.Stall}, last-first+1)
	n, err := io.CopyBuffer(io.NewOffsetWriter(d.file, first), body, make([]byte, 256<<10))
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err == nil && n != last-first+1 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// accept checks that the answer is the part that was asked for, of the object
// that was begun.
func (d *download) accept(resp *http.Response, first, last int64, etag string) error {
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return d.wrongSize(resp.ContentLength)
	}
	if err := answered(resp, http.StatusPartialContent, http.StatusOK); err != nil {
		return err
	}
	if resp.StatusCode == http.StatusOK {
		// A store without ranges answers with the whole object; that serves
		// an object of one part only.
		if resp.ContentLength != d.journal.Size {
			return d.wrongSize(resp.ContentLength)
		}
		if first != 0 || last != d.journal.Size-1 {
			return contract.Refuse("blob.no-ranges", "use an object store that serves ranges", "the object store ignores ranges")
		}
	} else {
		gotFirst, gotLast, total, err := parseContentRange(resp.Header.Get("Content-Range"))
		if err != nil {
			return err
		}
		if total != d.journal.Size {
			return d.wrongSize(total)
		}
		if gotFirst != first || gotLast != last {
			return fmt.Errorf("object store answers with bytes %d-%d for %d-%d", gotFirst, gotLast, first, last)
		}
	}
	got := resp.Header.Get("ETag")
	if etag != "" && got != "" && got != etag {
		return errReplaced
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.journal.ETag == "" {
		d.journal.ETag = got
	}
	return nil
}

func (d *download) wrongSize(got int64) error {
	return contract.Refuse("blob.size-mismatch", "upload the very file the manifest names", "the object has %d bytes, the manifest says %d", got, d.journal.Size)
}

// petted tells the watchdog of every byte.
type petted struct {
	r     io.Reader
	dog   *time.Timer
	stall time.Duration
}

func (p *petted) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	if n > 0 {
		p.dog.Reset(p.stall)
	}
	return n, err
}
