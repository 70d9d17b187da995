package metadata

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/confidential-node/agent/firmware/contract"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sink keeps what it is given, under a quota.
type sink struct {
	mu       sync.Mutex
	statuses []contract.GuestStatus
	results  map[string]string
	manifest []string
	quota    int64
	fail     error
	started  chan struct{} // when set, told that a result began
}

func (s *sink) Status(_ context.Context, st contract.GuestStatus) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.statuses = append(s.statuses, st)
	return s.fail
}

func (s *sink) Result(_ context.Context, name string, r io.Reader) error {
	if s.started != nil {
		s.started <- struct{}{}
	}
	data, err := io.ReadAll(io.LimitReader(r, s.quota+1))
	if err != nil {
		return fmt.Errorf("spooling: %w", err)
	}
	if int64(len(data)) > s.quota {
		return contract.Refuse("results.quota", "write less", "more than %d bytes", s.quota)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.results == nil {
		s.results = map[string]string{}
	}
	s.results[name] = string(data)
	return s.fail
}

func (s *sink) ResultManifest(_ context.Context, signed []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	s.manifest = append(s.manifest, string(signed))
	return nil
}

func testSession(x *sink) Session {
	return Session{
		ID: "guest-1", Device: "na00000001", Peer: netip.MustParseAddr("127.0.0.1"), Manifest: []byte(`{"version":1}`),
		Network:      func() contract.NetworkFacts { return contract.NetworkFacts{Address: "10.213.0.2/30"} },
		Endorsements: func() contract.Endorsements { return contract.Endorsements{VCEK: []byte("vcek")} },
		Boot:         contract.BootComponents{Cmdline: "quiet"}, Sink: x, Results: []string{"out.age", "log.age"},
	}
}

func newTestSession(x *sink) *session {
	if x.quota == 0 {
		x.quota = 1 << 20
	}
	return newSession(testSession(x), hclog.NewNullLogger(), time.Now)
}

func request(method, target, body string) *http.Request {
	r := httptest.NewRequestWithContext(context.Background(), method, target, strings.NewReader(body))
	if body == "" {
		r.Body, r.ContentLength = http.NoBody, 0
	}
	r.Header.Set(contract.MetadataHeader, contract.MetadataToken)
	return r
}

func call(h http.Handler, r *http.Request) (int, string) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// code is the refusal's code in an answer.
func code(body string) string {
	var r contract.Refusal
	if json.Unmarshal([]byte(body), &r) != nil || r.Remedy == "" {
		return "not a refusal: " + body
	}
	return r.Code
}

func TestQuestionsAreAnswered(t *testing.T) {
	t.Parallel()
	s := newTestSession(&sink{})
	s.now = func() time.Time { return time.Unix(1_800_000_000, 0) }
	for path, want := range map[string]string{
		contract.PathManifest:     `{"version":1}`,
		contract.PathNetwork:      `{"address":"10.213.0.2/30","gateway":"","unix_time":1800000000}`,
		contract.PathEndorsements: `{"vcek":"dmNlaw=="}`,
	} {
		if status, body := call(s, request("GET", path, "")); status != 200 || body != want {
			t.Errorf("%s is %d %s", path, status, body)
		}
	}
	_, body := call(s, request("GET", contract.PathBoot, ""))
	var boot contract.BootComponents
	if err := json.Unmarshal([]byte(body), &boot); err != nil || boot.Cmdline != "quiet" {
		t.Errorf("boot is %s, %v", body, err)
	}
}

func TestStrayRequestsAreRefused(t *testing.T) {
	t.Parallel()
	manifest := func(change func(*http.Request)) *http.Request {
		r := request("GET", contract.PathManifest, "")
		change(r)
		return r
	}
	for name, c := range map[string]struct {
		r    *http.Request
		want string
	}{
		"no token":       {manifest(func(r *http.Request) { r.Header.Del(contract.MetadataHeader) }), "metadata.token"},
		"wrong token":    {manifest(func(r *http.Request) { r.Header.Set(contract.MetadataHeader, "2") }), "metadata.token"},
		"two tokens":     {manifest(func(r *http.Request) { r.Header.Add(contract.MetadataHeader, "1") }), "metadata.token"},
		"forwarded":      {manifest(func(r *http.Request) { r.Header.Set("X-Forwarded-For", "10.0.0.1") }), "metadata.malformed"},
		"from a browser": {manifest(func(r *http.Request) { r.Header.Set("Origin", "https://a") }), "metadata.malformed"},
		"expecting":      {manifest(func(r *http.Request) { r.Header.Set("Expect", "100-continue") }), "metadata.malformed"},
		"a trailer":      {manifest(func(r *http.Request) { r.Trailer = http.Header{"A": nil} }), "metadata.malformed"},
		"chunked status": {func() *http.Request {
			r := request("POST", contract.PathStatus, "{}")
			r.TransferEncoding = []string{"chunked"}
			return r
		}(), "metadata.malformed"},
		"HTTP/1.0":        {manifest(func(r *http.Request) { r.ProtoMinor = 0 }), "metadata.malformed"},
		"a proxy's":       {request("GET", "http://elsewhere"+contract.PathManifest, ""), "metadata.malformed"},
		"encoded path":    {request("GET", "/v1/%6danifest", ""), "metadata.malformed"},
		"query":           {request("GET", contract.PathManifest+"?a=1", ""), "metadata.malformed"},
		"empty query":     {request("GET", contract.PathManifest+"?", ""), "metadata.malformed"},
		"body":            {request("GET", contract.PathManifest, "x"), "metadata.malformed"},
		"no path":         {request("GET", "/", ""), "metadata.path"},
		"trailing slash":  {request("GET", contract.PathManifest+"/", ""), "metadata.path"},
		"dots":            {request("GET", "/v1/../v1/manifest", ""), "metadata.path"},
		"double slash":    {request("GET", "//v1/manifest", ""), "metadata.path"},
		"wrong method":    {request("POST", contract.PathManifest, "x"), "metadata.method"},
		"HEAD":            {request("HEAD", contract.PathManifest, ""), "metadata.method"},
		"get a result":    {request("GET", contract.PathResults+"out.age", ""), "metadata.method"},
		"unknown result":  {request("PUT", contract.PathResults+"other", "x"), "metadata.result-name"},
		"nameless result": {request("PUT", contract.PathResults, "x"), "metadata.result-name"},
		"result climbing": {request("PUT", contract.PathResults+"../out.age", "x"), "metadata.result-name"},
		"encoded result":  {request("PUT", contract.PathResults+"out%2eage", "x"), "metadata.malformed"},
		"empty status":    {request("POST", contract.PathStatus, ""), "metadata.malformed"},
		"large status":    {request("POST", contract.PathStatus, strings.Repeat(" ", contract.MaxStatusBytes+1)), "metadata.too-large"},
		"large manifest":  {request("PUT", contract.PathResultManifest, strings.Repeat(" ", contract.MaxResultManifestBytes+1)), "metadata.too-large"},
		"large evidence":  {request("POST", contract.PathEvidence+"?id=1", strings.Repeat(" ", contract.MaxEvidenceBytes+1)), "metadata.too-large"},
		"no id":           {request("POST", contract.PathEvidence, "x"), "metadata.malformed"},
		"two ids":         {request("POST", contract.PathEvidence+"?id=1&id=2", "x"), "metadata.malformed"},
		"unasked":         {request("POST", contract.PathEvidence+"?id=1", "x"), "metadata.challenge"},
	} {
		x := &sink{}
		status, body := call(newTestSession(x), c.r)
		if got := code(body); got != c.want || status < 400 || status == 500 {
			t.Errorf("%s: %d %s, want %s", name, status, got, c.want)
		}
		if len(x.statuses)+len(x.results)+len(x.manifest) != 0 {
			t.Errorf("%s reached the sink", name)
		}
	}
}

func TestRateIsLimited(t *testing.T) {
	t.Parallel()
	s := newTestSession(&sink{})
	now := time.Unix(1_800_000_000, 0)
	s.now = func() time.Time { return now }
	burst := func() (served int) {
		for range 2 * requestBurst {
			if status, _ := call(s, request("GET", contract.PathManifest, "")); status == 200 {
				served++
			} else if status != http.StatusTooManyRequests {
				t.Fatalf("status %d", status)
			}
		}
		return served
	}
	if n := burst(); n != requestBurst {
		t.Errorf("%d requests of a burst were served, want %d", n, requestBurst)
	}
	now = now.Add(time.Second)
	if n := burst(); n != requestRate {
		t.Errorf("%d requests were served a second later, want %d", n, requestRate)
	}
}

func TestStatusIsCheckedAndPassedOn(t *testing.T) {
	t.Parallel()
	for text, ok := range map[string]bool{
		`{"phase":"booted","uptime_ms":5}`:                                                               true,
		`{"phase":"done","uptime_ms":5,"exit_code":137}`:                                                 true,
		`{"phase":"failed","uptime_ms":5,"refusal":{"code":"broker.denied","message":"m","remedy":"r"}}`: true,
		`{"phase":"failed","uptime_ms":5}`:                                                               false,
		`{"phase":"booted","uptime_ms":5,"refusal":{"code":"a","message":"m","remedy":"r"}}`:             false,
		`{"phase":"failed","uptime_ms":5,"refusal":{"code":"A b","message":"m","remedy":"r"}}`:           false,
		`{"phase":"failed","uptime_ms":5,"refusal":{"code":"","message":"m","remedy":"r"}}`:              false,
		`{"phase":"flying","uptime_ms":5}`:                                                               false,
		`{"phase":"booted","uptime_ms":-5}`:                                                              false,
		`{"phase":"done","uptime_ms":5,"exit_code":256}`:                                                 false,
		`{"phase":"booted","uptime_ms":5,"extra":1}`:                                                     false,
		`{"phase":"booted","phase":"done","uptime_ms":5}`:                                                false,
		`{"phase":"booted","uptime_ms":5}{}`:                                                             false,
		`null`:                                                                                           false,
	} {
		x := &sink{}
		status, body := call(newTestSession(x), request("POST", contract.PathStatus, text))
		if ok != (status == http.StatusNoContent) || ok != (len(x.statuses) == 1) {
			t.Errorf("%s: %d %s, passed on %d", text, status, body, len(x.statuses))
		}
	}
	got, err := parseStatus([]byte("{\"phase\":\"failed\",\"uptime_ms\":1,\"refusal\":{\"code\":\"a.b\",\"message\":\"x\\u001b[31m\\ny\",\"remedy\":\"\\u202ez\"}}"))
	if err != nil || got.Refusal.Message != "x [31m y" || got.Refusal.Remedy != " z" {
		t.Errorf("status is %+v, %v", got.Refusal, err)
	}
}

func TestResultsArriveAndEnd(t *testing.T) {
	t.Parallel()
	x := &sink{quota: 8}
	s := newTestSession(x)
	steps := []struct {
		path, body string
		status     int
		code       string
	}{
		{contract.PathResults + "out.age", "sealed", 204, ""},
		{contract.PathResults + "log.age", "too much of it", 422, "results.quota"},
		{contract.PathResultManifest, "signed", 204, ""},
		{contract.PathResultManifest, "signed", 204, ""}, // the first answer was lost
		{contract.PathResultManifest, "other", 409, "metadata.conflict"},
		{contract.PathResults + "log.age", "late", 409, "metadata.conflict"},
	}
	for _, step := range steps {
		status, body := call(s, request("PUT", step.path, step.body))
		if status != step.status || (step.code != "" && code(body) != step.code) {
			t.Errorf("%s %q: %d %s", step.path, step.body, status, body)
		}
	}
	if x.results["out.age"] != "sealed" || len(x.results) != 1 || !slices.Equal(x.manifest, []string{"signed"}) {
		t.Errorf("sink has %v, %v", x.results, x.manifest)
	}
}

func TestFailedResultManifestMayBeSentAgain(t *testing.T) {
	t.Parallel()
	x := &sink{fail: errors.New("disk /var/secret full")}
	s := newTestSession(x)
	status, body := call(s, request("PUT", contract.PathResultManifest, "signed"))
	if status != 500 || code(body) != "internal" || strings.Contains(body, "secret") {
		t.Errorf("answer is %d %s", status, body)
	}
	x.fail = nil
	if status, body := call(s, request("PUT", contract.PathResultManifest, "signed")); status != 204 {
		t.Errorf("answer is %d %s", status, body)
	}
}

func TestOneResultAtATimePerName(t *testing.T) {
	t.Parallel()
	x := &sink{started: make(chan struct{})}
	s := newTestSession(x)
	r, w := io.Pipe()
	first := make(chan int)
	go func() {
		req := request("PUT", contract.PathResults+"out.age", "-")
		req.Body = r
		status, _ := call(s, req)
		first <- status
	}()
	<-x.started
	if status, body := call(s, request("PUT", contract.PathResults+"out.age", "again")); status != 409 {
		t.Errorf("second upload: %d %s", status, body)
	}
	if status, body := call(s, request("PUT", contract.PathResultManifest, "signed")); status != 409 {
		t.Errorf("end while a result is on its way: %d %s", status, body)
	}
	if err := w.CloseWithError(errors.New("guest vanished")); err != nil {
		t.Fatal(err)
	}
	if status := <-first; status != 400 || len(x.results) != 0 {
		t.Errorf("broken upload: %d, kept %v", status, x.results)
	}
	x.started = nil
	if status, body := call(s, request("PUT", contract.PathResults+"out.age", "again")); status != 204 {
		t.Errorf("upload after a broken one: %d %s", status, body)
	}
}

func TestTricklingResultIsEnded(t *testing.T) {
	t.Parallel()
	x := &sink{}
	s := newTestSession(x)
	now := time.Unix(1_800_000_000, 0)
	s.now = func() time.Time {
		now = now.Add(50 * time.Second)
		return now
	}
	r := request("PUT", contract.PathResults+"out.age", "-")
	r.Body = io.NopCloser(iotest.OneByteReader(strings.NewReader(strings.Repeat("x", 100))))
	if status, body := call(s, r); status != http.StatusRequestTimeout || len(x.results) != 0 {
		t.Errorf("answer is %d %s, kept %v", status, body, x.results)
	}
}

func TestPollEndsWithoutAChallenge(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newTestSession(&sink{})
		begin := time.Now()
		status, body := call(s, request("GET", contract.PathChallenge, ""))
		if took := time.Since(begin); status != 204 || body != "" || took != contract.ChallengePollSeconds*time.Second {
			t.Errorf("answer is %d %q after %s", status, body, took)
		}
	})
}

