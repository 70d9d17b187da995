package endorsements

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

// fakeKDS is a TLS server that keeps AMD's rules: exact paths and parameters,
// 404 for what was never made, 429 for two requests within ten seconds. It
// lives in the bubble of its test, on connections in memory, so that its
// clock is the test's.
type fakeKDS struct {
	t         *testing.T
	authority *snptest.Authority
	server    *httptest.Server
	listener  *pipeListener

	mu       sync.Mutex
	chips    map[string][]byte // path and query -> VCEK
	crl      []byte
	last     time.Time
	throttle bool
	requests []request
	// script answers before the rules do; broken answers all the time.
	script []http.HandlerFunc
	broken http.HandlerFunc
}

type request struct {
	target string
	at     time.Time
	code   int
}

func newFakeKDS(t *testing.T) *fakeKDS {
	t.Helper()
	authority, err := snptest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	k := &fakeKDS{t: t, authority: authority, chips: map[string][]byte{}, listener: newPipeListener(), throttle: true}
	k.crl = k.newCRL(time.Now(), time.Now().AddDate(0, 6, 0))
	k.server = httptest.NewUnstartedServer(k)
	if err := k.server.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	k.server.Listener = k.listener
	k.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	k.server.StartTLS()
	t.Cleanup(func() {
		<-time.After(10 * time.Second) // TLS waits five for its farewell
		k.server.Close()
		k.mu.Lock()
		defer k.mu.Unlock()
		if len(k.script) > 0 {
			t.Errorf("%d scripted answers were not asked for", len(k.script))
		}
	})
	return k
}

func (k *fakeKDS) newCRL(this, next time.Time, revoked ...*x509.Certificate) []byte {
	k.t.Helper()
	crl, err := k.authority.CRL(this, next, revoked...)
	if err != nil {
		k.t.Fatal(err)
	}
	return crl
}

// chip makes a chip's certificate and begins to serve it.
func (k *fakeKDS) chip(id snp.Identity) []byte {
	k.t.Helper()
	cert, _, err := k.authority.VCEK(id.Product.Name, id.TCB, id.HWID)
	if err != nil {
		k.t.Fatal(err)
	}
	query := fmt.Sprintf("blSPL=%02d&teeSPL=%02d&snpSPL=%02d&ucodeSPL=%02d", id.TCB.BootLoader, id.TCB.TEE, id.TCB.SNP, id.TCB.Microcode)
	if id.Product.Name == snp.ProductTurin {
		query = fmt.Sprintf("fmcSPL=%02d&", id.TCB.FMC) + query
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.chips[fmt.Sprintf("/vcek/v1/%s/%s?%s", id.Product.Name, hex.EncodeToString(id.HWID), query)] = cert.Raw
	return cert.Raw
}

func (k *fakeKDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	recorder := &codeWriter{ResponseWriter: w, code: http.StatusOK}
	k.mu.Lock()
	at, answer := time.Now(), k.answer
	switch {
	case len(k.script) > 0:
		answer, k.script = k.script[0], k.script[1:]
	case k.broken != nil:
		answer = k.broken
	case k.throttle && !k.last.IsZero() && at.Sub(k.last) < 10*time.Second:
		answer = func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "10")
			w.WriteHeader(http.StatusTooManyRequests)
		}
	}
	k.last = at
	k.requests = append(k.requests, request{target: r.URL.RequestURI(), at: at})
	index := len(k.requests) - 1
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.requests[index].code = recorder.code
	}()
	answer(recorder, r)
}

func (k *fakeKDS) answer(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	chip, crl := k.chips[r.URL.RequestURI()], k.crl
	k.mu.Unlock()
	send := func(media string, body []byte) {
		w.Header().Set("Content-Type", media)
		_, _ = w.Write(body)
	}
	switch parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/"); {
	case chip != nil:
		send("application/octet-stream", chip)
	case len(parts) == 4 && r.URL.RawQuery == "" && parts[3] == "cert_chain" && parts[0] == familyVCEK:
		send("application/x-pem-file", chainPEM(k.authority.ASK, k.authority.ARK))
	case len(parts) == 4 && r.URL.RawQuery == "" && parts[3] == "cert_chain" && parts[0] == familyVLEK:
		send("application/x-pem-file", chainPEM(k.authority.ASVK, k.authority.ARK))
	case len(parts) == 4 && r.URL.RawQuery == "" && parts[3] == "crl":
		send("application/octet-stream", crl)
	default:
		http.NotFound(w, r)
	}
}

func (k *fakeKDS) asked() []request {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]request{}, k.requests...)
}

func (k *fakeKDS) scripted(answers ...http.HandlerFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.script = append(k.script, answers...)
}

func (k *fakeKDS) breaks(answer http.HandlerFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.broken = answer
}

func (k *fakeKDS) serveCRL(crl []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.crl = crl
}

// transport is the usual one, but trusts the fake's certificate and dials it
// in memory.
func (k *fakeKDS) transport(now func() time.Time) http.RoundTripper {
	transport := systemTransport(now)
	transport.Proxy = nil
	transport.TLSClientConfig.RootCAs = x509.NewCertPool()
	transport.TLSClientConfig.RootCAs.AddCert(k.server.Certificate())
	transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return k.listener.dial(ctx) }
	return transport
}

// provider is one process with the cache in dir.
func (k *fakeKDS) provider(dir string, change func(*Config)) *Provider {
	k.t.Helper()
	root := k.authority.ARK
	cfg := Config{
		Dir: dir, OperatorDir: dir + ".operator", KeyService: "https://example.com", Transport: k.transport(time.Now),
		Roots: map[string]*x509.Certificate{snp.ProductMilan: root, snp.ProductGenoa: root, snp.ProductTurin: root},
		Now:   time.Now, Logger: hclog.NewNullLogger(),
	}
	if change != nil {
		change(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		k.t.Fatal(err)
	}
	return p
}

func chainPEM(certs ...*x509.Certificate) []byte {
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}

func genoa(t *testing.T) Identity {
	t.Helper()
	return identity(t, snp.ProductGenoa, bytes.Repeat([]byte{0xC1}, 64), contract.TCB{BootLoader: 10, SNP: 27, Microcode: 219})
}

func identity(t *testing.T, product string, chip []byte, tcb contract.TCB) Identity {
	t.Helper()
	id, err := snp.NewIdentity(product, chip, tcb)
	if err != nil {
		t.Fatal(err)
	}
	return Identity{Identity: id}
}

// platform is a machine whose firmware can be changed.
type platform struct {
	mu  sync.Mutex
	id  Identity
	err error
}

func (p *platform) Identity(context.Context) (Identity, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.id, p.err
}

func (p *platform) set(id Identity, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.id, p.err = id, err
}

type codeWriter struct {
	http.ResponseWriter
	code int
}

func (w *codeWriter) WriteHeader(code int) {
	w.code = code
	w.ResponseWriter.WriteHeader(code)
}

// pipeListener hands connections over in memory.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) dial(ctx context.Context) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
