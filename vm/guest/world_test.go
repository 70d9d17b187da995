package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/confidential-node/agent/firmware/contract"
)

// world is what is around a guest: the host's metadata service, the tenant's
// broker and registry, all in this process. It obeys the wire's rules and can
// be told to misbehave.
type world struct {
	t        *testing.T
	manifest *contract.Manifest
	identity *age.X25519Identity // opens inputs and results
	disks    map[string][]byte   // by input name
	facts    contract.NetworkFacts

	// served replaces the manifest the metadata service serves.
	served []byte
	// refuse makes the broker refuse attestations.
	refuse *contract.Refusal
	// deaf makes the node take no results.
	deaf bool
	// resources the broker gives, by path.
	resources map[string][]byte

	challenges chan contract.Challenge
	broker     *httptest.Server
	registry   *httptest.Server

	mu       sync.Mutex
	changed  chan struct{} // closed and renewed on every change
	statuses []contract.GuestStatus
	results  map[string][]byte
	evidence map[string][]byte
	attested int
	nonce    string
	key      *ecdsa.PublicKey
}

// tlsOn serves HTTPS on a fresh port of all addresses.
func tlsOn(t *testing.T, h http.Handler) *httptest.Server {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: ln, Config: &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}}
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// imageUser is the workload's user. Without root, files can be given to nobody
// else.
func imageUser() string {
	if os.Geteuid() == 0 {
		return "12:34"
	}
	return fmt.Sprintf("%d:%d", os.Getuid(), os.Getgid())
}

