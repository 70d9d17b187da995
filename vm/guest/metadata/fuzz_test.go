package metadata_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/metadata"
)

// The host may answer with anything; what comes through keeps its bounds.
func FuzzAnswers(f *testing.F) {
	f.Add(200, []byte(`{"address":"10.0.0.2/30","gateway":"10.0.0.1","unix_time":1}`))
	f.Add(200, []byte(`{"id":"x","nonce":"AAAA"}`))
	f.Add(204, []byte{})
	f.Add(302, []byte("elsewhere"))
	f.Add(503, []byte(`{"code":"internal"}`))
	var status int
	var body []byte
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
		_, _ = w.Write(body)
	}))
	f.Cleanup(service.Close)
	c := metadata.At(service.URL)
	f.Fuzz(func(t *testing.T, code int, text []byte) {
		if code < 200 || code > 599 {
			return
		}
		status, body = code, text
		if data, err := c.Manifest(t.Context()); err == nil && (len(data) > contract.MaxManifestBytes || code/100 != 2) {
			t.Errorf("a manifest of %d bytes with status %d", len(data), code)
		}
		if ch, ok, err := c.Challenge(t.Context()); err == nil && ok && (len(ch.Nonce) < contract.MinNonceBytes || len(ch.Nonce) > contract.MaxNonceBytes) {
			t.Errorf("a nonce of %d bytes", len(ch.Nonce))
		}
		_, networkErr := c.Network(t.Context())
		_, endorsementsErr := c.Endorsements(t.Context())
		_, bootErr := c.Boot(t.Context())
		if code/100 != 2 && (networkErr == nil || endorsementsErr == nil || bootErr == nil) {
			t.Errorf("status %d is an answer", code)
		}
	})
}
