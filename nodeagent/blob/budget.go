package blob

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/confidential-node/agent/firmware/contract"
)

// budget is what all spools together may hold, complete or being received.
type budget struct {
	max int64

	mu   sync.Mutex
	used int64
}

func (b *budget) take(n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n > b.max-b.used {
		return contract.Refuse("results.spools-full", "deliver again when other guests' results have left the host, or raise blob.spool_max_bytes",
			"the results that wait on this host have %d bytes together, which is all it keeps", b.used)
	}
	b.used += n
	return nil
}

func (b *budget) giveBack(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
}

// taking takes from a budget what is written to it.
type taking struct {
	budget *budget
	n      int64
}

func (t *taking) Write(b []byte) (int, error) {
	if err := t.budget.take(int64(len(b))); err != nil {
		return 0, err
	}
	t.n += int64(len(b))
	return len(b), nil
}

// swept removes from a spool what was cut off, and returns the bytes of what
// is complete. No spool has none.
func swept(dir string) (used int64, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasSuffix(e.Name(), partialSuffix) && strings.HasPrefix(e.Name(), ".") {
			if err := removed(path); err != nil {
				return 0, err
			}
			continue
		}
		size, err := sizeOf(path)
		if err != nil {
			return 0, err
		}
		used += size
	}
	return used, nil
}

// sizeOf is 0 for what is not there.
func sizeOf(path string) (int64, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
