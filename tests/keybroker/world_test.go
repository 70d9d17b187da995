package keybroker

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

const (
	adminToken = "0123456789abcdef0123456789abcdef"
	launchID   = "00112233445566778899aabbccddeeff"
	secret     = "AGE-SECRET-KEY-CANARY"
	secretName = "job/age/data"
)

func testTime() time.Time   { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) }
func testTCB() contract.TCB { return contract.TCB{BootLoader: 10, SNP: 27, Microcode: 86} }

// testChain is made once: three P-384 keys are slow under the race detector.
var testChain = sync.OnceValues(func() (*snptest.Chain, error) {
	return snptest.NewChain(snptest.ProductEmulated, testTCB(), bytes.Repeat([]byte{7}, 64), testTime())
})

// clock is a time that tests set.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// world is a broker with one registered launch and a chip to sign reports.
type world struct {
	t        *testing.T
	cfg      Config
	clock    *clock
	log      *bytes.Buffer
	server   *Server
	web      *httptest.Server
	admin    *brokeradmin.Client
	chain    *snptest.Chain
	report   snp.Report
	launch   brokeradmin.Launch
	manifest *contract.Manifest
}

func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, clock: &clock{now: testTime()}, log: &bytes.Buffer{}}
	var err error
	if w.chain, err = testChain(); err != nil {
		t.Fatal(err)
	}
	w.manifest = &contract.Manifest{
		Version: contract.ManifestVersion, LaunchID: launchID, Image: "registry.example/app@sha256:" + strings.Repeat("ab", 32),
		Broker:   contract.Endpoint{URL: "https://broker.example:8443", SPKISHA256: strings.Repeat("cd", 32)},
		Registry: contract.Endpoint{URL: "https://registry.example", SPKISHA256: strings.Repeat("cd", 32)},
		TCBFloor: &contract.TCB{SNP: 20},
	}
	w.launch = brokeradmin.Launch{
		LaunchDigests: []string{strings.Repeat("5a", 48)}, Manifest: encode(t, w.manifest), Image: description(),
		TCBFloor: &contract.TCB{Microcode: 80}, Resources: map[string][]byte{secretName: []byte(secret)},
	}
	w.report = goodReport(w.launch.Manifest)
	w.cfg = Config{
		StateDir: t.TempDir(), AdminToken: adminToken, EmulatedRoots: []*x509.Certificate{w.chain.Root}, Issuer: "https://broker.example:8443",
		Logger: hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: w.log}), Now: w.clock.Now, Rate: 1000, Burst: 1000,
	}
	if change != nil {
		change(&w.cfg)
	}
	t.Cleanup(w.stop)
	w.start()
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	return w
}

// start opens the broker on the state folder, as after a restart.
func (w *world) start() {
	w.t.Helper()
	w.stop()
	var err error
	if w.server, err = New(w.cfg); err != nil {
		w.t.Fatal(err)
	}
	w.web = httptest.NewUnstartedServer(w.server.Handler())
	w.web.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	w.web.StartTLS()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.web.Certificate().Raw})
	if w.admin, err = brokeradmin.NewClient(w.web.URL, ca, adminToken); err != nil {
		w.t.Fatal(err)
	}
}

// stop ends the broker, as a crash would: nothing is written.
func (w *world) stop() {
	if w.server == nil {
		return
	}
	w.web.Close()
	if err := w.server.Close(); err != nil {
		w.t.Error(err)
	}
	w.server = nil
}

