package blob

import (
	"errors"
	"fmt"
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

// taking takes from the budget, and looks after the disk, for what is written
// to it.
type taking struct {
	s       *Spools
	n, seen int64
}

// lookEvery is how many bytes are taken between two looks at the disk.
const lookEvery = 16 << 20

func (t *taking) Write(b []byte) (int, error) {
	if t.n-t.seen >= lookEvery {
		if err := t.s.fits(); err != nil {
			return 0, err
		}
		t.seen = t.n
	}
	if err := t.s.budget.take(int64(len(b))); err != nil {
		return 0, err
	}
	t.n += int64(len(b))
	return len(b), nil
}

// fits refuses to fill the disk: what is kept free is everybody else's, the
// agent's own records first.
func (s *Spools) fits() error {
	free, inodes, err := s.cfg.Space(s.dir)
	if err != nil {
		return fmt.Errorf("asking for free space: %w", err)
	}
	if free < keepBytes+lookEvery || inodes < keepInodes {
		return contract.Refuse("results.disk-full", "free space on the host's disk, or lower blob.spool_max_bytes; deliver again then",
			"the disk of the node has %d bytes and %d inodes left, which it keeps", free, inodes)
	}
	return nil
}

// swept removes from a spool what was cut off, and returns the bytes of what
// is complete, journals of uploads not counted. No spool has none.
func swept(dir string) (used int64, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if hidden := strings.HasPrefix(e.Name(), "."); hidden && strings.HasSuffix(e.Name(), partialSuffix) {
			if err := removed(path); err != nil {
				return 0, err
			}
			continue
		} else if hidden {
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
