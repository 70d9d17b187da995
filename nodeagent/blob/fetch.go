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
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/durable"
)

// Reasons to begin a fetch anew.
var (
	// errReplaced means that the object changed while it was read.
	errReplaced = errors.New("the object was replaced while it was fetched")
	// errStale means that what an earlier attempt left is no part of the blob:
	// the object was another one then, or the disk lost something.
	errStale = errors.New("what an earlier attempt left is of no use")
)

// journal says how much of a partial blob can be taken over by a later
// attempt. It is written without fsync, and the blob's own bytes too: what a
// power failure makes untrue is found by the digest and begun anew.
type journal struct {
	// ETag is the object's, when it has one that a store can compare.
	ETag     string `json:"etag,omitempty"`
	Size     int64  `json:"size"`
	PartSize int64  `json:"part_size"`
	// Parts from the beginning that are complete.
	Parts int `json:"parts"`
	// Beyond are complete parts after a gap, in order. What is in neither is
	// fetched again.
	Beyond []int `json:"beyond,omitempty"`
}

const (
	maxJournal = 8 << 10
	maxETag    = 1 << 10
	// maxBeyond parts fit a journal.
	maxBeyond = 512
)

// download is one fetch.
type download struct {
	c        *Cache
	ref      Ref
	file     *os.File
	progress func(done, total int64)
	// resumed says that parts of an earlier attempt were taken over.
	resumed bool
	// hash is the hasher's alone: parts go on while it reads what is there.
	hash hash.Hash
	// arrived holds a token when a part came that the hasher may wait for.
	arrived chan struct{}

	mu      sync.Mutex
	journal journal
	there   []bool // parts on disk
	done    int64
}

// fetch makes the blob appear. What turns out to be of another object is begun
// anew, once.
func (c *Cache) fetch(ctx context.Context, ref Ref, progress func(done, total int64)) error {
	err := c.fetchOnce(ctx, ref, progress)
	if errors.Is(err, errReplaced) || errors.Is(err, errStale) {
		c.log.Warn("fetch begun anew", "blob", ref.name(), "err", err)
		if err = c.discard(ref.name()); err == nil {
			err = c.fetchOnce(ctx, ref, progress)
		}
	}
	if errors.Is(err, errReplaced) {
		return contract.Refuse("blob.replaced", "stop writing to the object, then launch again", "the object keeps changing while it is fetched")
	}
	return err
}

func (c *Cache) journalFile(name string) string { return c.partial(name) + ".json" }

// discard removes what is there of an incomplete blob.
func (c *Cache) discard(name string) error {
	return errors.Join(removed(c.partial(name)), removed(c.journalFile(name)), removed(c.journalFile(name)+".new"))
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
	if err := allocate(file, ref.Size); err != nil {
		return fmt.Errorf("preparing partial blob: %w", err)
	}
	d := &download{c: c, ref: ref, file: file, progress: progress, hash: sha256.New(), arrived: make(chan struct{}, 1)}
	d.resume()
	// The first part alone: it pins the object and shows whether it is sealed.
	if err := d.part(ctx, 0); err != nil {
		return err
	}
	work, workCtx := errgroup.WithContext(ctx)
	work.SetLimit(c.cfg.Parts + 1)
	work.Go(func() error { return d.hashAll(workCtx) })
	for i := d.journal.Parts; i < len(d.there) && workCtx.Err() == nil; i++ {
		work.Go(func() error { return d.part(workCtx, i) })
	}
	if err := work.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	got := d.hash.Sum(nil)
	switch {
	case bytes.Equal(got, ref.SHA256[:]):
		return d.publish()
	case d.resumed:
		return errStale
	}
	return errors.Join(contract.Refuse("blob.digest-mismatch", "upload the very file the manifest names",
		"the object's content is not what the manifest says: SHA-256 is %x", got), c.discard(ref.name()))
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
	return errors.Join(durable.SyncDir(filepath.Join(d.c.dir, "blobs")), d.c.discard(name))
}

