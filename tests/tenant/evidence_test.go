package tenant

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

func TestAttestedJobIsWaitedForAndItsResultsAreOpened(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	g := w.guest()
	if _, err := w.tenant.Results(t.Context(), "job", t.TempDir()); code(err) != "tenant.evidence-missing" {
		t.Fatal(err)
	}
	if _, err := w.tenant.WaitRunning(t.Context(), "job"); err != nil {
		t.Fatal(err)
	}
	g.finish(t, map[string]string{"report.json": plaintext}, g.ResultKey)
	if state, err := w.tenant.Wait(t.Context(), "job"); err != nil || state.Status != api.GuestStatus_GUEST_STATUS_FINISHED {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	r, err := w.tenant.Results(t.Context(), "job", out)
	if err != nil || len(r.Files) != 1 || len(r.Missing) != 0 {
		t.Fatalf("%+v %v", r, err)
	}
	got, err := os.ReadFile(filepath.Join(out, "report.json"))
	if err != nil || string(got) != plaintext {
		t.Fatalf("%q %v", got, err)
	}
	if entries, err := os.ReadDir(out); err != nil || len(entries) != 1 {
		t.Fatalf("%v %v", entries, err)
	}
	if w.uploads.contains(plaintext) {
		t.Fatal("a result was uploaded in the clear")
	}
}

func TestResultsTheGuestDidNotSignAreRefused(t *testing.T) {
	t.Parallel()
	_, host, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	overwrite := func(t *testing.T, w *world, d *Deployment, name string, data []byte) {
		t.Helper()
		if err := w.tenant.store.Put(t.Context(), bucket, w.tenant.resultPath(d, name), strings.NewReader(string(data)), int64(len(data))); err != nil {
			t.Fatal(err)
		}
	}
	tests := map[string]func(*testing.T, *world, *Deployment, *fakeGuest){
		"signed by the host": func(t *testing.T, _ *world, _ *Deployment, g *fakeGuest) {
			t.Helper()
			g.finish(t, map[string]string{"report.json": "forged"}, host)
		},
		"file swapped by the host": func(t *testing.T, w *world, d *Deployment, g *fakeGuest) {
			t.Helper()
			g.finish(t, map[string]string{"report.json": "genuine"}, g.ResultKey)
			overwrite(t, w, d, "report.json", []byte("age-encryption.org/v1 forged"))
		},
		"file changed, same size": func(t *testing.T, w *world, d *Deployment, g *fakeGuest) {
			t.Helper()
			g.finish(t, map[string]string{"report.json": "genuine"}, g.ResultKey)
			r, _, err := w.tenant.store.Get(t.Context(), bucket, w.tenant.resultPath(d, "report.json"))
			if err != nil {
				t.Fatal(err)
			}
			data, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			data[len(data)-1] ^= 1
			overwrite(t, w, d, "report.json", data)
		},
		"list of another launch": func(t *testing.T, w *world, d *Deployment, g *fakeGuest) {
			t.Helper()
			list, err := contract.SealResults(&contract.ResultManifest{Version: contract.ResultsVersion, LaunchID: strings.Repeat("0", 32), Results: []contract.ResultEntry{}}, g.ResultKey)
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, w, d, contract.ResultsManifestName, list)
		},
		"file nobody asked for": func(t *testing.T, w *world, d *Deployment, g *fakeGuest) {
			t.Helper()
			list, err := contract.SealResults(&contract.ResultManifest{Version: contract.ResultsVersion, LaunchID: d.LaunchID, Results: []contract.ResultEntry{
				{Name: "extra", SHA256: strings.Repeat("0", 64), Size: 1},
			}}, g.ResultKey)
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, w, d, contract.ResultsManifestName, list)
		},
		"no list but bytes": func(t *testing.T, w *world, d *Deployment, _ *fakeGuest) {
			t.Helper()
			overwrite(t, w, d, contract.ResultsManifestName, []byte("{}"))
		},
	}
	for name, forge := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			d := w.deploy()
			if _, err := w.tenant.WaitRunning(t.Context(), "job"); err != nil {
				t.Fatal(err)
			}
			forge(t, w, d, w.guest())
			out := t.TempDir()
			if _, err := w.tenant.Results(t.Context(), "job", out); code(err) != codeResultForged || ExitCode(err) != ExitPrecondition {
				t.Fatal(err)
			}
			if entries, err := os.ReadDir(out); err != nil || len(entries) != 0 {
				t.Fatalf("something was opened: %v %v", entries, err)
			}
		})
	}
}

