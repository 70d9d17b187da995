package endorsements

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/confidential-node/agent/firmware/contract"
)

const (
	// paceInterval between two requests: AMD's service answers 429 after very
	// few in a row, and asks for 10 seconds then.
	paceInterval = 10 * time.Second
	// maxPostpone bounds what the service may ask for, and what a pace.json
	// written under a wrong clock may cost.
	maxPostpone = time.Hour
	maxPace     = 4 << 10
)

// pace spaces the requests of all processes that share a cache. The next
// moment is on disk before the request it pays for goes out.
type pace struct {
	dir string
	now func() time.Time
}

type paceFile struct {
	// NotBefore is when AMD may be asked next.
	NotBefore time.Time `json:"not_before"`
}

func (p pace) lock() string { return filepath.Join(p.dir, "lock") }
func (p pace) file() string { return filepath.Join(p.dir, "pace.json") }

// next returns when AMD may be asked. What cannot be read costs one interval.
func (p pace) next(now time.Time) (time.Time, error) {
	raw, err := readFile(p.file(), maxPace)
	if errors.Is(err, fs.ErrNotExist) {
		return now, nil
	}
	if err != nil {
		return now, err
	}
	var f paceFile
	if err := contract.UnmarshalStrict(raw, maxPace, &f); err != nil {
		return now.Add(paceInterval), nil //nolint:nilerr // the next write repairs it
	}
	if f.NotBefore.After(now.Add(maxPostpone)) {
		return now.Add(paceInterval), nil
	}
	return f.NotBefore, nil
}

func (p pace) write(notBefore time.Time) error {
	raw, err := json.Marshal(paceFile{notBefore.UTC()})
	if err != nil {
		return fmt.Errorf("encoding pace: %w", err)
	}
	if err := renameio.WriteFile(p.file(), raw, 0o600); err != nil {
		return fmt.Errorf("writing pace: %w", err)
	}
	return nil
}

// take waits for a turn. A turn that lies after the context's deadline is
// refused at once.
func (p pace) take(ctx context.Context) error {
	for {
		var wait time.Duration
		err := locked(ctx, p.lock(), func() error {
			now := p.now()
			next, err := p.next(now)
			if err != nil {
				return err
			}
			if wait = next.Sub(now); wait > 0 {
				// What was judged to be damaged or absurd is replaced, or the
				// wait would begin anew each time.
				return p.write(next)
			}
			return p.write(now.Add(paceInterval))
		})
		if err != nil || wait <= 0 {
			return err
		}
		if deadline, ok := ctx.Deadline(); ok && time.Now().Add(wait).After(deadline) {
			return contract.Refuse("endorsements.rate-limited", "wait until then, or carry the certificates over with export and import",
				"AMD's key service may not be asked before %s", p.now().Add(wait).UTC().Format(time.RFC3339))
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}

// postpone makes everybody wait at least so long. It never shortens a wait.
func (p pace) postpone(ctx context.Context, d time.Duration) error {
	return locked(ctx, p.lock(), func() error {
		now := p.now()
		next, err := p.next(now)
		if err != nil {
			return err
		}
		if until := now.Add(min(max(d, paceInterval), maxPostpone)); until.After(next) {
			return p.write(until)
		}
		return nil
	})
}

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	return readLimited(f, limit)
}
