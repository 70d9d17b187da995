package blob_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/nodeagent/blob"
)

func TestGuestsThatWantOneBlobFetchItOnce(t *testing.T) {
	t.Parallel()
	data := seal(t, 500_000)
	s, url := serve(t, data)
	c := open(t, t.TempDir())
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			if _, err := c.Fetch(t.Context(), ref(data, url), fmt.Sprintf("guest-%d", i), nil); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if s.asked != 8 {
		t.Errorf("asked %d times for 8 parts", s.asked)
	}
}

func TestAGuestWhoseURLExpiredDoesNotSpoilTheOther(t *testing.T) {
	t.Parallel()
	data := seal(t, 500_000)
	s, url := serve(t, data)
	reached, expired := make(chan struct{}), make(chan struct{})
	s.misbehave = func(n int, w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("expired") == "" {
			return false
		}
		if n == 1 {
			close(reached)
		}
		<-expired
		return status(w, http.StatusForbidden)
	}
	c := open(t, t.TempDir())
	first := make(chan error, 1)
	go func() {
		_, err := c.Fetch(t.Context(), ref(data, url+"&expired=1"), "guest-1", nil)
		first <- err
	}()
	<-reached
	// A third one gives up waiting; nobody else minds.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Fetch(ctx, ref(data, url), "guest-3", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting: %v", err)
	}
	close(expired)
	if _, err := c.Fetch(t.Context(), ref(data, url), "guest-2", nil); err != nil {
		t.Error(err)
	}
	if err := <-first; contract.AsRefusal(err).Code != "blob.url-expired" {
		t.Errorf("first: %v", err)
	}
}

// Guests come and go and the cache holds half of what they use: whatever one
// was given is there until it lets go.
func TestWhatAGuestHoldsIsNeverEvicted(t *testing.T) {
	t.Parallel()
	const blobs, guests, rounds = 4, 6, 15
	dir := t.TempDir()
	c := open(t, dir) // 1 MiB
	var data [blobs][]byte
	var urls [blobs]string
	for i := range data {
		data[i] = seal(t, 500_000)
		_, urls[i] = serve(t, data[i])
	}
	var all sync.WaitGroup
	for g := range guests {
		all.Go(func() {
			owner := fmt.Sprintf("guest-%d", g)
			for round := range rounds {
				i := (g + round) % blobs
				path, err := c.Fetch(t.Context(), ref(data[i], urls[i]), owner, nil)
				if err != nil && contract.AsRefusal(err).Code != "blob.cache-full" {
					t.Error(err)
				}
				if err == nil {
					if info, err := os.Stat(path); err != nil || info.Size() != int64(len(data[i])) {
						t.Errorf("%s holds a blob that is gone: %v", owner, err)
					}
				}
				if err := c.Release(owner); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

func TestIncompleteBlobsCountAndAreEvictedWhenNobodyClaimsThem(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := open(t, dir) // 1 MiB
	big, other := seal(t, 700_000), seal(t, 700_000)
	s, url := serve(t, big)
	_, otherURL := serve(t, other)
	s.misbehave = func(n int, w http.ResponseWriter, _ *http.Request) bool {
		return n > 3 && status(w, http.StatusForbidden)
	}
	if _, err := c.Fetch(t.Context(), ref(big, url), "guest-1", nil); contract.AsRefusal(err).Code != "blob.url-expired" {
		t.Fatal(err)
	}
	if _, err := c.Fetch(t.Context(), ref(other, otherURL), "guest-2", nil); contract.AsRefusal(err).Code != "blob.cache-full" {
		t.Errorf("the incomplete blob of guest-1 does not count: %v", err)
	}
	if err := c.Release("guest-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Fetch(t.Context(), ref(other, otherURL), "guest-2", nil); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "partial", "*")); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestABlobLargerThanTheCacheIsRefusedBeforeAnythingIsAsked(t *testing.T) {
	t.Parallel()
	data := seal(t, 1000)
	_, dataURL := serve(t, data)
	s, url := serve(t, []byte("x"))
	c := open(t, t.TempDir())
	if _, err := c.Fetch(t.Context(), ref(data, dataURL), "guest-1", nil); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1 << 20, math.MaxInt64} {
		r := blob.Ref{Size: size, URL: url}
		if _, err := c.Fetch(t.Context(), r, "guest-2", nil); contract.AsRefusal(err).Code != "blob.cache-full" {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if s.asked != 0 {
		t.Errorf("asked %d times", s.asked)
	}
}

// A power failure can keep the journal and lose a part; an upgrade can find
// what another version wrote.
func TestWhatAnEarlierAttemptLeftIsNotTrusted(t *testing.T) {
	t.Parallel()
	data := seal(t, 600_000)
	for name, harm := range map[string]func(partial, journal string) error{
		"lost bytes":         func(partial, _ string) error { return overwrite(partial, 100_000) },
		"lost first bytes":   func(partial, _ string) error { return overwrite(partial, 0) },
		"lost all bytes":     func(partial, _ string) error { return os.Remove(partial) },
		"torn journal":       func(_, journal string) error { return os.WriteFile(journal, []byte(`{"size":6`), 0o600) },
		"strange journal":    func(_, journal string) error { return os.WriteFile(journal, []byte(`{"done":[true]}`), 0o600) },
		"boastful journal":   func(_, journal string) error { return boast(journal, len(data), 10) },
		"impossible journal": func(_, journal string) error { return boast(journal, len(data), 1<<40) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, url := serve(t, data)
			s.misbehave = func(n int, w http.ResponseWriter, _ *http.Request) bool {
				return n > 5 && status(w, http.StatusForbidden)
			}
			r := ref(data, url)
			if _, err := open(t, dir).Fetch(t.Context(), r, "guest-1", nil); err == nil {
				t.Fatal("fetched although the URL expired")
			}
			partial := filepath.Join(dir, "partial", fmt.Sprintf("%x", r.SHA256))
			if err := harm(partial, partial+".json"); err != nil {
				t.Fatal(err)
			}
			s.mu.Lock()
			s.misbehave = nil
			s.mu.Unlock()
			path, err := open(t, dir).Fetch(t.Context(), r, "guest-1", nil)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if left, err := filepath.Glob(filepath.Join(dir, "partial", "*")); err != nil || len(left) > 0 {
				t.Errorf("left %v, %v", left, err)
			}
		})
	}
}

func overwrite(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, 1000), at)
	return errors.Join(err, f.Close())
}

func boast(path string, size, parts int) error {
	return os.WriteFile(path, fmt.Appendf(nil, `{"size":%d,"part_size":65536,"parts":%d}`, size, parts), 0o600)
}

func TestOnlyCompleteBlobsCanBeReadByOthers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, sub := range []string{"blobs", "partial", "owners"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a stricter umask's
		t.Fatal(err)
	}
	open(t, dir)
	for sub, want := range map[string]os.FileMode{"": 0o711, "blobs": 0o711, "partial": 0o700, "owners": 0o700} {
		if info, err := os.Stat(filepath.Join(dir, sub)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%q: %v %v, want %v", sub, info.Mode(), err, want)
		}
	}
}

func TestACacheNeedsABoundAndACheck(t *testing.T) {
	t.Parallel()
	for _, cfg := range []blob.Config{{CheckHeader: sealed.CheckHeader}, {MaxBytes: 1}} {
		if _, err := blob.Open(t.TempDir(), cfg, client(t), hclog.NewNullLogger()); err == nil {
			t.Errorf("%+v is accepted", cfg)
		}
	}
}
