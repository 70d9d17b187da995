package outside_test

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/minio/minio-go/v7"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/tests/outside"
)

const parallel = 3

// spools opens the spools as an agent does that starts.
func (u *unreliable) spools() *blob.Spools {
	u.t.Helper()
	s, err := blob.OpenSpools(filepath.Join(u.dir, "spools"), blob.SpoolConfig{
		MaxBytes: 1 << 30, Parts: parallel, CheckHeader: checkHead, Stall: 2 * time.Second, Space: u.space,
	}, u.http, hclog.NewNullLogger())
	if err != nil {
		u.t.Fatal(err)
	}
	return s
}

// received is a result of so many bytes in a guest's spool.
func (u *unreliable) received(s *blob.Spools, guest string, size int) (data []byte, e blob.Entry) {
	u.t.Helper()
	spool, err := s.Open(guest, map[string]int64{"out": 1 << 30}, 1<<30)
	if err != nil {
		u.t.Fatal(err)
	}
	data = bytes.Repeat([]byte(guest+" 0123456789abcdef"), size/17+1)[:size]
	copy(data, head)
	if e, err = spool.Receive(u.t.Context(), "out", bytes.NewReader(data)); err != nil {
		u.t.Fatal(err)
	}
	return data, e
}

// multipart begins an upload in parts as whoever holds the store's keys does.
func (u *unreliable) multipart(key string) (uploadID string) {
	u.t.Helper()
	id, err := u.core().NewMultipartUpload(u.t.Context(), "bucket", key, minio.PutObjectOptions{})
	if err != nil {
		u.t.Fatal(err)
	}
	return id
}

func (u *unreliable) core() minio.Core { return minio.Core{Client: u.client} }

// grant signs the URLs of n parts.
func (u *unreliable) grant(key, uploadID string, first, n int, size int64, valid time.Duration) blob.Grant {
	u.t.Helper()
	g := blob.Grant{UploadID: uploadID, PartSize: size, FirstPart: first}
	for i := range n {
		signed, err := u.client.Presign(u.t.Context(), http.MethodPut, "bucket", key, valid, url.Values{
			"partNumber": {strconv.Itoa(first + i)}, "uploadId": {uploadID},
		})
		if err != nil {
			u.t.Fatal(err)
		}
		g.URLs = append(g.URLs, signed.String())
	}
	return g
}

// complete makes the object and compares.
func (u *unreliable) complete(key, uploadID string, etags []string, want []byte) {
	u.t.Helper()
	parts := make([]minio.CompletePart, len(etags))
	for i, tag := range etags {
		parts[i] = minio.CompletePart{PartNumber: i + 1, ETag: tag}
	}
	if _, err := u.core().CompleteMultipartUpload(u.t.Context(), "bucket", key, uploadID, parts, minio.PutObjectOptions{}); err != nil {
		u.t.Errorf("completing: %v", err)
		return
	}
	u.has(key, want)
}

func (u *unreliable) has(key string, want []byte) {
	u.t.Helper()
	objects, err := u.store.Objects()
	if err != nil || !bytes.Equal(objects["bucket/"+key], want) {
		u.t.Errorf("the store has %d bytes under %s of %v, not %d; %v", len(objects["bucket/"+key]), key, outside.Keys(objects), len(want), err)
	}
}

// puts counts the requests for each part.
func puts(seen []outside.Exchange) map[string]int {
	out := map[string]int{}
	for _, e := range seen {
		if e.Method == http.MethodPut {
			out[e.Part]++
		}
	}
	return out
}

func once(first, last int) map[string]int {
	out := map[string]int{}
	for i := first; i <= last; i++ {
		out[strconv.Itoa(i)] = 1
	}
	return out
}

// harmless fails a test when an error tells a URL.
func harmless(t *testing.T, err error) {
	t.Helper()
	if err != nil && strings.Contains(err.Error(), "X-Amz") {
		t.Errorf("the URL is in the error: %v", err)
	}
}

