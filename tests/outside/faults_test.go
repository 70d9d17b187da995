package outside_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/minio/minio-go/v7"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/tests/outside"
)

const (
	partSize = 128 << 10
	head     = "sealed:"
)

// unreliable is a store behind faults and the agent's cache and spools.
type unreliable struct {
	*stand
	faults *outside.Faults
	http   *http.Client
	dir    string
	space  func(string) (uint64, uint64, error)
	clock  func() time.Time
}

func newUnreliable(t *testing.T) *unreliable {
	t.Helper()
	u := &unreliable{stand: newStand(t), dir: t.TempDir()}
	u.faults = outside.NewFaults(u.store)
	u.server = httptest.NewTLSServer(u.faults)
	t.Cleanup(u.server.Close)
	u.client = u.account(accessKey, secretKey)
	transport, ok := u.server.Client().Transport.(*http.Transport)
	if !ok {
		t.Fatal("httptest's client has another transport")
	}
	u.http = blob.Client(transport)
	return u
}

func checkHead(r io.Reader) error {
	got := make([]byte, len(head))
	if _, err := io.ReadFull(r, got); err != nil {
		return err
	}
	if string(got) != head {
		return errors.New("no seal")
	}
	return nil
}

// cache opens the cache as an agent does that starts.
func (u *unreliable) cache() *blob.Cache {
	u.t.Helper()
	c, err := blob.Open(filepath.Join(u.dir, "cache"), blob.Config{
		MaxBytes: 64 << 20, Parts: 4, PartSize: partSize, CheckHeader: checkHead, Stall: 500 * time.Millisecond, Space: u.space, Clock: u.clock,
	}, u.http, hclog.NewNullLogger())
	if err != nil {
		u.t.Fatal(err)
	}
	return c
}

// sealedObject uploads an object of so many parts.
func (u *unreliable) sealedObject(key string, parts int) (data []byte, ref blob.Ref) {
	u.t.Helper()
	data = bytes.Repeat([]byte(key+" 0123456789abcdef"), parts*partSize/(len(key)+17)+1)[:parts*partSize-5]
	copy(data, head)
	u.putObject(key, data)
	return data, blob.Ref{SHA256: sha256.Sum256(data), Size: int64(len(data)), URL: u.presign(http.MethodGet, key, time.Hour)}
}

func (u *unreliable) putObject(key string, data []byte) {
	u.t.Helper()
	if _, err := u.client.PutObject(u.t.Context(), "bucket", key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{DisableMultipart: true}); err != nil {
		u.t.Fatal(err)
	}
	u.faults.Heal()
}

func TestFaultsOfADownloadAreRefusedByName(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		harm func(u *unreliable, data []byte)
		code string
	}{
		"corrupted":       {func(u *unreliable, _ []byte) { u.faults.Inject(1, outside.From(3), outside.Corrupt) }, "blob.digest-mismatch"},
		"shorter":         {func(u *unreliable, d []byte) { u.putObject("in", d[:len(d)-1]) }, "blob.size-mismatch"},
		"zero bytes":      {func(u *unreliable, _ []byte) { u.putObject("in", nil) }, "blob.size-mismatch"},
		"plaintext":       {func(u *unreliable, d []byte) { u.putObject("in", bytes.Repeat([]byte("x"), len(d))) }, "blob.not-sealed"},
		"5 TB":            {func(u *unreliable, _ []byte) { u.faults.Inject(0, outside.Any, outside.Claim(5<<40)) }, "blob.size-mismatch"},
		"expired mid-way": {func(u *unreliable, _ []byte) { u.faults.Inject(0, outside.From(3), outside.Status(403)) }, "blob.url-expired"},
		"another host": {func(u *unreliable, _ []byte) {
			u.faults.Inject(0, outside.From(2), outside.Status(307, "Location", "https://elsewhere.example/"))
		}, "blob.redirected"},
		"replaced for ever": {func(u *unreliable, _ []byte) { u.faults.Inject(0, outside.From(2), outside.Status(412)) }, "blob.replaced"},
		"another tag mid-way": {func(u *unreliable, _ []byte) {
			u.faults.Inject(0, outside.From(2), outside.Header("ETag", `"another"`))
		}, ""},
		"no such object": {func(u *unreliable, _ []byte) { u.faults.Inject(0, outside.Any, outside.Status(404)) }, "blob.not-found"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnreliable(t)
			data, ref := u.sealedObject("in", 6)
			c.harm(u, data)
			path, err := u.cache().Fetch(t.Context(), ref, "guest", nil)
			if c.code == "" {
				if got, readErr := os.ReadFile(path); err != nil || readErr != nil || !bytes.Equal(got, data) {
					t.Errorf("%v, %v", err, readErr)
				}
				return
			}
			if err == nil || contract.AsRefusal(err).Code != c.code {
				t.Fatalf("got %v, want %s", err, c.code)
			}
			if strings.Contains(err.Error(), "X-Amz") {
				t.Errorf("the URL is in the error: %v", err)
			}
			if left, err := filepath.Glob(filepath.Join(u.dir, "cache", "blobs", "*")); err != nil || len(left) > 0 {
				t.Errorf("handed over: %v %v", left, err)
			}
		})
	}
}

