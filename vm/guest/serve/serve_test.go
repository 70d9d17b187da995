package serve_test

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/confidential-node/agent/vm/guest/serve"
)

// port serves one port in front of a workload.
func port(t *testing.T, workload http.Handler) (url string, client *http.Client) {
	t.Helper()
	id, err := serve.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	h := serve.NewHandler(func(_ context.Context, nonce []byte) ([]byte, error) {
		if nonce[0] == 0 {
			return nil, errors.New("a secret reason")
		}
		return []byte("evidence " + hex.EncodeToString(nonce)), nil
	})
	h.WarmUp = 0
	dial := func(context.Context) (net.Conn, error) { return nil, errors.New("a secret reason") }
	if workload != nil {
		s := httptest.NewServer(workload)
		t.Cleanup(s.Close)
		dial = func(ctx context.Context) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", s.Listener.Addr().String())
		}
	}
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve.Serve(ctx, ln, id, h.Port(dial)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "https://" + ln.Addr().String(), &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // the evidence says whose key it is
}

func get(t *testing.T, client *http.Client, method, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "service.example"
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func TestEvidenceIsTheInitsAndTheRestTheWorkloads(t *testing.T) {
	t.Parallel()
	url, client := port(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Host+" "+r.URL.Path+" "+r.Header.Get("X-Forwarded-Proto"))
	}))
	nonce := strings.Repeat("ab", 32)
	for path, want := range map[string]string{
		"/.well-known/evidence?nonce=" + nonce:                    "200 evidence " + nonce,
		"/.well-known/evidence?nonce=xyz":                         "400 ",
		"/.well-known/evidence?nonce=" + strings.Repeat("ab", 15): "400 ",
		"/.well-known/evidence?nonce=" + strings.Repeat("ab", 65): "400 ",
		"/.well-known/evidence?nonce=" + strings.Repeat("00", 32): "503 no evidence now",
		"/v1/chat":                    "200 service.example /v1/chat https",
		"/.well-known/evidence/other": "200 service.example /.well-known/evidence/other https",
	} {
		status, text := get(t, client, http.MethodGet, url+path)
		if got := fmt.Sprintf("%d %s", status, text); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if status, _ := get(t, client, http.MethodPost, url+"/.well-known/evidence?nonce="+nonce); status != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", status)
	}
}

func TestEvidenceIsRateLimited(t *testing.T) {
	t.Parallel()
	url, client := port(t, nil)
	last := 0
	for range 20 {
		last, _ = get(t, client, http.MethodGet, url+"/.well-known/evidence?nonce="+strings.Repeat("ab", 32))
		if last == http.StatusTooManyRequests {
			return
		}
	}
	t.Errorf("the twentieth request at once is answered with %d", last)
}

func TestASilentWorkloadIsABadGatewayWithoutDetails(t *testing.T) {
	t.Parallel()
	url, client := port(t, nil)
	if status, text := get(t, client, http.MethodGet, url+"/"); status != http.StatusBadGateway || strings.Contains(text, "secret") {
		t.Errorf("%d %q", status, text)
	}
}

func TestOnlyTLS13IsSpoken(t *testing.T) {
	t.Parallel()
	url, _ := port(t, nil)
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}} //nolint:gosec // what the server refuses is the test
	if conn, err := d.DialContext(t.Context(), "tcp", strings.TrimPrefix(url, "https://")); err == nil {
		t.Errorf("TLS 1.2 is spoken: %v", conn.Close())
	}
}