func TestAResultGoesUpInPartsOfARealSize(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	s := u.spools()
	const size = 5 << 20 // the least of S3
	data, e := u.received(s, "guest", 3*size+17)
	id := u.multipart("out")
	u.faults.Heal()
	etags, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 8, size, time.Hour))
	if err != nil || len(etags) != 4 {
		t.Fatal(etags, err)
	}
	if got := puts(u.faults.Seen()); !maps.Equal(got, once(1, 4)) {
		t.Errorf("put %v", got)
	}
	// A second time nothing is put.
	if again, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 8, size, time.Hour)); err != nil || !slices.Equal(again, etags) {
		t.Errorf("again: %v, %v", again, err)
	}
	if got := puts(u.faults.Seen()); !maps.Equal(got, once(1, 4)) {
		t.Errorf("put again %v", got)
	}
	u.complete("out", id, etags, data)
}

func TestFaultsOfAnUploadInPartsThatPassAreOutlasted(t *testing.T) {
	t.Parallel()
	all := outside.OncePerPart
	for name, harm := range map[string]func(u *unreliable){
		"reset at every part":            func(u *unreliable) { u.faults.Inject(0, all(), outside.Reset) },
		"reset in the midst of any part": func(u *unreliable) { u.faults.Inject(0, all(), outside.ResetAfterReading(50_000)) },
		"slow down":                      func(u *unreliable) { u.faults.Inject(0, all(), outside.Status(503)) },
		"200 and an error document": func(u *unreliable) {
			u.faults.Inject(0, all(), outside.Say(200, `<?xml version="1.0"?><Error><Code>InternalError</Code></Error>`))
		},
		"no ETag":           func(u *unreliable) { u.faults.Inject(0, all(), outside.Say(200, "")) },
		"an endless ETag":   func(u *unreliable) { u.faults.Inject(0, all(), outside.Header("ETag", strings.Repeat("e", 5000))) },
		"an ETag with XML":  func(u *unreliable) { u.faults.Inject(0, all(), outside.Header("ETag", `"</ETag>"`)) },
		"an answer at once": func(u *unreliable) { u.faults.Inject(1, all(), outside.Early) },
		"a slow reader": func(u *unreliable) {
			u.faults.Inject(1, all(), outside.SlowReader(u.ticking()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnreliable(t)
			s := u.spools()
			// More than sockets hold, for readers that do not read.
			const size, parts = 12 << 20, 3
			data, e := u.received(s, "guest", parts*size-5)
			id := u.multipart("out")
			harm(u)
			etags, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, parts, size, time.Hour))
			harmless(t, err)
			if err != nil {
				t.Fatal(err)
			}
			if len(u.faults.Seen()) < parts+1 {
				t.Error("there was no fault")
			}
			u.complete("out", id, etags, data)
		})
	}
}

// ticking is true every 20 ms till the test ends.
func (u *unreliable) ticking() func() bool {
	tick := time.NewTicker(20 * time.Millisecond)
	u.t.Cleanup(tick.Stop)
	return func() bool {
		select {
		case <-tick.C:
			return true
		case <-u.t.Context().Done():
			return false
		}
	}
}

func TestFaultsThatEndAnUploadInPartsAreTyped(t *testing.T) {
	t.Parallel()
	third := func(e outside.Exchange) bool { return e.Part == "3" }
	for name, c := range map[string]struct {
		fault  outside.Fault
		code   string
		wanted bool // another grant
	}{
		"403 mid-way":    {outside.Status(403), "blob.url-expired", true},
		"upload aborted": {outside.Status(404), "blob.not-found", true},
		"another host":   {outside.Status(307, "Location", "https://elsewhere.example/"), "blob.redirected", false},
		"too large":      {outside.Status(413), "blob.store-answer", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnreliable(t)
			s := u.spools()
			data, e := u.received(s, "guest", 6*partSize)
			id := u.multipart("out")
			u.faults.Inject(0, third, c.fault)
			_, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 6, partSize, time.Hour))
			harmless(t, err)
			wanted, is := errors.AsType[*blob.WantedError](err)
			switch {
			case is != c.wanted:
				t.Fatalf("got %v", err)
			case is && (wanted.Part != 3 || wanted.Done < 2 || wanted.Why == nil || wanted.Why.Code != c.code):
				t.Errorf("wanted %+v", wanted)
			case !is && contract.AsRefusal(err).Code != c.code:
				t.Errorf("got %v", err)
			}
			// Fresh URLs put what is missing and nothing else.
			before := puts(u.faults.Seen())
			u.faults.Heal()
			etags, err := u.spools().UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 6, partSize, time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			for part, n := range puts(u.faults.Seen()) {
				if n != 1 || before[part] > 0 && part != "3" {
					t.Errorf("part %s was put again", part)
				}
			}
			u.complete("out", id, etags, data)
		})
	}
}

