package pin_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/pin"
)

// authority issues server certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (a authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

func sign(t *testing.T, template *x509.Certificate, by *authority) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func newCA(t *testing.T, from, to time.Time) authority {
	t.Helper()
	return sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil)
}

func serve(t *testing.T, leaf authority, version uint16) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, "http://"+r.Host+"/plain", http.StatusFound)
		}
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{MaxVersion: version, Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.cert.Raw}, PrivateKey: leaf.key}}} //nolint:gosec // what a client refuses is the test
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func get(t *testing.T, e contract.Endpoint, url string) error {
	t.Helper()
	transport, err := pin.Transport(e)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func TestOnlyThePinnedServerIsTalkedTo(t *testing.T) {
	t.Parallel()
	now := time.Now()
	from, to := now.Add(-time.Hour), now.Add(time.Hour)
	ca, other := newCA(t, from, to), newCA(t, from, to)
	leaf := func(from, to time.Time, usage x509.ExtKeyUsage) authority {
		return sign(t, &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: to, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		}, &ca)
	}
	good := leaf(from, to, x509.ExtKeyUsageServerAuth)
	spki := sha256.Sum256(good.cert.RawSubjectPublicKeyInfo)
	byKey := contract.Endpoint{SPKISHA256: hex.EncodeToString(spki[:])}
	byCA := contract.Endpoint{CAPEM: ca.pem()}
	for name, c := range map[string]struct {
		leaf     authority
		endpoint contract.Endpoint
		version  uint16
		host     string
		refused  bool
	}{
		"the CA's":            {leaf: good, endpoint: byCA},
		"the key's":           {leaf: good, endpoint: byKey},
		"another CA's":        {leaf: good, endpoint: contract.Endpoint{CAPEM: other.pem()}, refused: true},
		"another key's":       {leaf: leaf(from, to, x509.ExtKeyUsageServerAuth), endpoint: byKey, refused: true},
		"another name":        {leaf: good, endpoint: byCA, host: "localhost", refused: true},
		"a client's":          {leaf: leaf(from, to, x509.ExtKeyUsageClientAuth), endpoint: byCA, refused: true},
		"expired on a clock":  {leaf: leaf(from, from.Add(time.Minute), x509.ExtKeyUsageServerAuth), endpoint: byCA},
		"older than its CA":   {leaf: leaf(from.Add(-48*time.Hour), to, x509.ExtKeyUsageServerAuth), endpoint: byCA, refused: true},
		"an old TLS":          {leaf: good, endpoint: byKey, version: tls.VersionTLS12, refused: true},
		"the key's, any name": {leaf: good, endpoint: byKey, host: "localhost"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, c.leaf, c.version)
			c.endpoint.URL = s.URL
			if c.host != "" {
				c.endpoint.URL = strings.Replace(s.URL, "127.0.0.1", c.host, 1)
			}
			if err := get(t, c.endpoint, c.endpoint.URL+"/"); (err != nil) != c.refused {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestRequestsElsewhereAreNotSent(t *testing.T) {
	t.Parallel()
	ca := newCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	spki := sha256.Sum256(ca.cert.RawSubjectPublicKeyInfo)
	s := serve(t, ca, 0)
	e := contract.Endpoint{URL: s.URL, SPKISHA256: hex.EncodeToString(spki[:])}
	for _, url := range []string{s.URL + "/away", "https://192.0.2.1/", strings.Replace(s.URL, "https", "http", 1)} {
		if err := get(t, e, url); !errors.Is(err, pin.ErrUnpinned) {
			t.Errorf("%s: %v", url, err)
		}
	}
	if _, err := pin.Transport(contract.Endpoint{URL: s.URL, CAPEM: "no PEM"}); err == nil {
		t.Error("an empty pin is accepted")
	}
}
