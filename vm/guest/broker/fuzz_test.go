package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

// scripted answers by the last element of the path.
type scripted struct {
	status                 int
	auth, attest, resource []byte
}

func (s scripted) RoundTrip(r *http.Request) (*http.Response, error) {
	body, status := s.resource, s.status
	switch {
	case strings.HasSuffix(r.URL.Path, "/auth"):
		body, status = s.auth, http.StatusOK
	case strings.HasSuffix(r.URL.Path, "/attest"):
		body = s.attest
	}
	return &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)), Request: r}, nil
}

// Whatever a broker answers, the guest gets a secret or an error, and an error
// that fits into a status.
func FuzzAnswers(f *testing.F) {
	f.Add(200, []byte(`{"nonce":"n"}`), []byte(`{"token":"t"}`), []byte(`{"protected":"e30","encrypted_key":"","iv":"","ciphertext":"","tag":""}`))
	f.Add(401, []byte(`{"nonce":"n"}`), []byte(`{"code":"broker.tcb","message":"low","remedy":"update"}`), []byte{})
	f.Add(403, []byte(`{}`), []byte(`{"type":"t","detail":"<<<<\u2028\u0000"}`), []byte{})
	f.Fuzz(func(t *testing.T, status int, auth, attest, resource []byte) {
		if status < 200 || status > 599 {
			return
		}
		c, err := New("https://broker.example", scripted{status, auth, attest, resource})
		if err != nil {
			t.Fatal(err)
		}
		err = c.Attest(t.Context(), NoGPUs, func(context.Context, [contract.ReportDataSize]byte) (contract.BrokerEvidence, error) {
			return contract.BrokerEvidence{}, nil
		})
		if err == nil {
			_, err = c.Resource(t.Context(), contract.Resource{Repository: "a", Type: "b", Tag: "c"})
		}
		refused, ok := errors.AsType[*contract.Refusal](err)
		if !ok {
			return
		}
		text, err := json.Marshal(contract.GuestStatus{Phase: contract.PhaseFailed, UptimeMS: 1 << 40, Refusal: refused})
		if err != nil || len(text) > contract.MaxStatusBytes {
			t.Errorf("the status has %d bytes, %v", len(text), err)
		}
	})
}