func TestAGrantThatEndsOrExpiresWantsAnother(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	s := u.spools()
	data, e := u.received(s, "guest", 7*partSize+1)
	id := u.multipart("out")
	u.faults.Heal()
	next := 1
	for _, n := range []int{2, 4} {
		_, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, next, n, partSize, time.Hour))
		wanted, is := errors.AsType[*blob.WantedError](err)
		if next += n; !is || wanted.Part != next || wanted.Done != next-1 || wanted.Why != nil {
			t.Fatalf("got %v %+v, want part %d", err, wanted, next)
		}
	}
	old := u.grant("out", id, next, 2, partSize, time.Minute)
	u.now = u.now.Add(2 * time.Minute)
	_, err := s.UploadParts(t.Context(), "guest", e, old)
	harmless(t, err)
	if wanted, is := errors.AsType[*blob.WantedError](err); !is || wanted.Part != next || wanted.Why == nil || wanted.Why.Code != "blob.url-expired" {
		t.Errorf("expired: %v", err)
	}
	u.now = u.now.Add(-2 * time.Minute)
	// The store wants to be asked later than the URLs live.
	u.faults.Inject(0, outside.Any, outside.Status(503, "Retry-After", "30"))
	_, err = s.UploadParts(t.Context(), "guest", e, u.grant("out", id, next, 2, partSize, 20*time.Second))
	if wanted, is := errors.AsType[*blob.WantedError](err); !is || wanted.Part != next {
		t.Errorf("busy for longer than the URLs live: %v", err)
	}
	u.faults.Heal()
	etags, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, next, 2, partSize, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	u.complete("out", id, etags, data)
}

// An agent that ends in the midst of an upload has not put anything in vain.
func TestAnAgentThatStartsAnewPutsOnlyWhatIsMissing(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	s := u.spools()
	data, e := u.received(s, "guest", 12*partSize)
	id := u.multipart("out")
	u.faults.Heal()
	hanging := make(chan struct{}, 1)
	u.faults.Inject(1, func(e outside.Exchange) bool { return e.Part == "3" }, outside.Hang(hanging, nil))
	last := make(chan struct{})
	u.faults.Inject(1, func(e outside.Exchange) bool { return e.Part == "12" }, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(w, r)
		close(last)
	})
	ctx, die := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := s.UploadParts(ctx, "guest", e, u.grant("out", id, 1, 12, partSize, time.Hour))
		ended <- err
	}()
	<-hanging
	<-last
	die()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	u.faults.Heal()
	etags, err := u.spools().UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 12, partSize, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if got := puts(u.faults.Seen()); got["3"] != 1 || got["1"] != 0 || len(got) > parallel { // those in flight may have been cut off with their answers
		t.Errorf("put %v", got)
	}
	u.complete("out", id, etags, data)
	// The same name with other content begins anew.
	other, e := u.received(s, "guest", 12*partSize-1)
	id = u.multipart("out")
	u.faults.Heal()
	if etags, err = s.UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 12, partSize, time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := puts(u.faults.Seen()); len(got) != 12 {
		t.Errorf("put %v of another file", got)
	}
	u.complete("out", id, etags, other)
}

