package tenant

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// controlServer answers like a control plane that knows one guest.
func controlServer(t *testing.T, handler http.Handler) ControlPlane {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	server.StartTLS()
	t.Cleanup(server.Close)
	dir := t.TempDir()
	ca, token := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "token")
	caPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := errors.Join(os.WriteFile(ca, caPEM, 0o600), os.WriteFile(token, []byte("secret-token"), 0o600)); err != nil {
		t.Fatal(err)
	}
	c, err := newControlClient(&ControlPlaneProfile{URL: server.URL + "/", CAFile: ca, TokenFile: token})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestControlClientLaunchesAndReadsStates(t *testing.T) {
	t.Parallel()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/launches", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Node     string          `json:"node"`
			Launch   json.RawMessage `json:"launch"`
			Features []string        `json:"required_features"`
		}
		var l api.LaunchGuest
		if r.Header.Get("Authorization") != "Bearer secret-token" || json.NewDecoder(r.Body).Decode(&in) != nil ||
			protojson.Unmarshal(in.Launch, &l) != nil || l.GetGeneration() != 1 || len(in.Features) != 1 {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		_, _ = w.Write([]byte(`{"command_id":"c","guest_id":"g","node":"n"}`))
	})
	mux.HandleFunc("GET /v1/guests/g", func(w http.ResponseWriter, _ *http.Request) {
		state, err := protojson.Marshal(&api.GuestState{
			GuestId: "g", Status: api.GuestStatus_GUEST_STATUS_FAILED, ExitCode: 3,
			Ports:   []*api.PublishedPort{{GuestPort: 8000, HostPort: 20000}, {GuestPort: 8001, HostPort: 443, ServerName: "job.guests.example"}},
			Refusal: &api.Refusal{Code: "guest.broker-refused", Message: "no", Remedy: "ask"},
		})
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write([]byte(`{"node":"n","state":` + string(state) + `}`))
	})
	mux.HandleFunc("GET /v1/guests/refused", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"node":"n","outcome":"refused","refusal":{"code":"launch.digest-mismatch","message":"m","remedy":"r"}}`))
	})
	refuse := func(code string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write([]byte(`{"code":"` + code + `","message":"m","remedy":"r"}`))
		}
	}
	mux.HandleFunc("GET /v1/guests/nobody", refuse("control.guest-unknown"))
	mux.HandleFunc("GET /v1/guests/g/evidence", refuse(client.CodeNoEvidence))
	mux.HandleFunc("GET /v1/guests/ready/evidence", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("bundle")) })
	c := controlServer(t, mux)
	launched, err := c.Launch(t.Context(), "", &api.LaunchGuest{Generation: 1}, []string{"audit.log"})
	if err != nil || launched != (Launched{"c", "g", "n"}) {
		t.Errorf("%+v %v", launched, err)
	}
	g, err := c.Guest(t.Context(), "g")
	if err != nil || !g.ended() || g.Ports[8000] != 20000 || g.Ports[8001] != 443 || len(g.ServerNames) != 1 || g.ServerNames[8001] != "job.guests.example" || g.ExitCode != 3 || g.Refusal.Code != "guest.broker-refused" || g.Refused {
		t.Errorf("%+v %v", g, err)
	}
	if g, err := c.Guest(t.Context(), "refused"); err != nil || !g.Refused || g.Refusal.Code != "launch.digest-mismatch" {
		t.Errorf("%+v %v", g, err)
	}
	if _, err := c.Guest(t.Context(), "nobody"); ExitCode(err) != ExitNotFound || contract.AsRefusal(err).Code != "control.guest-unknown" {
		t.Errorf("unknown guest: %v", err)
	}
	if e, err := c.Evidence(t.Context(), "g", []byte{1}); e != nil || err != nil {
		t.Errorf("evidence that is not there yet: %q %v", e, err)
	}
	if e, err := c.Evidence(t.Context(), "ready", []byte{1}); string(e) != "bundle" || err != nil {
		t.Errorf("evidence: %q %v", e, err)
	}
}

func TestControlClientPassesRefusalsOn(t *testing.T) {
	t.Parallel()
	c := controlServer(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusConflict)
		_, _ = w.Write([]byte(`{"code":"control.no-node","message":"no node has that image","remedy":"wait"}`))
	}))
	if err := c.RequestEvidence(t.Context(), "g", []byte{1}); contract.AsRefusal(err).Code != "control.no-node" {
		t.Errorf("not passed on: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Stop(ctx, "g", 0); !errors.Is(err, ErrUnreachable) {
		t.Errorf("no answer: %v", err)
	}
}
