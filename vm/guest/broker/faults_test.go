package broker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/pin"
)

// fault is what the first request of a kind meets; nil is a good answer.
type fault func(http.ResponseWriter, *http.Request)

func status(code int, body string) fault {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
}

// cut ends the connection in the middle of an answer, as a restart does.
func cut(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "1000")
	_, _ = io.WriteString(w, "{")
	panic(http.ErrAbortHandler)
}

// drip sends a byte now and then until the client has had enough, and never
// ends its answer.
func drip(w http.ResponseWriter, r *http.Request) {
	w.WriteHeader(http.StatusOK)
	for r.Context().Err() == nil {
		_, err := io.WriteString(w, " ")
		if err != nil || http.NewResponseController(w).Flush() != nil {
			break
		}
		select {
		case <-r.Context().Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
	panic(http.ErrAbortHandler)
}

// faulty is a broker with two releases, whose requests of a kind meet faults
// in turn before they are answered.
type faulty struct {
	mu       sync.Mutex
	faults   map[string][]fault
	requests []string
	nonces   int
	key      jose.JSONWebKey
}

func (f *faulty) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/kbs/v0/"), "/")
	f.mu.Lock()
	f.requests = append(f.requests, kind)
	var meet fault
	if todo := f.faults[kind]; len(todo) > 0 {
		meet, f.faults[kind] = todo[0], todo[1:]
	}
	f.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if meet != nil {
		meet(w, r)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch kind {
	case "auth":
		f.nonces++
		_, _ = io.WriteString(w, `{"nonce":"n"}`)
	case "attest":
		var a struct {
			Data struct {
				Key jose.JSONWebKey `json:"tee-pubkey"`
			} `json:"runtime-data"`
		}
		if f.nonces--; f.nonces < 0 || json.Unmarshal(body, &a) != nil {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		f.key = a.Data.Key
		_, _ = io.WriteString(w, `{"token":"t"}`)
	case "resource":
		enc, err := jose.NewEncrypter(contentCipher, jose.Recipient{Algorithm: keyAlgorithm, Key: f.key.Key}, nil)
		if err != nil {
			return
		}
		if obj, err := enc.Encrypt([]byte("secret")); err == nil {
			_, _ = io.WriteString(w, obj.FullSerialize())
		}
	}
}

// TestFaultsOfTheBrokerAreOutlastedOrToldAndNeverCountTwice is the whole table:
// what happens to which request, how it ends, and what was asked for that.
func TestFaultsOfTheBrokerAreOutlastedOrToldAndNeverCountTwice(t *testing.T) {
	t.Parallel()
	away := status(http.StatusServiceUnavailable, `{"code":"broker.token-missing","message":"no token","remedy":"connect it"}`)
	restarted := status(http.StatusUnauthorized, `{"code":"broker.session-unknown","message":"unknown","remedy":"again"}`)
	huge := status(http.StatusOK, strings.Repeat(" ", maxResource+1))
	const refused, lost = CodeRefused, "no answer"
	for name, c := range map[string]struct {
		faults map[string][]fault
		ends   string // "" is the secret
		asked  []string
	}{
		"no fault":                {nil, "", []string{"auth", "attest", "resource"}},
		"auth busy":               {map[string][]fault{"auth": {status(503, ""), status(429, ""), status(502, "")}}, "", []string{"auth", "auth", "auth", "auth", "attest", "resource"}},
		"auth cut":                {map[string][]fault{"auth": {cut}}, "", []string{"auth", "auth", "attest", "resource"}},
		"auth drips":              {map[string][]fault{"auth": {drip}}, "", []string{"auth", "auth", "attest", "resource"}},
		"auth refused":            {map[string][]fault{"auth": {status(403, "")}}, refused, []string{"auth"}},
		"auth failed":             {map[string][]fault{"auth": {status(500, "")}}, refused, []string{"auth"}},
		"auth answers nonsense":   {map[string][]fault{"auth": {status(200, "<html>")}}, CodeAnswer, []string{"auth"}},
		"auth oversize":           {map[string][]fault{"auth": {huge}}, CodeAnswer, []string{"auth"}},
		"restarted before attest": {map[string][]fault{"attest": {restarted}}, "", []string{"auth", "attest", "auth", "attest", "resource"}},
		"token away at attest":    {map[string][]fault{"attest": {away, away}}, "", []string{"auth", "attest", "auth", "attest", "auth", "attest", "resource"}},
		"attest cut":              {map[string][]fault{"attest": {cut}}, lost, []string{"auth", "attest"}},
		"attest drips":            {map[string][]fault{"attest": {drip}}, lost, []string{"auth", "attest"}},
		"attest behind a proxy":   {map[string][]fault{"attest": {status(503, "")}}, refused, []string{"auth", "attest"}},
		"attest lost by a proxy":  {map[string][]fault{"attest": {status(504, "")}}, refused, []string{"auth", "attest"}},
		"attest refused":          {map[string][]fault{"attest": {status(401, "")}}, refused, []string{"auth", "attest"}},
		"attest oversize":         {map[string][]fault{"attest": {huge}}, CodeAnswer, []string{"auth", "attest"}},
		"resource cut":            {map[string][]fault{"resource": {cut, cut}}, "", []string{"auth", "attest", "resource", "resource", "resource"}},
		"resource drips":          {map[string][]fault{"resource": {drip}}, "", []string{"auth", "attest", "resource", "resource"}},
		"token away at resource":  {map[string][]fault{"resource": {away}}, "", []string{"auth", "attest", "resource", "resource"}},
		"resource unknown":        {map[string][]fault{"resource": {status(404, "")}}, refused, []string{"auth", "attest", "resource"}},
		"resource oversize":       {map[string][]fault{"resource": {huge}}, CodeAnswer, []string{"auth", "attest", "resource"}},
		"resource nonsense":       {map[string][]fault{"resource": {status(200, "{}")}}, CodeAnswer, []string{"auth", "attest", "resource"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &faulty{faults: c.faults}
			s := httptest.NewTLSServer(f)
			t.Cleanup(s.Close)
			secret, err := ask(t.Context(), t, s.URL, s.Client().Transport)
			if got := end(err); got != c.ends || (err == nil) != (string(secret) == "secret") {
				t.Errorf("%q, want %q: %v", got, c.ends, err)
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			if !slices.Equal(f.requests, c.asked) {
				t.Errorf("asked %v, want %v", f.requests, c.asked)
			}
		})
	}
}

func ask(ctx context.Context, t *testing.T, url string, transport http.RoundTripper) ([]byte, error) {
	t.Helper()
	c, err := New(url, transport)
	if err != nil {
		t.Fatal(err)
	}
	c.pause, c.http.Timeout = time.Millisecond, 2*time.Second
	if err := c.Attest(ctx, NoGPUs, func(context.Context, [contract.ReportDataSize]byte) (contract.BrokerEvidence, error) {
		return contract.BrokerEvidence{Report: []byte("report")}, nil
	}); err != nil {
		return nil, err
	}
	return c.Resource(ctx, contract.Resource{Repository: "a", Type: "b", Tag: "c"})
}

// end is how a talk ended: the phase it happens in gives a code to no answer.
func end(err error) string {
	if err == nil {
		return ""
	}
	if refused, ok := errors.AsType[*contract.Refusal](err); ok {
		return refused.Code
	}
	return "no answer"
}

// refusing dials a port where nobody listens before it dials the right one.
type refusing struct {
	mu    sync.Mutex
	times int
}

func (d *refusing) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.times > 0 {
		d.times--
		addr = "127.0.0.1:1"
	}
	return (&net.Dialer{}).DialContext(ctx, network, addr)
}

func TestABrokerThatIsNotThereIsTriedUntilTheTimeIsOver(t *testing.T) {
	t.Parallel()
	f := &faulty{}
	s := httptest.NewTLSServer(f)
	t.Cleanup(s.Close)
	for times, want := range map[int]string{3: "", 1 << 30: "no answer"} {
		transport, ok := s.Client().Transport.(*http.Transport)
		if !ok {
			t.Fatal("no transport")
		}
		transport = transport.Clone()
		transport.DialContext = (&refusing{times: times}).dial
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		if want != "" {
			ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		}
		_, err := ask(ctx, t, s.URL, transport)
		cancel()
		if end(err) != want {
			t.Errorf("%d times: %v", times, err)
		}
	}
}

func TestABrokerWithAnotherCertificateIsAskedNothing(t *testing.T) {
	t.Parallel()
	f := &faulty{}
	s := httptest.NewTLSServer(f)
	t.Cleanup(s.Close)
	sum := sha256.Sum256(s.Certificate().RawSubjectPublicKeyInfo)
	sum[0] ^= 1
	transport, err := pin.Transport(contract.Endpoint{URL: s.URL, SPKISHA256: hex.EncodeToString(sum[:])})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ask(t.Context(), t, s.URL, transport); !errors.Is(err, pin.ErrUnpinned) {
		t.Error(err)
	}
	if len(f.requests) > 0 {
		t.Errorf("asked %v", f.requests)
	}
}