func TestADamagedJournalOfAnUploadIsBegunAnew(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	s := u.spools()
	data, e := u.received(s, "guest", 3*partSize)
	id := u.multipart("out")
	for _, text := range []string{"{", "{}", `{"upload_id":"` + id + `","part_size":131072,"size":393216,"sha256":"","etags":["a","b","c"]}`, strings.Repeat("x", 3<<20)} {
		if err := os.WriteFile(filepath.Join(u.dir, "spools", "guest", ".out.parts"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		u.faults.Heal()
		etags, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 3, partSize, time.Hour))
		if err != nil || !maps.Equal(puts(u.faults.Seen()), once(1, 3)) {
			t.Fatalf("%.20q: put %v, %v", text, puts(u.faults.Seen()), err)
		}
		if text == "{" {
			defer u.complete("out", id, etags, data)
		}
	}
}

// A store keeps what it likes; whoever completes an upload has to look.
func TestAPartThatIsShortIsSeenInTheObject(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	s := u.spools()
	data, e := u.received(s, "guest", 2*partSize)
	id := u.multipart("out")
	u.faults.Inject(1, outside.OncePerPart(), outside.Short(10))
	etags, err := s.UploadParts(t.Context(), "guest", e, u.grant("out", id, 1, 2, partSize, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	parts := []minio.CompletePart{{PartNumber: 1, ETag: etags[0]}, {PartNumber: 2, ETag: etags[1]}}
	if _, err := u.core().CompleteMultipartUpload(t.Context(), "bucket", "out", id, parts, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if info, err := u.client.StatObject(t.Context(), "bucket", "out", minio.StatObjectOptions{}); err != nil || info.Size != int64(len(data))-10 {
		t.Errorf("%d bytes, %v", info.Size, err)
	}
}

// One guest's upload hangs on all its connections, and has no more of them
// than it may: nobody else waits.
func TestAHugeUploadDoesNotStarveASmallOne(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	s := u.spools()
	_, huge := u.received(s, "guest-1", 40*partSize)
	data, small := u.received(s, "guest-2", 2*partSize)
	hugeID, smallID := u.multipart("huge"), u.multipart("small")
	u.faults.Heal()
	grant := u.grant("huge", hugeID, 1, 40, partSize, time.Hour)
	var mu sync.Mutex
	now, most := 0, 0
	step := func(by int) {
		mu.Lock()
		defer mu.Unlock()
		now += by
		most = max(most, now)
	}
	stuck := make(chan struct{}, 100)
	release := make(chan struct{})
	u.faults.Inject(0, func(e outside.Exchange) bool { return e.Part != "" }, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.URL.Path != "/bucket/huge" {
			next.ServeHTTP(w, r)
			return
		}
		step(1)
		defer step(-1)
		outside.Hang(stuck, release)(w, r, next)
	})
	ended := make(chan error, 1)
	go func() {
		_, err := s.UploadParts(t.Context(), "guest-1", huge, grant)
		ended <- err
	}()
	for range parallel {
		<-stuck
	}
	etags, err := s.UploadParts(t.Context(), "guest-2", small, u.grant("small", smallID, 1, 2, partSize, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		t.Errorf("the huge upload ended first: %v", err)
	default:
	}
	u.complete("small", smallID, etags, data)
	close(release)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if most != parallel {
		t.Errorf("one guest had %d connections, not %d", most, parallel)
	}
}

// A store says when it wants to be asked again; who uploads a whole file has
// to know.
func TestAnUploadTellsWhenTheStoreWantsToBeAskedAgain(t *testing.T) {
	t.Parallel()
	u := newUnreliable(t)
	s := u.spools()
	data, e := u.received(s, "guest", partSize)
	put := u.presign(http.MethodPut, "out", time.Hour)
	u.faults.Inject(1, outside.Any, outside.Status(503, "Retry-After", "7"))
	if err := s.Upload(t.Context(), "guest", e, put); blob.RetryAfter(err) != 7*time.Second {
		t.Errorf("%v: after %s", err, blob.RetryAfter(err))
	}
	id := u.multipart("parts")
	u.faults.Inject(1, func(e outside.Exchange) bool { return e.Part == "1" }, outside.Status(503, "Retry-After", "1"))
	begin := time.Now()
	etags, err := s.UploadParts(t.Context(), "guest", e, u.grant("parts", id, 1, 1, partSize, time.Hour))
	if took := time.Since(begin); err != nil || took < time.Second {
		t.Fatalf("put again after %s: %v", took, err)
	}
	u.complete("parts", id, etags, data)
}