func TestFaultsOfADownloadThatPassAreOutlasted(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(u *unreliable){
		"slow down": func(u *unreliable) { u.faults.Inject(2, outside.Any, outside.Status(503)) },
		"reset":     func(u *unreliable) { u.faults.Inject(2, outside.Any, outside.Reset) },
		"truncated": func(u *unreliable) { u.faults.Inject(2, outside.Any, outside.ResetAfter(1000)) },
		"wrong Content-Range": func(u *unreliable) {
			u.faults.Inject(1, outside.Any, outside.Header("Content-Range", "bytes 5-9/786427"))
		},
		"reset at every part": func(u *unreliable) {
			first := map[string]bool{}
			u.faults.Inject(0, func(e outside.Exchange) bool {
				again := first[e.Range]
				first[e.Range] = true
				return !again
			}, outside.ResetAfter(500))
		},
		"drip": func(u *unreliable) {
			tick := time.NewTicker(20 * time.Millisecond)
			u.t.Cleanup(tick.Stop)
			u.faults.Inject(1, outside.Any, outside.Drip(func() bool {
				select {
				case <-tick.C:
					return true
				case <-u.t.Context().Done():
					return false
				}
			}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnreliable(t)
			data, ref := u.sealedObject("in", 6)
			harm(u)
			path, err := u.cache().Fetch(t.Context(), ref, "guest", nil)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

func TestAStoreThatAsksForTimeGetsIt(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	_, ref := u.sealedObject("in", 1)
	u.faults.Inject(1, outside.Any, outside.Status(503, "Retry-After", "1"))
	start := time.Now()
	if _, err := u.cache().Fetch(t.Context(), ref, "guest", nil); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < time.Second {
		t.Errorf("asked again after %s", took)
	}
}

func TestAURLThatEndsBeforeTheNextTryIsNotTriedAgain(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	_, ref := u.sealedObject("in", 1)
	ref.URL = u.presign(http.MethodGet, "in", 20*time.Second)
	u.faults.Inject(0, outside.Any, outside.Status(503, "Retry-After", "30"))
	if _, err := u.cache().Fetch(t.Context(), ref, "guest", nil); contract.AsRefusal(err).Code != "blob.url-expired" {
		t.Error(err)
	}
	if n := len(u.faults.Seen()); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestAURLEndsByTheAgentsTimeAndNotByTheHostsClock(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		off   time.Duration
		valid time.Duration
		asked int
		code  string
	}{
		"the agent says it has ended": {time.Hour, time.Hour, 1, "blob.url-expired"},
		"the agent says it is valid":  {-time.Hour, time.Second, 2, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnreliable(t)
			u.clock = func() time.Time { return time.Now().Add(tc.off) }
			_, ref := u.sealedObject("in", 1)
			ref.URL = u.presign(http.MethodGet, "in", tc.valid)
			u.faults.Inject(1, outside.Any, outside.Status(503, "Retry-After", "2"))
			if _, err := u.cache().Fetch(t.Context(), ref, "guest", nil); (err == nil) != (tc.code == "") || err != nil && contract.AsRefusal(err).Code != tc.code {
				t.Error(err)
			}
			if n := len(u.faults.Seen()); n != tc.asked {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// What is on disk is not asked for again by the next agent, whatever order it
// came in.
func TestAnAgentThatStartsAnewFetchesOnlyWhatIsMissing(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	data, ref := u.sealedObject("in", 12)
	const gap = "bytes=262144-393215" // the third part
	waiting := func(e outside.Exchange) bool { return e.Range == gap }
	u.faults.Inject(0, waiting, func(_ http.ResponseWriter, r *http.Request, _ http.Handler) { <-r.Context().Done() })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := u.cache().Fetch(ctx, ref, "guest", func(done, total int64) {
		if done >= total-partSize { // all but the third
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	u.faults.Heal()
	path, err := u.cache().Fetch(t.Context(), ref, "guest", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if seen := u.faults.Seen(); len(seen) != 1 || seen[0].Range != gap {
		t.Errorf("asked for %v", seen)
	}
}

// A download that hangs on all its connections takes nothing from another
// guest's.
func TestAHugeDownloadDoesNotStarveASmallOne(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	u.putObject("huge", append([]byte(head), bytes.Repeat([]byte("h"), 40*partSize)...))
	_, small := u.sealedObject("small", 2)
	huge := blob.Ref{SHA256: [32]byte{1}, Size: 40*partSize + int64(len(head)), URL: u.presign(http.MethodGet, "huge", time.Hour)}
	stuck := make(chan struct{}, 100)
	u.faults.Inject(4, func(e outside.Exchange) bool { return e.N > 1 }, func(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
		stuck <- struct{}{}
		<-r.Context().Done()
	})
	c := u.cache()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := c.Fetch(ctx, huge, "guest-1", nil)
		ended <- err
	}()
	for range 4 { // every connection the huge one may have
		<-stuck
	}
	if _, err := c.Fetch(t.Context(), small, "guest-2", nil); err != nil {
		t.Error(err)
	}
	select {
	case err := <-ended:
		t.Errorf("the huge download ended first: %v", err)
	default:
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestADiskTooSmallIsKnownBeforeAnythingIsAsked(t *testing.T) {
	t.Parallel()
	for name, space := range map[string]func(string) (uint64, uint64, error){
		"bytes":  func(string) (uint64, uint64, error) { return 64 << 20, 1 << 20, nil },
		"inodes": func(string) (uint64, uint64, error) { return 1 << 40, 3, nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnreliable(t)
			_, ref := u.sealedObject("in", 2)
			u.space = space
			_, err := u.cache().Fetch(t.Context(), ref, "guest", nil)
			if r := contract.AsRefusal(err); err == nil || r.Code != "blob.disk-full" || r.Remedy == "" {
				t.Errorf("%v", err)
			}
			if seen := u.faults.Seen(); len(seen) > 0 {
				t.Errorf("asked for %v", seen)
			}
		})
	}
}

func TestFaultsOfAnUpload(t *testing.T) {
	t.Parallel()
	const errorDocument = "<Error>\n<Code>SlowDown</Code></Error>"
	for name, c := range map[string]struct {
		fault func(u *unreliable) outside.Fault
		code  string // "" may pass
	}{
		"reset":             {always(outside.Reset), ""},
		"reset after bytes": {always(outside.ResetAfterReading(100_000)), ""},
		"slow down":         {always(outside.Status(503)), ""},
		"error document":    {always(outside.Say(200, errorDocument)), ""},
		"answered at once":  {always(outside.Early), ""},
		"a slow reader":     {func(u *unreliable) outside.Fault { return outside.SlowReader(u.ticking()) }, ""},
		"expired":           {always(outside.Status(403)), "blob.url-expired"},
		"no bucket":         {always(outside.Status(404)), "blob.not-found"},
		"another host":      {always(outside.Status(307, "Location", "https://elsewhere.example/")), "blob.redirected"},
		"too large":         {always(outside.Status(413)), "blob.store-answer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnreliable(t)
			s := u.spools()
			data, e := u.received(s, "guest", 12<<20)
			put := u.presign(http.MethodPut, "out", time.Hour)
			u.faults.Inject(1, outside.Method(http.MethodPut), c.fault(u))
			err := s.Upload(t.Context(), "guest", e, put)
			refused, final := errors.AsType[*contract.Refusal](err)
			if err == nil || final != (c.code != "") || final && refused.Code != c.code {
				t.Errorf("got %v, want %q", err, c.code)
			}
			harmless(t, err)
			if err := s.Upload(t.Context(), "guest", e, put); err != nil {
				t.Errorf("once the fault is gone: %v", err)
			}
			u.has("out", data)
		})
	}
}

func always(f outside.Fault) func(*unreliable) outside.Fault {
	return func(*unreliable) outside.Fault { return f }
}
