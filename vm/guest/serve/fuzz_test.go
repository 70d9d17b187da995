package serve_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/serve"
)

// Anybody may connect and ask; the report is asked for over nonces of the
// right size only.
func FuzzEvidenceRequest(f *testing.F) {
	f.Add("GET", "nonce=00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff")
	f.Add("GET", "nonce=zz&nonce=%zz;")
	f.Add("POST", "")
	f.Fuzz(func(t *testing.T, method, query string) {
		asked := 0
		h := serve.NewHandler(func(_ context.Context, nonce []byte) ([]byte, error) {
			asked = len(nonce)
			return []byte("{}"), nil
		}).Port(func(context.Context) (net.Conn, error) { return nil, errors.New("no workload") })
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "https://guest"+serve.EvidencePath, nil)
		r.Method, r.URL = method, &url.URL{Path: serve.EvidencePath, RawQuery: query}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		sound := asked >= contract.MinNonceBytes && asked <= contract.MaxNonceBytes && method == http.MethodGet
		if (w.Code == http.StatusOK) != sound {
			t.Errorf("%s %q is answered with %d after a nonce of %d bytes", method, query, w.Code, asked)
		}
	})
}
