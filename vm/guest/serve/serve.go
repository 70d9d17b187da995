// Package serve is the guest's face to the network: TLS 1.3 that ends in the
// init, with a key that the evidence binds, in front of the workload's own
// plain HTTP port. The same port answers a verifier's nonce with evidence; the
// verifier compares the key of its connection with the evidence after the
// handshake. Handlers are safe for concurrent use.
package serve

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"time"

	"golang.org/x/time/rate"

	"github.com/confidential-node/agent/firmware/contract"
)

// EvidencePath is where a port answers a nonce; the query is nonce=HEX.
const EvidencePath = "/.well-known/evidence"

// Reports come from one slow processor that the guest needs itself.
const (
	evidencePerSecond = 2
	evidenceBurst     = 8
)

// evidenceTimeout bounds one answer.
const evidenceTimeout = 30 * time.Second

// Identity is the guest's TLS key with a certificate around it. Nobody issued
// it: trust comes from the evidence alone.
type Identity struct {
	Certificate tls.Certificate
	// SPKI is the key's DER SubjectPublicKeyInfo.
	SPKI []byte
}

// NewIdentity makes a key that never leaves the guest.
func NewIdentity() (*Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making TLS key: %w", err)
	}
	// The guest has no trusted clock; RFC 5280 4.1.2.5 has a date for "no
	// well-defined expiration".
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "confidential guest"},
		NotBefore: time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("making TLS certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading TLS certificate: %w", err)
	}
	return &Identity{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, leaf.RawSubjectPublicKeyInfo}, nil
}

// Evidence makes the evidence bundle for a nonce.
type Evidence func(ctx context.Context, nonce []byte) ([]byte, error)

// Handler answers evidence requests and passes everything else on. It is
// shared by all ports, so that they share one rate limit.
type Handler struct {
	// WarmUp is how long a workload may take from its start until it listens
	// before requests are told that it does not answer. Default 30 s.
	WarmUp time.Duration

	evidence Evidence
	limit    *rate.Limiter
}

// NewHandler returns a handler.
func NewHandler(evidence Evidence) *Handler {
	return &Handler{WarmUp: warmUp, evidence: evidence, limit: rate.NewLimiter(evidencePerSecond, evidenceBurst)}
}

// Port returns the handler of one port, whose workload side dial connects to.
// A workload that was just started is given some time to listen.
func (h *Handler) Port(dial Dial) http.Handler {
	dial = patient(dial, time.Now().Add(h.WarmUp))
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "workload"
			r.Out.Host = r.In.Host
			r.SetXForwarded()
		},
		Transport: &http.Transport{
			DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: 16,
			DisableCompression: true,
		},
		FlushInterval: -1, // answers that come word by word
		ErrorLog:      log.New(io.Discard, "", 0),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "the workload does not answer", http.StatusBadGateway)
		},
	}
	mux := http.NewServeMux()
	mux.HandleFunc(EvidencePath, h.answer)
	mux.Handle("/", proxy)
	return mux
}

func (h *Handler) answer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "use GET", http.StatusMethodNotAllowed)
		return
	}
	nonce, err := hex.DecodeString(r.URL.Query().Get("nonce"))
	if err != nil || len(nonce) < contract.MinNonceBytes || len(nonce) > contract.MaxNonceBytes {
		http.Error(w, fmt.Sprintf("nonce is not %d to %d bytes of hex", contract.MinNonceBytes, contract.MaxNonceBytes), http.StatusBadRequest)
		return
	}
	if !h.limit.Allow() {
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many requests for evidence", http.StatusTooManyRequests)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), evidenceTimeout)
	defer cancel()
	bundle, err := h.evidence(ctx, nonce)
	if err != nil {
		http.Error(w, "no evidence now", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(bundle) // the verifier is gone
}

// Serve answers on the listener until ctx ends, and closes it.
func Serve(ctx context.Context, listener net.Listener, id *Identity, handler http.Handler) error {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: log.New(io.Discard, "", 0),
		Protocols: func() *http.Protocols {
			p := new(http.Protocols)
			p.SetHTTP1(true)
			return p
		}(),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	err := server.Serve(tls.NewListener(listener, &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{id.Certificate}, NextProtos: []string{"http/1.1"},
	}))
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serving: %w", err)
}