// FuzzRequest sends raw bytes of a guest through net/http to the handler.
func FuzzRequest(f *testing.F) {
	head := contract.MetadataHeader + ": 1\r\n\r\n"
	f.Add([]byte("GET /v1/manifest HTTP/1.1\r\nHost: a\r\n" + head))
	f.Add([]byte("GET /v1/%2e%2e/manifest HTTP/1.1\r\nHost: a\r\n" + head))
	f.Add([]byte("PUT /v1/results/out.age HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + head + "5\r\nhello\r\n0\r\n\r\n"))
	f.Add([]byte("POST /v1/status HTTP/1.1\r\nHost: a\r\nContent-Length: 32\r\n" + head + `{"phase":"booted","uptime_ms":5}`))
	f.Add([]byte("POST /v1/evidence?id=%zz HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n" + head + "x"))
	f.Add([]byte("GET http://b/v1/boot HTTP/1.0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
		if err != nil || req.URL.Path == contract.PathChallenge {
			return // refused by net/http; a poll would wait
		}
		x := &sink{}
		status, body := call(newTestSession(x), req)
		if status == http.StatusInternalServerError {
			t.Errorf("answer is %d %s", status, body)
		}
		if req.Header.Get(contract.MetadataHeader) != contract.MetadataToken && (status < 400 || len(x.statuses)+len(x.results)+len(x.manifest) > 0) {
			t.Errorf("without a token: %d", status)
		}
		for name := range x.results {
			if name != "out.age" && name != "log.age" {
				t.Errorf("result %q was taken", name)
			}
		}
	})
}

func FuzzStatus(f *testing.F) {
	f.Add([]byte(`{"phase":"failed","uptime_ms":5,"refusal":{"code":"broker.denied","message":"m\u0000","remedy":"r"}}`))
	f.Add([]byte(`{"phase":"done","uptime_ms":5,"exit_code":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseStatus(data)
		if err != nil {
			return
		}
		if s.Refusal != nil && strings.ContainsFunc(s.Refusal.Message+s.Refusal.Remedy+s.Refusal.Code, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("control characters pass: %q", s.Refusal)
		}
	})
}