// A host can keep results back; it cannot make that look like anything else.
func TestResultsThatAreKeptBackAreMissedByName(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	o := w.options(image)
	o.Results = append(o.Results, "second.json")
	d, err := w.tenant.Deploy(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.tenant.WaitRunning(t.Context(), "job"); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	if _, err := w.tenant.Results(t.Context(), "job", out); code(err) != "tenant.results-not-found" || ExitCode(err) != ExitNotFound {
		t.Fatalf("no list: %v", err)
	}
	g := w.guest()
	g.finish(t, map[string]string{"report.json": plaintext, "second.json": plaintext}, g.ResultKey)
	if _, err := w.objects.DeleteObject(bucket, w.tenant.resultPath(d, "second.json")); err != nil {
		t.Fatal(err)
	}
	_, err = w.tenant.Results(t.Context(), "job", out)
	if code(err) != "tenant.result-not-found" || !strings.Contains(err.Error(), "second.json") {
		t.Fatalf("one of two: %v", err)
	}
	if entries, err := os.ReadDir(out); err != nil || len(entries) != 0 {
		t.Fatalf("half a result set was opened: %v %v", entries, err)
	}
}

// The server's answer is a host's word until it was verified: it must not
// fill the client's memory before.
func TestAnEndlessHeaderIsNoEvidence(t *testing.T) {
	t.Parallel()
	client, server := net.Pipe()
	sent := make(chan int, 1)
	go func() {
		if _, err := http.ReadRequest(bufio.NewReader(server)); err != nil {
			t.Error(err)
		}
		n, _ := io.WriteString(server, "HTTP/1.1 200 OK\r\n")
		for line := "X-More: " + strings.Repeat("a", 1<<10) + "\r\n"; ; {
			more, err := io.WriteString(server, line)
			if n += more; err != nil || n > 4<<20 {
				sent <- n
				_ = server.Close()
				return
			}
		}
	}()
	if _, err := fetchEvidence(t.Context(), client, "guest.example", []byte("nonce")); err == nil {
		t.Error("accepted")
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if n := <-sent; n > contract.MaxEvidenceBytes+maxEvidenceHead+8<<10 {
		t.Errorf("%d bytes were read", n)
	}
}

func TestMissingResultIsNamed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	if _, err := w.tenant.WaitRunning(t.Context(), "job"); err != nil {
		t.Fatal(err)
	}
	g := w.guest()
	g.finish(t, nil, g.ResultKey)
	r, err := w.tenant.Results(t.Context(), "job", t.TempDir())
	if err != nil || len(r.Files) != 0 || len(r.Missing) != 1 {
		t.Fatalf("%+v %v", r, err)
	}
}

func TestEvidenceOfAnotherLaunchOrHostIsRefused(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		check string
		swap  func(*testing.T) func(*api.LaunchGuest)
	}{
		"another kernel": {"launch-digest", func(*testing.T) func(*api.LaunchGuest) {
			return func(l *api.LaunchGuest) { l.LaunchDigest[0] ^= 1 }
		}},
		"another manifest": {"own-manifest", func(t *testing.T) func(*api.LaunchGuest) {
			t.Helper()
			return func(l *api.LaunchGuest) {
				m, err := contract.ParseManifest(l.GetManifest())
				if err != nil {
					t.Error(err)
					return
				}
				m.Results = nil
				if l.Manifest, err = m.Encode(); err != nil {
					t.Error(err)
				}
			}
		}},
		"debug policy": {"policy-debug", func(*testing.T) func(*api.LaunchGuest) {
			return func(l *api.LaunchGuest) { l.Machine.Policy |= 1 << 19 }
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.node.swap = test.swap(t)
			w.deploy()
			v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{})
			if err != nil || v.OK() || !failed(v, test.check) {
				t.Fatalf("%+v %v", v, err)
			}
			if _, err := w.tenant.Wait(t.Context(), "job"); code(err) != codeUnverified {
				t.Fatalf("wait must end: %v", err)
			}
			if _, err := w.tenant.VerifyDeployment("job", VerifyOptions{}); code(err) != "tenant.evidence-missing" {
				t.Fatalf("bad evidence was kept: %v", err)
			}
		})
	}
}

