package blob

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

// Grant lets parts of one multipart upload be put.
type Grant struct {
	// UploadID is the store's. Parts count under the same id only.
	UploadID string
	// PartSize of every part but the last.
	PartSize int64
	// FirstPart is the number, from 1, of the part that the first URL is for.
	FirstPart int
	// URLs are credentials.
	URLs []string
}

// WantedError says that an upload needs further URLs to go on.
type WantedError struct {
	// Part is the first that is missing, Done how many are there.
	Part, Done int
	// Why the URLs were of no use; nil when they were used up.
	Why *contract.Refusal
}

func (e *WantedError) Error() string {
	if e.Why != nil {
		return fmt.Sprintf("part %d needs another URL: %v", e.Part, e.Why)
	}
	return fmt.Sprintf("part %d needs a URL", e.Part)
}

// UploadParts puts the parts of one complete file that are not in the store
// yet, some at a time, and returns the ETags of all in order once they are.
// What was put is not put again, also after a restart. A *WantedError wants
// another grant, a *contract.Refusal is final, any other error may pass. Parts
// are not checked: what the disk damages is found by the tenant, whose guest has
// signed the digest of the whole.
func (s *Spools) UploadParts(ctx context.Context, guestID string, e Entry, g Grant) ([]string, error) {
	if g.PartSize <= 0 || e.Size > g.PartSize*api.MaxParts {
		return nil, contract.Refuse("results.grant-too-small", "grant parts of more bytes, with another upload_id",
			"result %s has %d bytes, %d parts of %d do not carry it", e.Name, e.Size, api.MaxParts, g.PartSize)
	}
	file, err := s.open(guestID, e)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	u := &upload{s: s, e: e, g: g, file: file, path: filepath.Join(s.dir, guestID, "."+e.Name+partsSuffix)}
	u.resume()
	var work errgroup.Group
	work.SetLimit(s.cfg.Parts)
	for i, link := range g.URLs {
		number := g.FirstPart + i
		if number < 1 || number > len(u.journal.ETags) || u.journal.ETags[number-1] != "" {
			continue
		}
		// One that failed lets those that run go on: a part may have 5 GiB.
		work.Go(func() error { return u.part(ctx, number, link) })
	}
	_ = work.Wait() // the worst of them is u's
	return u.outcome(ctx)
}

// upload is one file on its way in parts.
type upload struct {
	s    *Spools
	e    Entry
	g    Grant
	file *os.File
	path string

	mu      sync.Mutex
	journal partsJournal
	// failed is final or may pass; refused are the URLs.
	failed  error
	refused *contract.Refusal
}

// partsJournal says which parts are in the store. It is written without fsync:
// what a power failure takes is put again.
type partsJournal struct {
	UploadID string `json:"upload_id"`
	PartSize int64  `json:"part_size"`
	Size     int64  `json:"size"`
	SHA256   string `json:"sha256"`
	// ETags by part; "" is not there.
	ETags []string `json:"etags"`
}

const (
	partsSuffix     = ".parts"
	maxPartsJournal = api.MaxParts*(2*api.MaxETagBytes+4) + 8<<10
)

// resume takes up what was put of the same file under the same upload.
func (u *upload) resume() {
	count := (u.e.Size + u.g.PartSize - 1) / u.g.PartSize
	want := partsJournal{UploadID: u.g.UploadID, PartSize: u.g.PartSize, Size: u.e.Size, SHA256: hex.EncodeToString(u.e.SHA256[:])}
	u.journal = want
	u.journal.ETags = make([]string, count)
	old, err := readPartsJournal(u.path)
	if err == nil && old.UploadID == want.UploadID && old.PartSize == want.PartSize && old.Size == want.Size && old.SHA256 == want.SHA256 && len(old.ETags) == int(count) {
		u.journal = old
	}
}

func readPartsJournal(path string) (partsJournal, error) {
	file, err := os.Open(path)
	if err != nil {
		return partsJournal{}, err
	}
	defer file.Close() //nolint:errcheck // read only
	raw, err := io.ReadAll(io.LimitReader(file, maxPartsJournal+1))
	if err != nil {
		return partsJournal{}, err
	}
	return parsePartsJournal(raw)
}

func parsePartsJournal(raw []byte) (partsJournal, error) {
	var j partsJournal
	if err := contract.UnmarshalStrict(raw, maxPartsJournal, &j); err != nil {
		return partsJournal{}, fmt.Errorf("reading journal of an upload: %w", err)
	}
	if len(j.ETags) > api.MaxParts || slices.ContainsFunc(j.ETags, func(tag string) bool { return tag != "" && !validPartTag(tag) }) {
		return partsJournal{}, errors.New("reading journal of an upload: malformed")
	}
	return j, nil
}

// validPartTag accepts what can be told in UploadReady and put into the
// document that completes an upload.
func validPartTag(tag string) bool {
	return tag != "" && len(tag) <= api.MaxETagBytes && !strings.ContainsFunc(tag, func(r rune) bool { return r <= ' ' || r > '~' || r == '<' || r == '&' })
}

// part puts one part, unless another has failed meanwhile.
func (u *upload) part(ctx context.Context, number int, link string) error {
	u.mu.Lock()
	stop := u.failed != nil || u.refused != nil || ctx.Err() != nil
	u.mu.Unlock()
	if stop {
		return nil
	}
	what := fmt.Sprintf("part %d of result %s", number, u.e.Name)
	var tag string
	err := insist(ctx, link, what, u.s.cfg.Clock, u.s.log, func() (err error) {
		tag, err = u.try(ctx, number, link)
		return err
	})
	if err == nil {
		err = u.keep(number, tag)
	}
	if err != nil {
		u.fail(fmt.Errorf("uploading %s: %w", what, err))
	}
	return err
}

func (u *upload) try(ctx context.Context, number int, link string) (tag string, err error) {
	first := int64(number-1) * u.g.PartSize
	size := min(u.g.PartSize, u.e.Size-first)
	head, err := u.s.put(ctx, link, &sending{r: io.NewSectionReader(u.file, first, size)}, size)
	if err != nil {
		return "", err
	}
	if tag = head.Get("ETag"); !validPartTag(tag) {
		return "", fmt.Errorf("object store gives ETag %.100q for a part", tag)
	}
	return tag, nil
}

// fail keeps the worst failure: a refusal that no other URL changes.
func (u *upload) fail(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	r, refused := errors.AsType[*contract.Refusal](err)
	switch {
	case refused && (r.Code == codeURLExpired || r.Code == codeNotFound):
		u.refused = r
	case refused || u.failed == nil:
		u.failed = err
	}
}

// keep records a part.
func (u *upload) keep(number int, tag string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.journal.ETags[number-1] = tag
	raw, err := json.Marshal(u.journal)
	if err == nil {
		err = replaceFile(u.path, raw)
	}
	if err != nil {
		return diskError(fmt.Errorf("writing journal of an upload: %w", err))
	}
	return nil
}

func (u *upload) outcome(ctx context.Context) ([]string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	wanted := &WantedError{Why: u.refused}
	for i, tag := range u.journal.ETags {
		if tag != "" {
			wanted.Done++
		} else if wanted.Part == 0 {
			wanted.Part = i + 1
		}
	}
	_, final := errors.AsType[*contract.Refusal](u.failed)
	switch {
	case wanted.Part == 0:
		return slices.Clone(u.journal.ETags), nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case final || u.failed != nil && u.refused == nil:
		return nil, u.failed
	}
	return nil, wanted
}