// newWorld starts broker and registry, to be reached as host, and seals one
// input. program is the workload's only file.
func newWorld(t *testing.T, host string, program []byte) *world {
	t.Helper()
	w := &world{
		t: t, changed: make(chan struct{}), results: map[string][]byte{}, evidence: map[string][]byte{},
		challenges: make(chan contract.Challenge, 1), disks: map[string][]byte{}, resources: map[string][]byte{"tenant/env/secret": []byte("s3cret")},
	}
	var err error
	if w.identity, err = age.GenerateX25519Identity(); err != nil {
		t.Fatal(err)
	}
	w.resources["tenant/keys/data"] = []byte(w.identity.String())
	w.broker = tlsOn(t, w.brokerHandler())
	w.registry = tlsOn(t, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	at := func(s *httptest.Server) string {
		_, port, err := net.SplitHostPort(s.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return net.JoinHostPort(host, port)
	}
	spki := sha256.Sum256(w.broker.Certificate().RawSubjectPublicKeyInfo)
	w.manifest = &contract.Manifest{
		Version: 1, LaunchID: strings.Repeat("0a", 16),
		Command:   []string{"probe", "one"},
		Env:       map[string]string{"PATH": "/bin"},
		SecretEnv: map[string]string{"SECRET": "kbs:///tenant/env/secret"},
		Results:   []contract.Result{{Name: "report.json", Recipients: []string{w.identity.Recipient().String()}}, {Name: "link", Recipients: []string{w.identity.Recipient().String()}}},
		Ports:     []int{8080},
		Broker:    contract.Endpoint{URL: "https://" + at(w.broker), SPKISHA256: hex.EncodeToString(spki[:])},
		Registry:  contract.Endpoint{URL: "https://" + at(w.registry), CAPEM: certPEM(w.registry)},
		Image:     w.push(at(w.registry), program),
	}
	w.seal("data", []byte("plaintext"))
	return w
}

// otherCA is a CA that issued nothing here.
func otherCA(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func certPEM(s *httptest.Server) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// seal adds an input.
func (w *world) seal(name string, plain []byte) {
	w.t.Helper()
	var out bytes.Buffer
	e, err := age.Encrypt(&out, w.identity.Recipient())
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = e.Write(plain)
	if err := errors.Join(err, e.Close()); err != nil {
		w.t.Fatal(err)
	}
	sum := sha256.Sum256(out.Bytes())
	w.manifest.Inputs = append(w.manifest.Inputs, contract.Input{
		Name: name, SHA256: hex.EncodeToString(sum[:]), Size: int64(out.Len()), Format: contract.FormatAge, Key: "kbs:///tenant/keys/data",
	})
	// The device is padded to sectors.
	w.disks[name] = append(out.Bytes(), make([]byte, 512-out.Len()%512)...)
}

// push makes an image of one layer and returns its reference.
func (w *world) push(host string, program []byte) string {
	w.t.Helper()
	var layer bytes.Buffer
	archive := tar.NewWriter(&layer)
	uid, gid := os.Getuid(), os.Getgid()
	for _, h := range []*tar.Header{
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755, Uid: uid, Gid: gid},
		{Name: "bin/probe", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program)), Uid: uid, Gid: gid},
	} {
		if err := archive.WriteHeader(h); err != nil {
			w.t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := archive.Write(program); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	if err := archive.Close(); err != nil {
		w.t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		w.t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		w.t.Fatal(err)
	}
	if img, err = mutate.Config(img, v1.Config{WorkingDir: "/bin", User: imageUser()}); err != nil {
		w.t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(host)
	if err != nil {
		w.t.Fatal(err)
	}
	ref, err := name.ParseReference(net.JoinHostPort("127.0.0.1", port)+"/tenant/probe:1", name.StrictValidation)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithTransport(w.registry.Client().Transport)); err != nil {
		w.t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		w.t.Fatal(err)
	}
	return host + "/tenant/probe@" + digest.String()
}

func (w *world) manifestBytes() []byte {
	w.t.Helper()
	text, err := w.manifest.Encode()
	if err != nil {
		w.t.Fatal(err)
	}
	return text
}

// change applies f to what the guest has sent so far and wakes waiters.
func (w *world) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

// await waits until ok holds of what the guest has sent.
func (w *world) await(ctx context.Context, what string, ok func() bool) {
	w.t.Helper()
	for {
		w.mu.Lock()
		done, changed := ok(), w.changed
		w.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			w.mu.Lock()
			defer w.mu.Unlock()
			w.t.Fatalf("waiting for %s: %v; the guest said %+v", what, ctx.Err(), w.statuses)
		}
	}
}

// last returns the status of a phase.
func (w *world) status(p contract.GuestPhase) *contract.GuestStatus {
	for _, s := range w.statuses {
		if s.Phase == p {
			return &s
		}
	}
	return nil
}

// metadataHandler is the host's service, as the contract describes it.
func (w *world) metadataHandler() http.Handler {
	mux := http.NewServeMux()
	answer := func(rw http.ResponseWriter, v any) {
		if err := json.NewEncoder(rw).Encode(v); err != nil {
			w.t.Log(err)
		}
	}
	mux.HandleFunc("GET "+contract.PathManifest, func(rw http.ResponseWriter, _ *http.Request) {
		_, _ = rw.Write(w.served)
	})
	mux.HandleFunc("GET "+contract.PathNetwork, func(rw http.ResponseWriter, _ *http.Request) { answer(rw, w.facts) })
	mux.HandleFunc("GET "+contract.PathEndorsements, func(rw http.ResponseWriter, _ *http.Request) {
		answer(rw, contract.Endorsements{VCEK: []byte("vcek")})
	})
	mux.HandleFunc("GET "+contract.PathBoot, func(rw http.ResponseWriter, _ *http.Request) {
		answer(rw, contract.BootComponents{KernelSHA256: "00", VCPUs: 1})
	})
	mux.HandleFunc("GET "+contract.PathChallenge, func(rw http.ResponseWriter, r *http.Request) {
		select {
		case c := <-w.challenges:
			answer(rw, c)
		case <-r.Context().Done():
		case <-time.After(contract.ChallengePollSeconds * time.Second):
			rw.WriteHeader(http.StatusNoContent)
		}
	})
	receive := func(limit int64, take func(r *http.Request, body []byte)) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			if w.deaf && r.Method == http.MethodPut {
				http.Error(rw, "over quota", http.StatusInsufficientStorage)
				return
			}
			body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, limit))
			if err != nil {
				http.Error(rw, "unreadable", http.StatusBadRequest)
				return
			}
			w.change(func() { take(r, body) })
			rw.WriteHeader(http.StatusNoContent)
		}
	}
	mux.HandleFunc("POST "+contract.PathEvidence, receive(contract.MaxEvidenceBytes, func(r *http.Request, body []byte) {
		w.evidence[r.URL.Query().Get("id")] = body
	}))
	mux.HandleFunc("POST "+contract.PathStatus, receive(contract.MaxStatusBytes, func(_ *http.Request, body []byte) {
		var s contract.GuestStatus
		if err := contract.UnmarshalStrict(body, contract.MaxStatusBytes, &s); err != nil {
			w.t.Error(err)
		}
		w.statuses = append(w.statuses, s)
	}))
	mux.HandleFunc("PUT "+contract.PathResults+"{name}", receive(1<<20, func(r *http.Request, body []byte) {
		w.results[r.PathValue("name")] = body
	}))
	mux.HandleFunc("PUT "+contract.PathResultManifest, receive(contract.MaxResultManifestBytes, func(_ *http.Request, body []byte) {
		w.results[contract.ResultsManifestName] = body
	}))
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get(contract.MetadataHeader) != contract.MetadataToken {
			http.Error(rw, "no token", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(rw, r)
	})
}