func TestVerifyingAFileNeedsOnesOwnChallenge(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{})
	if err != nil || !v.OK() {
		t.Fatalf("%+v %v", v, err)
	}
	if v, err := w.tenant.Verify(v.Raw, VerifyOptions{}); err != nil || !v.OK() {
		t.Fatalf("own challenge: %+v %v", v, err)
	}
	other, err := w.guest().answer([]byte("sixteen bytes ok"))
	if err != nil {
		t.Fatal(err)
	}
	if v, err := w.tenant.Verify(other, VerifyOptions{}); err != nil || !failed(v, "nonce") {
		t.Fatalf("somebody else's challenge: %v", err)
	}
	if v, err := w.tenant.Verify(other, VerifyOptions{Nonce: hex.EncodeToString([]byte("sixteen bytes ok"))}); err != nil || !v.OK() {
		t.Fatalf("nonce by flag: %+v %v", v, err)
	}
	if v, err := w.tenant.Verify(v.Raw, VerifyOptions{MinTCB: &contract.TCB{Microcode: 255}}); err != nil || !failed(v, "tcb-floor") {
		t.Fatal(err)
	}
	w.profile.Verify = VerifyProfile{}
	w.reopen()
	if v, err := w.tenant.Verify(v.Raw, VerifyOptions{}); err != nil || !failed(v, "root") {
		t.Fatalf("emulated root without leave: %v", err)
	}
	if v, err := w.tenant.Verify([]byte("{}"), VerifyOptions{}); err != nil || v.OK() {
		t.Fatalf("garbage: %v", err)
	}
	raw, err := v.JSON(false)
	if err != nil || !strings.Contains(string(raw), `"kind":"Verdict"`) {
		t.Fatalf("%s %v", raw, err)
	}
}

func TestEvidenceOfNoDeploymentIsJudgedByTheProfilesImage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.deploy()
	nonce := []byte("sixteen bytes ok")
	raw, err := w.guest().answer(nonce)
	if err != nil {
		t.Fatal(err)
	}
	w.profile.StateDir = filepath.Join(t.TempDir(), "fresh")
	w.reopen()
	v, err := w.tenant.Verify(raw, VerifyOptions{Nonce: hex.EncodeToString(nonce), ExpectedImage: d.Image})
	if err != nil || !v.OK() {
		t.Fatalf("%+v %v", v, err)
	}
	if v, err := w.tenant.Verify(raw, VerifyOptions{Nonce: hex.EncodeToString(nonce)}); err != nil || !failed(v, "workload-image") {
		t.Fatalf("no expected image: %v", err)
	}
}

func TestEndedOrSilentGuestGivesNoEvidence(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	g := w.guest()
	g.mute = true
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := w.tenant.Attest(ctx, "job", VerifyOptions{}); ExitCode(err) != ExitTimeout {
		t.Fatal(err)
	}
	if err := w.tenant.Stop(t.Context(), "job", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{}); code(err) != "guest.not-running" {
		t.Fatal(err)
	}
	if _, err := w.tenant.Wait(t.Context(), "job"); code(err) != "tenant.guest-stopped" {
		t.Fatal(err)
	}
	if _, err := w.tenant.Attest(t.Context(), "nobody", VerifyOptions{}); ExitCode(err) != ExitNotFound {
		t.Fatal(err)
	}
}