// allocate gives a file its size and its room on the disk, so that a disk too
// small is known before the first byte is fetched.
func allocate(file *os.File, size int64) error {
	if err := file.Truncate(size); err != nil {
		return err
	}
	err := unix.Fallocate(int(file.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// resume takes up what an earlier attempt left, when it was of the same shape.
func (d *download) resume() {
	parts := int((d.ref.Size + d.c.cfg.PartSize - 1) / d.c.cfg.PartSize)
	d.journal = journal{Size: d.ref.Size, PartSize: d.c.cfg.PartSize}
	d.there = make([]bool, parts)
	old, err := readJournal(d.c.journalFile(d.ref.name()))
	if err != nil || old.Size != d.journal.Size || old.PartSize != d.journal.PartSize {
		return // nothing to take up
	}
	d.journal, d.resumed = old, old.Parts > 0 || len(old.Beyond) > 0
	for i := range d.there {
		d.there[i] = i < old.Parts
	}
	for _, i := range old.Beyond {
		d.there[i] = true
	}
	for i, there := range d.there {
		if there {
			d.done += d.length(i)
		}
	}
}

func readJournal(path string) (journal, error) {
	file, err := os.Open(path)
	if err != nil {
		return journal{}, err
	}
	defer file.Close() //nolint:errcheck // read only
	raw, err := io.ReadAll(io.LimitReader(file, maxJournal+1))
	if err != nil {
		return journal{}, err
	}
	return parseJournal(raw)
}

func parseJournal(raw []byte) (journal, error) {
	var j journal
	if err := contract.UnmarshalStrict(raw, maxJournal, &j); err != nil {
		return journal{}, fmt.Errorf("reading journal: %w", err)
	}
	if j.Size <= 0 || j.PartSize <= 0 || j.Parts < 0 || len(j.Beyond) > maxBeyond || j.ETag != strongTag(j.ETag) {
		return journal{}, errors.New("reading journal: malformed")
	}
	parts, after := (j.Size-1)/j.PartSize+1, j.Parts
	for _, i := range j.Beyond {
		if i <= after {
			return journal{}, errors.New("reading journal: parts out of order")
		}
		after = i
	}
	if int64(j.Parts) > parts || len(j.Beyond) > 0 && int64(after) >= parts {
		return journal{}, errors.New("reading journal: more parts than the blob has")
	}
	return j, nil
}

// saveLocked replaces the journal.
func (d *download) saveLocked() error {
	raw, err := json.Marshal(d.journal)
	if err != nil {
		return fmt.Errorf("encoding journal: %w", err)
	}
	path := d.c.journalFile(d.ref.name())
	if err := os.WriteFile(path+".new", raw, 0o600); err != nil {
		return fmt.Errorf("writing journal: %w", err)
	}
	return os.Rename(path+".new", path)
}

func (d *download) length(i int) int64 {
	return min(d.c.cfg.PartSize, d.ref.Size-int64(i)*d.c.cfg.PartSize)
}

// hashAll hashes the parts in order as they come.
func (d *download) hashAll(ctx context.Context) error {
	buf := make([]byte, 1<<20)
	for i := 0; i < len(d.there); {
		d.mu.Lock()
		there := d.there[i]
		d.mu.Unlock()
		if !there {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-d.arrived:
			}
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		r := io.NewSectionReader(d.file, int64(i)*d.c.cfg.PartSize, d.length(i))
		if _, err := io.CopyBuffer(d.hash, r, buf); err != nil {
			return fmt.Errorf("hashing partial blob: %w", err)
		}
		i++
	}
	return nil
}

// part fetches one part, with retries for what may pass.
func (d *download) part(ctx context.Context, i int) error {
	d.mu.Lock()
	there := d.there[i]
	d.mu.Unlock()
	if there {
		return nil
	}
	what := fmt.Sprintf("part %d of blob %s", i, d.ref.name())
	err := insist(ctx, d.ref.URL, what, d.c.cfg.Clock, d.c.log, func() error { return diskError(d.try(ctx, i)) })
	switch {
	case err == nil:
		return d.complete(i)
	case lasting(err) || ctx.Err() != nil:
		return err
	}
	return contract.Refuse("blob.unreachable", "check that the host reaches the object store, then launch again",
		"the object store did not deliver %s", what).Because(err)
}

// complete records a part.
func (d *download) complete(i int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.there[i] = true
	d.done += d.length(i)
	d.progress(d.done, d.journal.Size)
	d.journal.Parts, d.journal.Beyond = onDisk(d.there)
	select {
	case d.arrived <- struct{}{}:
	default:
	}
	return d.saveLocked()
}

// onDisk returns how many parts are there from the beginning, and which are
// there after the first gap.
func onDisk(there []bool) (parts int, beyond []int) {
	for parts < len(there) && there[parts] {
		parts++
	}
	for i := parts + 1; i < len(there) && len(beyond) < maxBeyond; i++ {
		if there[i] {
			beyond = append(beyond, i)
		}
	}
	return parts, beyond
}

// try asks for one part once.
func (d *download) try(ctx context.Context, i int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := request(ctx, http.MethodGet, d.ref.URL, http.NoBody)
	if err != nil {
		return err
	}
	first, length := int64(i)*d.journal.PartSize, d.length(i)
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, first+length-1))
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
	if err := d.accept(resp, first, length, etag); err != nil {
		return err
	}
	moving := watch(resp.Body, d.c.cfg.Stall, cancel)
	defer moving.dog.Stop()
	err = d.keep(&exactly{moving, length}, first)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// keep writes a part to its place.
func (d *download) keep(body io.Reader, first int64) (err error) {
	if first == 0 {
		if body, err = sealedHead(body, d.c.cfg.CheckHeader, contract.Refuse("blob.not-sealed", "seal the input with age and upload that",
			"the input is not sealed: plaintext is never handled")); err != nil {
			return err
		}
	}
	n, err := io.CopyBuffer(io.NewOffsetWriter(d.file, first), body, make([]byte, 256<<10))
	if err == nil {
		// The disk begins with it now, or publishing waits for all of it at the
		// end. That a file system cannot do so is no error.
		_ = unix.SyncFileRange(int(d.file.Fd()), first, n, unix.SYNC_FILE_RANGE_WRITE)
	}
	return err
}

// exactly reads left bytes and no more; fewer are an error.
type exactly struct {
	r    io.Reader
	left int64
}

func (e *exactly) Read(b []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(b[:min(int64(len(b)), e.left)])
	e.left -= int64(n)
	if e.left > 0 && errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// accept checks that the answer is the part that was asked for, of the object
// that was begun.
func (d *download) accept(resp *http.Response, first, length int64, etag string) error {
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return d.wrongSize(parseUnsatisfied(resp.Header.Get("Content-Range")))
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
		if length != d.journal.Size {
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
		if gotFirst != first || gotLast != first+length-1 {
			return fmt.Errorf("object store answers with bytes %d-%d for %d-%d", gotFirst, gotLast, first, first+length-1)
		}
	}
	got := strongTag(resp.Header.Get("ETag"))
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

// strongTag returns a tag that If-Match can carry, else "": a weak one never
// matches (RFC 9110, 13.1.1).
func strongTag(etag string) string {
	if strings.HasPrefix(etag, "W/") || len(etag) > maxETag {
		return ""
	}
	return etag
}

// wrongSize takes a size of -1 for an unknown one.
func (d *download) wrongSize(got int64) error {
	found := "an unknown number of bytes"
	if got >= 0 {
		found = strconv.FormatInt(got, 10) + " bytes"
	}
	return contract.Refuse("blob.size-mismatch", "upload the very file the manifest names", "the object has %s, the manifest says %d", found, d.journal.Size)
}