// brokerHandler speaks CoCo KBS 0.4.0 as far as a guest sees it. Reports are
// not signed here, but what they say must hold.
func (w *world) brokerHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /kbs/v0/auth", func(rw http.ResponseWriter, _ *http.Request) {
		w.mu.Lock()
		w.nonce = base64.StdEncoding.EncodeToString([]byte("a nonce of the broker's own ....."))
		w.mu.Unlock()
		http.SetCookie(rw, &http.Cookie{Name: "kbs-session-id", Value: "1", Path: "/", Secure: true})
		_ = json.NewEncoder(rw).Encode(map[string]string{"nonce": w.nonce, "extra-params": ""})
	})
	mux.HandleFunc("POST /kbs/v0/attest", func(rw http.ResponseWriter, r *http.Request) {
		if err := w.judge(r); err != nil {
			refused := contract.AsRefusal(err)
			rw.WriteHeader(http.StatusUnauthorized)
			_ = json.NewEncoder(rw).Encode(map[string]string{"type": "t", "detail": refused.Message, "code": refused.Code, "message": refused.Message, "remedy": refused.Remedy})
			return
		}
		_ = json.NewEncoder(rw).Encode(map[string]string{"token": "token-1"})
	})
	mux.HandleFunc("GET /kbs/v0/resource/{a}/{b}/{c}", func(rw http.ResponseWriter, r *http.Request) {
		value, ok := w.resources[r.PathValue("a")+"/"+r.PathValue("b")+"/"+r.PathValue("c")]
		if !ok || r.Header.Get("Authorization") != "Bearer token-1" {
			rw.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(rw).Encode(map[string]string{"code": "broker.resource-unknown", "message": "no such resource", "remedy": "register it"})
			return
		}
		w.mu.Lock()
		key := w.key
		w.mu.Unlock()
		enc, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.ECDH_ES_A256KW, Key: key}, nil)
		if err != nil {
			w.t.Error(err)
			return
		}
		obj, err := enc.Encrypt(value)
		if err != nil {
			w.t.Error(err)
			return
		}
		_, _ = io.WriteString(rw, obj.FullSerialize())
	})
	return mux
}

func (w *world) judge(r *http.Request) error {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return err
	}
	var req struct {
		InitData json.RawMessage `json:"init-data"`
		Runtime  struct {
			Nonce string          `json:"nonce"`
			Key   json.RawMessage `json:"tee-pubkey"`
		} `json:"runtime-data"`
		Evidence struct {
			Primary    contract.BrokerEvidence `json:"primary_evidence"`
			Additional string                  `json:"additional_evidence"`
		} `json:"tee-evidence"`
	}
	if err := contract.UnmarshalStrict(body, 1<<20, &req); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.attested++
	if w.refuse != nil {
		return w.refuse
	}
	without, err := contract.BrokerReportData("", w.nonce, req.Runtime.Key)
	if err != nil {
		return err
	}
	if err := w.judgeGPUs(req.Evidence.Additional, without); err != nil {
		return err
	}
	want, err := contract.BrokerReportData(req.Evidence.Additional, w.nonce, req.Runtime.Key)
	if err != nil {
		return err
	}
	report := req.Evidence.Primary.Report
	hostData := contract.HostData(req.Evidence.Primary.Manifest)
	if len(report) != 0x4A0 || !bytes.Equal(report[0x50:0x90], want[:]) || !bytes.Equal(report[0xC0:0xE0], hostData[:]) || req.Runtime.Nonce != w.nonce {
		return contract.Refuse("broker.evidence", "r", "the report does not bind nonce, key and manifest")
	}
	var jwk struct{ X, Y string }
	if err := json.Unmarshal(req.Runtime.Key, &jwk); err != nil {
		return err
	}
	x, errX := base64.RawURLEncoding.DecodeString(jwk.X)
	y, errY := base64.RawURLEncoding.DecodeString(jwk.Y)
	if err := errors.Join(errX, errY); err != nil {
		return err
	}
	w.key, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append(append([]byte{4}, x...), y...))
	return err
}