func encode(t *testing.T, m *contract.Manifest) []byte {
	t.Helper()
	raw, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func description() *contract.ImageDescription {
	file := func(name string) contract.ImageFile {
		return contract.ImageFile{File: name, SHA256: strings.Repeat("11", 32), Size: 1}
	}
	return &contract.ImageDescription{
		Version: contract.ImageVersion, Name: "guest", Variant: contract.VariantProduction, AMLDefence: true,
		Firmware: file("fw"), Kernel: file("k"), Initrd: file("i"), Cmdline: "quiet",
	}
}

func goodReport(manifest []byte) snp.Report {
	tcb := testTCB()
	version := uint64(tcb.BootLoader) | uint64(tcb.TEE)<<8 | uint64(tcb.SNP)<<48 | uint64(tcb.Microcode)<<56
	r := snp.Report{
		Version: 3, Policy: snp.PolicyReservedOne | snp.PolicySMT, SigAlgo: 1, Family: 0x19, Model: 0x11, Stepping: 1,
		CurrentTCB: version, ReportedTCB: version, CommittedTCB: version, LaunchTCB: version, HostData: contract.HostData(manifest),
	}
	copy(r.Measurement[:], bytes.Repeat([]byte{0x5a}, 48))
	copy(r.ReportIDMA[:], bytes.Repeat([]byte{0xff}, 32))
	copy(r.ChipID[:], bytes.Repeat([]byte{7}, 64))
	return r
}

// guest is a broker client as a guest has it.
type guest struct {
	w    *world
	http *http.Client
	key  *ecdsa.PrivateKey
	jwk  json.RawMessage
	// bound is the key the report vouches for; jwk unless a test lies.
	bound    json.RawMessage
	manifest []byte
	endorse  contract.Endorsements
	report   snp.Report
	extra    string // additional evidence
	// boundNonce is the nonce the report vouches for; the session's when empty.
	boundNonce string
	// tamper changes the report after the chip signed it.
	tamper func(signed []byte)
}

func (w *world) guest() *guest {
	w.t.Helper()
	key, raw := newKey(w.t)
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	client := w.web.Client()
	return &guest{
		w: w, http: &http.Client{Transport: client.Transport, Jar: jar}, key: key, jwk: raw, bound: raw,
		manifest: w.launch.Manifest, endorse: w.chain.Endorsements, report: w.report,
	}
}

func newKey(tb testing.TB) (*ecdsa.PrivateKey, json.RawMessage) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	raw, err := json.Marshal(map[string]string{"kty": "EC", "crv": "P-256", "alg": keyAlgorithm, "x": b64(point[1:33]), "y": b64(point[33:])})
	if err != nil {
		tb.Fatal(err)
	}
	return key, raw
}

func (g *guest) do(method, path, bearer string, body any) (int, []byte) {
	g.w.t.Helper()
	raw, isRaw := body.([]byte)
	if !isRaw && body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			g.w.t.Fatal(err)
		}
	}
	req, err := http.NewRequestWithContext(g.w.t.Context(), method, g.w.web.URL+path, bytes.NewReader(raw))
	if err != nil {
		g.w.t.Fatal(err)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := g.http.Do(req)
	if err != nil {
		g.w.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		g.w.t.Fatal(err)
	}
	return resp.StatusCode, out
}

func (g *guest) auth() string {
	g.w.t.Helper()
	status, body := g.do(http.MethodPost, "/kbs/v0/auth", "", map[string]any{"version": "0.4.0", "tee": "snp", "extra-params": map[string]any{}})
	var c challenge
	if err := json.Unmarshal(body, &c); err != nil || status != http.StatusOK || c.Nonce == "" {
		g.w.t.Fatalf("auth: %d %s %v", status, body, err)
	}
	return c.Nonce
}

// attestBody signs a report over the nonce and returns the attest request.
func (g *guest) attestBody(nonce string) map[string]any {
	g.w.t.Helper()
	data, err := contract.BrokerReportData(g.extra, cmp.Or(g.boundNonce, nonce), g.bound)
	if err != nil {
		g.w.t.Fatal(err)
	}
	g.report.ReportData = data
	signed, err := snptest.Sign(g.report.Marshal(), g.w.chain.Key)
	if err != nil {
		g.w.t.Fatal(err)
	}
	if g.tamper != nil {
		g.tamper(signed)
	}
	return map[string]any{
		"runtime-data": map[string]any{"nonce": nonce, "tee-pubkey": g.jwk},
		"tee-evidence": map[string]any{
			"primary_evidence":    contract.BrokerEvidence{Report: signed, Manifest: g.manifest, Endorsements: g.endorse},
			"additional_evidence": g.extra,
		},
	}
}

func (g *guest) attest(body any) (string, int, brokeradmin.ErrorBody) {
	g.w.t.Helper()
	status, out := g.do(http.MethodPost, "/kbs/v0/attest", "", body)
	var token tokenResponse
	var refused brokeradmin.ErrorBody
	if status == http.StatusOK {
		if err := json.Unmarshal(out, &token); err != nil {
			g.w.t.Fatal(err)
		}
	} else if err := json.Unmarshal(out, &refused); err != nil {
		g.w.t.Fatalf("answer %d %s: %v", status, out, err)
	}
	return token.Token, status, refused
}

func (g *guest) resource(name, bearer string) (string, int, brokeradmin.ErrorBody) {
	g.w.t.Helper()
	status, out := g.do(http.MethodGet, "/kbs/v0/resource/"+name, bearer, nil)
	var refused brokeradmin.ErrorBody
	if status != http.StatusOK {
		if err := json.Unmarshal(out, &refused); err != nil {
			g.w.t.Fatalf("answer %d %s: %v", status, out, err)
		}
		return "", status, refused
	}
	jwe, err := jose.ParseEncryptedJSON(string(out), []jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		g.w.t.Fatal(err)
	}
	plain, err := jwe.Decrypt(g.key)
	if err != nil {
		g.w.t.Fatal(err)
	}
	return string(plain), status, refused
}

func newListener(t *testing.T) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}