func TestFailedGuestTellsTheBrokersReason(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	g := w.guest()
	w.node.mu.Lock()
	g.state.Status = api.GuestStatus_GUEST_STATUS_FAILED
	g.state.Refusal = contract.Refuse("broker.launch-digest", "boot the right image", "the broker refused")
	w.node.mu.Unlock()
	if _, err := w.tenant.Wait(t.Context(), "job"); code(err) != "broker.launch-digest" {
		t.Fatal(err)
	}
}

// endpoint serves the workload's port as the guest's init does.
func endpoint(t *testing.T, g *fakeGuest, cert tls.Certificate, asked *atomic.Int32) string {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != evidencePath {
			asked.Add(1)
			io.WriteString(w, "hello from inside"+r.TLS.ServerName) //nolint:errcheck // the client notices
			return
		}
		nonce, err := hex.DecodeString(r.URL.Query().Get("nonce"))
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		raw, err := g.answer(nonce)
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		w.Write(raw) //nolint:errcheck // the client notices
	}))
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "https://")
}

func TestCallReachesTheAttestedGuestOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	g := w.guest()
	var asked atomic.Int32
	addr := endpoint(t, g, certificate(t, g.TLSKey), &asked)
	client, err := w.tenant.HTTPClient("job", addr, VerifyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	get := func(client *http.Client, addr string) (string, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+addr+"/ask", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close() //nolint:errcheck // it is read
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	for range 2 {
		if got, err := get(client, addr); err != nil || got != "hello from inside" {
			t.Fatalf("%q %v", got, err)
		}
	}
	// A name finds the guest where many share a port.
	client, err = w.tenant.HTTPClient("job", addr, VerifyOptions{ServerName: "job.guests.example"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := get(client, addr); err != nil || got != "hello from insidejob.guests.example" {
		t.Errorf("%q %v", got, err)
	}
	// A host in the middle has its own key and relays the guest's evidence.
	asked.Store(0)
	other := *g
	relay := endpoint(t, &other, certificate(t, newGuestKey(t)), &asked)
	client, err = w.tenant.HTTPClient("job", relay, VerifyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := get(client, relay); code(err) != codeUnverified || !strings.Contains(err.Error(), "tls-key") {
		t.Fatal(err)
	}
	plain := w.serve(http.NotFoundHandler())
	client, err = w.tenant.HTTPClient("job", strings.TrimPrefix(plain.URL, "https://"), VerifyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := get(client, strings.TrimPrefix(plain.URL, "https://")); code(err) != codeUnverified {
		t.Fatal(err)
	}
	if asked.Load() != 0 {
		t.Fatal("a request reached a server that was not attested")
	}
}

func FuzzReadEvidence(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 404 Not Found\r\n\r\n"))
	req := httptest.NewRequestWithContext(f.Context(), http.MethodGet, evidencePath, nil)
	f.Fuzz(func(t *testing.T, data []byte) {
		body, err := readEvidence(bytes.NewReader(data), req)
		if (body == nil) == (err == nil) || len(body) > contract.MaxEvidenceBytes {
			t.Errorf("%d bytes, %v", len(body), err)
		}
		if err == nil && !bytes.HasPrefix(data, []byte("HTTP/")) {
			t.Errorf("evidence from %q", data)
		}
	})
}

func TestAProcessorLineThatDoesNotExistCannotBeAllowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	if _, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{AllowProducts: []string{"rome"}}); err == nil || !strings.Contains(err.Error(), "--allow-product") {
		t.Errorf("%v", err)
	}
	if v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{AllowProducts: []string{"milan"}}); err != nil || !v.OK() || v.Signer == nil {
		t.Errorf("%+v %v", v, err)
	}
}
