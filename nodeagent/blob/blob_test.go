package blob_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/nodeagent/blob"
)

// seal makes an age file of about n bytes.
func seal(tb testing.TB, n int) []byte {
	tb.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		tb.Fatal(err)
	}
	plain := make([]byte, n)
	if _, err := rand.Read(plain); err != nil {
		tb.Fatal(err)
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, id.Recipient())
	if err != nil {
		tb.Fatal(err)
	}
	_, writeErr := w.Write(plain)
	if err := errors.Join(writeErr, w.Close()); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

// store is an object store with one object that behaves as told.
type store struct {
	mu    sync.Mutex
	data  []byte
	etag  string
	asked int
	// misbehave may answer a request itself; it gets the number of the request.
	misbehave func(n int, w http.ResponseWriter, r *http.Request) bool
}

func (s *store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.asked++
	n, data, etag, misbehave := s.asked, s.data, s.etag, s.misbehave
	s.mu.Unlock()
	if misbehave != nil && misbehave(n, w, r) {
		return
	}
	w.Header().Set("ETag", etag)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

func serve(tb testing.TB, data []byte) (*store, string) {
	tb.Helper()
	s := &store{data: data, etag: `"1"`}
	server := httptest.NewTLSServer(s)
	tb.Cleanup(server.Close)
	return s, server.URL + "/object?X-Amz-Signature=SECRETSIGNATURE"
}

// client trusts httptest's servers.
func client(tb testing.TB) *http.Client {
	tb.Helper()
	server := httptest.NewTLSServer(http.NotFoundHandler())
	tb.Cleanup(server.Close)
	transport, ok := server.Client().Transport.(*http.Transport)
	if !ok {
		tb.Fatal("httptest's client has another transport")
	}
	return blob.Client(transport)
}

func open(tb testing.TB, dir string) *blob.Cache {
	tb.Helper()
	c, err := blob.Open(dir, blob.Config{MaxBytes: 1 << 20, Parts: 4, PartSize: 64 << 10, CheckHeader: sealed.CheckHeader, Stall: 300 * time.Millisecond},
		client(tb), hclog.NewNullLogger())
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func TestAHalfWrittenJournalIsClearedAway(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	open(t, dir)
	half, whole := filepath.Join(dir, "partial", "aa.json.new"), filepath.Join(dir, "partial", "aa.json")
	for _, file := range []string{half, whole} {
		if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open(t, dir)
	if left, err := filepath.Glob(filepath.Join(dir, "partial", "*")); err != nil || len(left) != 1 || left[0] != whole {
		t.Errorf("left %v, %v", left, err)
	}
}

func ref(data []byte, url string) blob.Ref {
	return blob.Ref{SHA256: sha256.Sum256(data), Size: int64(len(data)), URL: url}
}

func TestABlobIsFetchedOnceAndKeptWhileOwned(t *testing.T) {
	t.Parallel()
	data := seal(t, 500_000)
	s, url := serve(t, data)
	c := open(t, t.TempDir())
	var last int64
	for _, owner := range []string{"guest-1", "guest-2"} {
		path, err := c.Fetch(t.Context(), ref(data, url), owner, func(done, _ int64) { last = done })
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		info, statErr := os.Stat(path)
		if errors.Join(err, statErr) != nil || !bytes.Equal(got, data) || info.Mode().Perm() != 0o444 {
			t.Errorf("blob of %d bytes, mode %v, %v", len(got), info.Mode(), err)
		}
	}
	if s.asked != 8 || last != int64(len(data)) {
		t.Errorf("asked %d times for 8 parts, progress ended at %d", s.asked, last)
	}
	// Another blob needs the room: as long as one owner is left, it is refused.
	other := seal(t, 700_000)
	_, otherURL := serve(t, other)
	for _, owner := range []string{"guest-1", "guest-2"} {
		if _, err := c.Fetch(t.Context(), ref(other, otherURL), "guest-3", nil); contract.AsRefusal(err).Code != "blob.cache-full" {
			t.Errorf("a blob in use was evicted: %v", err)
		}
		if err := c.Release(owner); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Fetch(t.Context(), ref(other, otherURL), "guest-3", nil); err != nil {
		t.Errorf("nothing is evicted: %v", err)
	}
	if owners, err := c.Owners(); err != nil || len(owners) != 1 {
		t.Errorf("owners %v %v", owners, err)
	}
}

func TestWhatIsNotTheSealedBlobIsRefusedAndNothingIsLeft(t *testing.T) {
	t.Parallel()
	data := seal(t, 300_000)
	changed := bytes.Clone(data)
	changed[len(changed)-5] ^= 1
	for name, c := range map[string]struct {
		serve []byte
		ref   func(r *blob.Ref)
		bad   func(n int, w http.ResponseWriter, r *http.Request) bool
		code  string
	}{
		"other bytes": {serve: changed, code: "blob.digest-mismatch"},
		"longer":      {serve: append(bytes.Clone(data), 0), code: "blob.size-mismatch"},
		"shorter":     {serve: data[:len(data)-1], code: "blob.size-mismatch"},
		"empty":       {serve: []byte{}, code: "blob.size-mismatch"},
		"plaintext":   {serve: bytes.Repeat([]byte("secret\n"), 1000), ref: func(r *blob.Ref) { *r = ref(bytes.Repeat([]byte("secret\n"), 1000), r.URL) }, code: "blob.not-sealed"},
		"expired":     {serve: data, bad: func(n int, w http.ResponseWriter, _ *http.Request) bool { return n > 2 && status(w, 403) }, code: "blob.url-expired"},
		"gone":        {serve: data, bad: func(_ int, w http.ResponseWriter, _ *http.Request) bool { return status(w, 404) }, code: "blob.not-found"},
		"odd answer":  {serve: data, bad: func(_ int, w http.ResponseWriter, _ *http.Request) bool { return status(w, 418) }, code: "blob.store-answer"},
		"ignores range": {serve: data, bad: func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Length", strconv.Itoa(len(data)))
			w.Header().Set("ETag", "x")
			_, _ = w.Write(data)
			return true
		}, code: "blob.no-ranges"},
		"elsewhere": {serve: data, bad: func(_ int, w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
			return true
		}, code: "blob.redirected"},
		"nowhere": {serve: data, bad: func(_ int, w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Location", "%zz?"+r.URL.RawQuery)
			return status(w, http.StatusTemporaryRedirect)
		}, code: "blob.redirected"},
		"unsatisfied": {serve: data, bad: func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", "bytes */7")
			return status(w, http.StatusRequestedRangeNotSatisfiable)
		}, code: "blob.size-mismatch"},
		"in the clear": {serve: data, ref: func(r *blob.Ref) { r.URL = strings.Replace(r.URL, "https:", "http:", 1) }, code: "blob.url-malformed"},
		"with a user":  {serve: data, ref: func(r *blob.Ref) { r.URL = strings.Replace(r.URL, "https://", "https://SECRETSIGNATURE@", 1) }, code: "blob.url-malformed"},
		"no URL":       {serve: data, ref: func(r *blob.Ref) { r.URL = "https://%zz/SECRETSIGNATURE" }, code: "blob.url-malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, url := serve(t, c.serve)
			s.misbehave = c.bad
			r := ref(data, url)
			if c.ref != nil {
				c.ref(&r)
			}
			dir := t.TempDir()
			_, err := open(t, dir).Fetch(t.Context(), r, "guest-1", nil)
			if err == nil || contract.AsRefusal(err).Code != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
			if err != nil && strings.Contains(err.Error(), "SECRETSIGNATURE") {
				t.Errorf("the URL is in the error: %v", err)
			}
			if left, err := filepath.Glob(filepath.Join(dir, "blobs", "*")); err != nil || len(left) > 0 {
				t.Errorf("left %v %v", left, err)
			}
			if kept, err := os.ReadFile(filepath.Join(dir, "partial", fmt.Sprintf("%x", r.SHA256))); err == nil && bytes.Contains(kept, []byte("secret")) {
				t.Error("plaintext is on the disk")
			}
		})
	}
}

func TestAWeakETagPinsNothing(t *testing.T) {
	t.Parallel()
	data := seal(t, 300_000)
	s, url := serve(t, data)
	s.etag = `W/"1"` // ServeContent compares as RFC 9110 says: If-Match never matches it
	if _, err := open(t, t.TempDir()).Fetch(t.Context(), ref(data, url), "guest-1", nil); err != nil {
		t.Error(err)
	}
}

func status(w http.ResponseWriter, code int) bool {
	w.WriteHeader(code)
	return true
}

func TestAFetchGoesOnWhereItStopped(t *testing.T) {
	t.Parallel()
	data := seal(t, 600_000)
	s, url := serve(t, data)
	dir := t.TempDir()
	s.misbehave = func(n int, w http.ResponseWriter, _ *http.Request) bool { return n > 5 && status(w, 403) }
	if _, err := open(t, dir).Fetch(t.Context(), ref(data, url), "guest-1", nil); err == nil {
		t.Fatal("fetched although the URL expired")
	}
	s.mu.Lock()
	s.misbehave, s.asked = nil, 0
	s.mu.Unlock()
	if _, err := open(t, dir).Fetch(t.Context(), ref(data, url), "guest-1", nil); err != nil {
		t.Fatal(err)
	}
	// What the refusal cut off is asked for again, the rest is not.
	if s.asked > 9 {
		t.Errorf("asked for %d parts of 10 although some were there", s.asked)
	}
}

func TestTroubleThatPassesIsOutlasted(t *testing.T) {
	t.Parallel()
	data := seal(t, 200_000)
	for name, trouble := range map[string]func(n int, w http.ResponseWriter, r *http.Request) bool{
		"slow down": func(n int, w http.ResponseWriter, _ *http.Request) bool { return n <= 2 && status(w, 503) },
		"reset": func(n int, _ http.ResponseWriter, _ *http.Request) bool {
			if n <= 2 {
				panic(http.ErrAbortHandler)
			}
			return false
		},
		"drip": func(n int, w http.ResponseWriter, r *http.Request) bool {
			if n > 1 {
				return false
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", 64<<10-1, len(data)))
			w.Header().Set("Content-Length", strconv.Itoa(64<<10))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(data[:10])
			w.(http.Flusher).Flush() //nolint:errcheck,forcetypeassert // it is one
			<-r.Context().Done()
			return true
		},
		"cut short": func(n int, w http.ResponseWriter, _ *http.Request) bool {
			if n > 1 {
				return false
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", 64<<10-1, len(data)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(data[:10])
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, url := serve(t, data)
			s.misbehave = trouble
			if _, err := open(t, t.TempDir()).Fetch(t.Context(), ref(data, url), "guest-1", nil); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAnObjectReplacedMeanwhileIsBegunAnewOnce(t *testing.T) {
	t.Parallel()
	data := seal(t, 400_000)
	s, url := serve(t, bytes.Repeat([]byte{0}, len(data)))
	copy(s.data, data[:1000])
	s.misbehave = func(n int, _ http.ResponseWriter, _ *http.Request) bool {
		if n == 2 { // the first part was the old object's
			s.mu.Lock()
			s.data, s.etag = data, `"2"`
			s.mu.Unlock()
		}
		return false
	}
	if _, err := open(t, t.TempDir()).Fetch(t.Context(), ref(data, url), "guest-1", nil); err != nil {
		t.Error(err)
	}
	s.misbehave = func(n int, _ http.ResponseWriter, _ *http.Request) bool {
		s.mu.Lock()
		s.etag = strconv.Itoa(n)
		s.mu.Unlock()
		return false
	}
	if _, err := open(t, t.TempDir()).Fetch(t.Context(), ref(data, url), "guest-1", nil); contract.AsRefusal(err).Code != "blob.replaced" {
		t.Errorf("an object that keeps changing: %v", err)
	}
}

// BenchmarkFetch against BenchmarkPlainGet shows what verification costs.
func BenchmarkFetch(b *testing.B) {
	data := seal(b, 64<<20)
	_, url := serve(b, data)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		c, err := blob.Open(b.TempDir(), blob.Config{MaxBytes: 1 << 30, CheckHeader: sealed.CheckHeader},
			client(b), hclog.NewNullLogger())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Fetch(b.Context(), ref(data, url), "o", nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPlainGet(b *testing.B) {
	plain := client(b)
	data := seal(b, 64<<20)
	_, url := serve(b, data)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		file, err := os.CreateTemp(b.TempDir(), "")
		if err != nil {
			b.Fatal(err)
		}
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, url, http.NoBody)
		if err != nil {
			b.Fatal(err)
		}
		resp, err := plain.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		// Without the file's ReadFrom: over TLS nothing can be spliced.
		_, err = io.Copy(struct{ io.Writer }{file}, resp.Body)
		if err := errors.Join(err, resp.Body.Close(), file.Sync(), file.Close()); err != nil {
			b.Fatal(err)
		}
	}
}
