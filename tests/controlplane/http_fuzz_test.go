package controlplane

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// A body that is not the document asked for is refused as the client's
// mistake, whatever it is.
func FuzzRequestBody(f *testing.F) {
	f.Add([]byte(""))
	f.Add([]byte(`{"node":"node-a","launch":{"guestId":"x"},"required_features":["a"]}`))
	f.Add([]byte(`{"generation":1,"grace_seconds":0.5}`))
	f.Add([]byte(`{"nonce":"00"}`))
	f.Add([]byte(`{"reason":"x"}{}`))
	f.Add([]byte(`{"reason":"x","Reason":"y"}`))
	f.Add([]byte(`{"reason":null}`))
	f.Add([]byte(`[`))
	f.Add(bytes.Repeat([]byte(" "), maxBody+1))
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, into := range []any{&client.Launch{}, &client.Stop{}, &client.Challenge{}, &client.Cordon{}} {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", bytes.NewReader(body))
			r.Body = http.MaxBytesReader(nil, r.Body, maxBody)
			err := read(r, into)
			switch refusal := contract.AsRefusal(err); {
			case err != nil && (refusal.Code != codeBadRequest || refusal.Remedy == ""):
				t.Fatalf("%T: %v", into, err)
			case err == nil && len(body) > 0 && (len(body) > maxBody || !json.Valid(body)):
				t.Fatalf("%T takes %q", into, body)
			}
			if err != nil {
				continue
			}
			if _, err := json.Marshal(into); err != nil {
				t.Fatalf("%T: %v", into, err)
			}
		}
	})
}