// judgeGPUs demands evidence of as many GPUs as the manifest's, each over the
// nonce that without leads to.
func (w *world) judgeGPUs(evidence string, without [contract.ReportDataSize]byte) error {
	if w.manifest.GPU == nil {
		if evidence != "" {
			return contract.Refuse("broker.gpus", "r", "evidence of GPUs nobody asked for")
		}
		return nil
	}
	gpus, err := contract.ParseGPUEvidence([]byte(evidence))
	if err != nil {
		return err
	}
	nonce := contract.GPUNonce(without)
	for _, g := range gpus {
		if g.Nonce != hex.EncodeToString(nonce[:]) {
			return contract.Refuse("broker.gpus", "r", "a GPU answers another nonce")
		}
	}
	if len(gpus) != w.manifest.GPU.Count {
		return contract.Refuse("broker.gpus", "r", "evidence of %d GPUs", len(gpus))
	}
	return nil
}

// report is what a processor would say, without a signature.
func report(data [64]byte, hostData [32]byte) []byte {
	out := make([]byte, 0x4A0)
	copy(out[0x50:], data[:])
	copy(out[0xC0:], hostData[:])
	return out
}

// openResult decrypts what the guest delivered.
func (w *world) openResult(name string) []byte {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	r, err := age.Decrypt(bytes.NewReader(w.results[name]), w.identity)
	if err != nil {
		w.t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		w.t.Fatal(err)
	}
	return plain
}

// writeDisks writes the block devices' contents and returns serial to path.
func (w *world) writeDisks(dir string) map[string]string {
	w.t.Helper()
	out := map[string]string{}
	for _, in := range w.manifest.Inputs {
		if w.disks[in.Name] == nil {
			continue
		}
		file := filepath.Join(dir, in.Name+".disk")
		if err := os.WriteFile(file, w.disks[in.Name], 0o600); err != nil {
			w.t.Fatal(err)
		}
		out[in.SHA256[:20]] = file
	}
	return out
}

// verify checks evidence as a verifier would, apart from the signature.
func (w *world) verify(bundle, nonce []byte) *contract.Evidence {
	w.t.Helper()
	e, err := contract.ParseEvidence(bundle)
	if err != nil {
		w.t.Fatal(err)
	}
	want := contract.EvidenceReportData(nonce, e.TLSSPKI, e.ResultKey, e.GPUEvidence)
	if !bytes.Equal(e.Nonce, nonce) || !bytes.Equal(e.Report[0x50:0x90], want[:]) || !bytes.Equal(e.Manifest, w.manifestBytes()) || string(e.Endorsements.VCEK) != "vcek" || e.Boot.VCPUs != 1 {
		w.t.Errorf("evidence does not bind what it says: %+v", e)
	}
	return e
}

// attestedClient talks to a port of the guest whose key the evidence binds.
func (w *world) attestedClient(addr string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		},
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}, //nolint:gosec // the evidence says whose key it is
	}}
}

// converse attests to the guest over its port, then talks to its workload.
func (w *world) converse(ctx context.Context, addr string) {
	w.t.Helper()
	client := w.attestedClient(addr)
	nonce := bytes.Repeat([]byte{3}, 32)
	body, state := w.get(ctx, client, http.MethodGet, "https://guest/.well-known/evidence?nonce="+hex.EncodeToString(nonce), nil)
	e := w.verify(body, nonce)
	if !bytes.Equal(e.TLSSPKI, state.PeerCertificates[0].RawSubjectPublicKeyInfo) || state.Version != tls.VersionTLS13 {
		w.t.Error("the connection's key is not the evidence's")
	}
	if body, _ := w.get(ctx, client, http.MethodPost, "https://guest/echo", []byte("prompt")); string(body) != "prompt" {
		w.t.Errorf("echo: %q", body)
	}
}

func (w *world) get(ctx context.Context, client *http.Client, method, url string, body []byte) ([]byte, *tls.ConnectionState) {
	w.t.Helper()
	for {
		req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
		if err != nil {
			w.t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err == nil && resp.StatusCode == http.StatusOK {
			text, err := io.ReadAll(resp.Body)
			if err := errors.Join(err, resp.Body.Close()); err != nil {
				w.t.Fatal(err)
			}
			return text, resp.TLS
		}
		if err == nil {
			err = errors.Join(fmt.Errorf("status %s", resp.Status), resp.Body.Close())
		}
		select { // the workload may not listen yet
		case <-ctx.Done():
			w.t.Fatalf("%s %s: %v", method, url, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
