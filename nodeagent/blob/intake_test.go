package blob_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/nodeagent/blob"
)

// endless is a sealed head and then zeros for ever.
func endless(head []byte, read *atomic.Int64) io.Reader {
	return io.MultiReader(bytes.NewReader(head), counted{read})
}

type counted struct{ n *atomic.Int64 }

func (c counted) Read(p []byte) (int, error) {
	clear(p)
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// used are the bytes of all results below a folder, complete or not.
func used(t *testing.T, dir string) (size int64, files int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasSuffix(e.Name(), ".sums") {
			return err
		}
		info, err := e.Info()
		if err == nil {
			size += info.Size()
			files++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return size, files
}

// A flood of results ends typed, whatever form it has, and the disk has no
// more of it than the quota.
func TestAFloodOfResultsEndsTypedAndBounded(t *testing.T) {
	t.Parallel()
	head := seal(t, 1000)
	const quota = 4 << 20
	names := unlimited(contract.ResultsManifestName)
	for i := range contract.MaxResults {
		names[fmt.Sprintf("r%d", i)] = 1 << 30
	}
	for name, c := range map[string]struct {
		deliver func(s *blob.Spool, i int) error
		most    int64 // read
		code    string
	}{
		"one without end": {nil, quota + 2<<20, "results.quota"},
		"thousands of tiny ones": {func(s *blob.Spool, i int) error {
			_, err := s.Receive(t.Context(), fmt.Sprintf("r%d", i%contract.MaxResults), bytes.NewReader(head))
			return err
		}, 0, "results.too-often"},
		"thousands that nobody named": {func(s *blob.Spool, i int) error {
			_, err := s.Receive(t.Context(), fmt.Sprintf("x%d", i), bytes.NewReader(head))
			return err
		}, 0, "results.unknown-name"},
		"the whole quota again and again": {func(s *blob.Spool, _ int) error {
			_, err := s.Receive(t.Context(), "r0", io.MultiReader(bytes.NewReader(head), io.LimitReader(counted{new(atomic.Int64)}, quota-int64(len(head)))))
			return err
		}, 0, "results.too-often"},
		"broken off again and again": {func(s *blob.Spool, _ int) error {
			_, err := s.Receive(t.Context(), "r0", io.MultiReader(bytes.NewReader(head), errorReader{}))
			if contract.AsRefusal(err).Code == "internal" {
				err = nil // the guest may deliver again
			}
			return err
		}, 0, "results.too-often"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, err := blob.OpenSpools(dir, blob.SpoolConfig{MaxBytes: 1 << 30, CheckHeader: sealed.CheckHeader}, client(t), hclog.NewNullLogger())
			if err != nil {
				t.Fatal(err)
			}
			spool, err := s.Open("guest-1", names, quota)
			if err != nil {
				t.Fatal(err)
			}
			var read atomic.Int64
			if c.deliver == nil {
				c.deliver = func(s *blob.Spool, _ int) error {
					_, err := s.Receive(t.Context(), "r0", endless(head, &read))
					return err
				}
			}
			for i := 0; err == nil && i < 10_000; i++ {
				err = c.deliver(spool, i)
			}
			if r := contract.AsRefusal(err); err == nil || r.Code != c.code || r.Remedy == "" {
				t.Errorf("ended with %v, want %s", err, c.code)
			}
			if c.most > 0 && read.Load() > c.most {
				t.Errorf("%d bytes were read", read.Load())
			}
			if size, files := used(t, dir); size > quota || files > len(names) {
				t.Errorf("%d files of %d bytes are left", files, size)
			}
		})
	}
}

func TestAResultLargerThanItsUploadCarriesIsRefused(t *testing.T) {
	t.Parallel()
	s, data := spools(t), seal(t, 10_000)
	spool, err := s.Open("guest-1", map[string]int64{"put": int64(len(data)) - 1, "parts": 1 << 40}, 1<<41)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := spool.Receive(t.Context(), "put", bytes.NewReader(data)); contract.AsRefusal(err).Code != "results.too-large" {
		t.Error(err)
	}
	if _, err := spool.Receive(t.Context(), "parts", bytes.NewReader(data)); err != nil {
		t.Error(err)
	}
}

// A digest is known from the receipt; without it, or when it is another file's,
// the file is read. What the disk damaged does not leave as if it were whole.
func TestTheDigestOfAResultIsKeptFromItsReceipt(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		harm    func(sums string) error
		trusted bool
	}{
		"kept": {func(string) error { return nil }, true},
		"lost": {os.Remove, false},
		"torn": {func(sums string) error { return os.Truncate(sums, 10) }, false},
		"of other size": {func(sums string) error {
			return os.WriteFile(sums, fmt.Appendf(nil, `{"sha256":"%064d","crc32c":1,"size":7}`, 0), 0o600)
		}, false},
		"no digest": {func(sums string) error {
			return os.WriteFile(sums, []byte(`{"sha256":"00","crc32c":1,"size":7}`), 0o600)
		}, false},
		"endless": {func(sums string) error { return os.WriteFile(sums, make([]byte, 1<<20), 0o600) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, data := t.TempDir(), seal(t, 100_000)
			open := func() (*blob.Spools, *blob.Spool) {
				s, err := blob.OpenSpools(dir, blob.SpoolConfig{MaxBytes: 1 << 30, CheckHeader: sealed.CheckHeader}, client(t), hclog.NewNullLogger())
				if err != nil {
					t.Fatal(err)
				}
				spool, err := s.Open("guest-1", unlimited("a"), 1<<30)
				if err != nil {
					t.Fatal(err)
				}
				return s, spool
			}
			_, spool := open()
			received, err := spool.Receive(t.Context(), "a", bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "guest-1", "a")
			flipped := bytes.Clone(data)
			flipped[len(flipped)/2] ^= 1
			if err := errors.Join(c.harm(filepath.Join(dir, "guest-1", ".a.sums")), os.WriteFile(path, flipped, 0o600)); err != nil {
				t.Fatal(err)
			}
			s, spool := open()
			entries, err := spool.Entries()
			if err != nil || len(entries) != 1 || (entries[0] == received) != c.trusted {
				t.Fatalf("%+v, %v", entries, err)
			}
			if err := s.Upload(t.Context(), "guest-1", received, sink(t)); contract.AsRefusal(err).Code != "results.spool-damaged" {
				t.Errorf("damaged: %v", err)
			}
			// One that is delivered again has its own digest.
			again, err := spool.Receive(t.Context(), "a", bytes.NewReader(flipped))
			if err != nil || again == received {
				t.Fatal(again, err)
			}
			if entries, err := spool.Entries(); err != nil || len(entries) != 1 || entries[0] != again {
				t.Errorf("delivered again: %+v, %v", entries, err)
			}
			if err := s.Upload(t.Context(), "guest-1", again, sink(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

// The disk is looked at before a result is taken and while it streams in:
// what it keeps for everybody else is never written.
func TestResultsLeaveTheDiskItsReserve(t *testing.T) {
	t.Parallel()
	head := seal(t, 1000)
	const first = 100 << 20 // free
	for name, c := range map[string]struct {
		space func(looks int64) (uint64, uint64, error)
		code  string
		most  int64
	}{
		"full before":           {func(int64) (uint64, uint64, error) { return 64 << 20, 1 << 20, nil }, "results.disk-full", 0},
		"out of inodes":         {func(int64) (uint64, uint64, error) { return first, 3, nil }, "results.disk-full", 0},
		"full meanwhile":        {func(n int64) (uint64, uint64, error) { return first >> min(n, 3), 1 << 20, nil }, "results.disk-full", 40 << 20},
		"nobody knows":          {func(int64) (uint64, uint64, error) { return 0, 0, errors.New("i/o error") }, "internal", 0},
		"room for all of quota": {func(int64) (uint64, uint64, error) { return first, 1 << 20, nil }, "results.quota", 65 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var looks, read atomic.Int64
			s, err := blob.OpenSpools(dir, blob.SpoolConfig{
				MaxBytes: 1 << 30, CheckHeader: sealed.CheckHeader,
				Space: func(string) (uint64, uint64, error) { return c.space(looks.Add(1) - 1) },
			}, client(t), hclog.NewNullLogger())
			if err != nil {
				t.Fatal(err)
			}
			spool, err := s.Open("guest-1", unlimited("a"), 64<<20)
			if err != nil {
				t.Fatal(err)
			}
			_, err = spool.Receive(t.Context(), "a", endless(head, &read))
			if contract.AsRefusal(err).Code != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
			if read.Load() > c.most || strings.Contains(fmt.Sprint(err), dir) {
				t.Errorf("%d bytes were read, %v", read.Load(), err)
			}
			if size, files := used(t, dir); size > 0 || files > 0 {
				t.Errorf("%d files of %d bytes are left", files, size)
			}
		})
	}
}
