// Package pin makes HTTP transports that talk to one endpoint of the manifest
// and trust nothing but what the manifest pins: a CA, or the server's key.
// The system's roots, proxies and the clock take no part. Transports are safe
// for concurrent use.
package pin

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// ErrUnpinned means that a server is not the one the manifest names.
var ErrUnpinned = errors.New("server is not the pinned one")

// Transport talks HTTPS to the endpoint's host and to no other.
func Transport(e contract.Endpoint) (http.RoundTripper, error) {
	u, err := url.Parse(e.URL)
	if err != nil {
		return nil, fmt.Errorf("pinning endpoint: %w", err)
	}
	verify, err := verifier(e, u.Hostname())
	if err != nil {
		return nil, err
	}
	return &only{host: u.Host, next: &http.Transport{
		DialContext: (&net.Dialer{Timeout: 15 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS13,
			ServerName: u.Hostname(),
			// The standard verification would ask the clock, which is the
			// host's; verify does the rest of its work.
			InsecureSkipVerify: true, //nolint:gosec // see verify
			VerifyConnection:   verify,
		},
		TLSHandshakeTimeout: 20 * time.Second, ResponseHeaderTimeout: time.Minute,
		MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute,
	}}, nil
}

// only refuses requests that a redirect or a challenge sends elsewhere.
type only struct {
	host string
	next http.RoundTripper
}

func (o *only) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" || r.URL.Host != o.host {
		return nil, fmt.Errorf("%w: request to %s://%s", ErrUnpinned, r.URL.Scheme, r.URL.Host)
	}
	return o.next.RoundTrip(r)
}

func verifier(e contract.Endpoint, host string) (func(tls.ConnectionState) error, error) {
	if e.SPKISHA256 != "" {
		want, err := hex.DecodeString(e.SPKISHA256)
		if err != nil {
			return nil, fmt.Errorf("pinning endpoint: %w", err)
		}
		return func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return ErrUnpinned
			}
			// The handshake proved possession of this key.
			if got := sha256.Sum256(s.PeerCertificates[0].RawSubjectPublicKeyInfo); !bytes.Equal(got[:], want) {
				return fmt.Errorf("%w: another public key", ErrUnpinned)
			}
			return nil
		}, nil
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(e.CAPEM)) {
		return nil, errors.New("pinning endpoint: ca_pem holds no certificate")
	}
	return func(s tls.ConnectionState) error { return verifyChain(s.PeerCertificates, roots, host) }, nil
}

// verifyChain verifies everything but validity against a clock. The guest has
// only the host's, and a host that could set it would gain nothing but the
// acceptance of an expired certificate of the very CA the tenant pinned, for
// this one launch; while trusting it would let the host refuse good ones. The
// time taken is the leaf's own beginning, so a leaf outside its CA's validity
// is still refused.
func verifyChain(certs []*x509.Certificate, roots *x509.CertPool, host string) error {
	if len(certs) == 0 {
		return ErrUnpinned
	}
	intermediates := x509.NewCertPool()
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	_, err := certs[0].Verify(x509.VerifyOptions{
		DNSName: host, Roots: roots, Intermediates: intermediates,
		CurrentTime: certs[0].NotBefore.Add(time.Second),
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnpinned, err)
	}
	return nil
}
