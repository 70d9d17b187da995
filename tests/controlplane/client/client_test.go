package client

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
)

// answering is a control plane that says one thing.
type answering struct {
	status int
	body   []byte
}

func (a answering) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: a.status, Status: http.StatusText(a.status), Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(a.body)), Request: r,
	}, nil
}

// An answer is what was asked for, a refusal with its code, or an error.
func FuzzReply(f *testing.F) {
	f.Add(200, []byte(`{"nodes":[{"id":"node-a","capability":{}}]}`))
	f.Add(200, []byte(`{"events":[{"seq":1,"kind":"guest-state","event":{"guestState":{}}}]}`))
	f.Add(200, []byte(`{"guest_id":"g","outcome":"done","state":{"status":"GUEST_STATUS_FINISHED"},"results":[{}]}`))
	f.Add(200, []byte(`{"guest_id":"g","uploads":[{"event_id":"e","name":"out","wanted":{"firstPart":3}},{"ready":{"etags":["a"]}},{}]}`))
	f.Add(200, []byte(`null`))
	f.Add(409, []byte(`{"code":"control.no-node","message":"m","remedy":"r"}`))
	f.Add(409, []byte(`{"code":""}`))
	f.Add(502, []byte(`<html>`))
	f.Add(301, []byte(``))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		c := &Client{base: "https://control.example", http: &http.Client{Transport: answering{status, body}}}
		_, errNodes := c.Nodes(t.Context())
		g, errGuest := c.Guest(t.Context(), "g")
		events, errEvents := c.Events(t.Context(), 0, 1, false)
		evidence, errEvidence := c.Evidence(t.Context(), "g", []byte{1})
		for _, err := range []error{errNodes, errGuest, errEvents, errEvidence} {
			if (err == nil) && status/100 != 2 {
				t.Fatalf("an answer with status %d counts", status)
			}
			if r, ok := errors.AsType[*contract.Refusal](err); ok && r.Code == "" {
				t.Fatalf("a refusal without a code: %q", body)
			}
		}
		if errEvidence == nil && !bytes.Equal(evidence, body) {
			t.Fatalf("evidence %q became %q", body, evidence)
		}
		if errGuest == nil {
			for _, u := range g.Uploads {
				if wanted, ready, err := u.Decode(); err == nil && (wanted == nil) == (ready == nil) {
					t.Fatalf("upload %+v waits for %v, %v", u, wanted, ready)
				}
			}
			if _, err := g.GuestState(); err != nil && g.Ended() {
				t.Fatalf("a guest whose state cannot be read has ended: %+v: %v", g, err)
			}
		}
		if errEvents == nil {
			for _, e := range events {
				if decoded, err := e.Decode(); (decoded == nil) == (err == nil) {
					t.Fatalf("event %q: %v, %v", e.Event, decoded, err)
				}
			}
		}
	})
}

// What decodes can be sent on.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"eventId":"e","at":"2026-01-01T00:00:00Z","guestState":{"guestId":"g","status":"GUEST_STATUS_RUNNING"}}`))
	f.Add([]byte(`{"heartbeat":{"guests":-1}}`))
	f.Add([]byte(`{"unknown":{}}`))
	f.Add([]byte(`{"heartbeat":{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := (&Event{Event: raw}).Decode()
		if (e == nil) == (err == nil) {
			t.Fatalf("%v, %v", e, err)
		}
		if err != nil {
			return
		}
		if !json.Valid(raw) {
			t.Fatalf("%q is an event", raw)
		}
		if _, err := proto.Marshal(e); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAnAnswerThatIsTooLargeIsNotCut(t *testing.T) {
	t.Parallel()
	c := &Client{base: "https://control.example", http: &http.Client{Transport: answering{http.StatusOK, make([]byte, maxReply+1)}}}
	if evidence, err := c.Evidence(t.Context(), "g", []byte{1}); err == nil {
		t.Errorf("%d bytes of a longer answer count as evidence", len(evidence))
	}
}
