package keybroker

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

func TestRequestsOutsideTheProtocolAreRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	g := w.guest()
	tests := []struct {
		name, body string
		status     int
		code       string
	}{
		{"old version", `{"version":"0.1.1","tee":"snp","extra-params":""}`, 401, "broker.version-unsupported"},
		{"other TEE", `{"version":"0.4.0","tee":"tdx","extra-params":""}`, 401, "broker.tee-unsupported"},
		{"sample TEE", `{"version":"0.4.0","tee":"sample","extra-params":""}`, 401, "broker.tee-unsupported"},
		{"unknown field", `{"version":"0.4.0","tee":"snp","extra-params":"","more":1}`, 400, "broker.request-malformed"},
		{"duplicate key", `{"version":"0.4.0","tee":"snp","tee":"snp"}`, 400, "broker.request-malformed"},
		{"no JSON", `hello`, 400, "broker.request-malformed"},
		{"too large", `{"version":"` + strings.Repeat("0", maxAuthBytes) + `"}`, 413, "broker.body-too-large"},
	}
	for _, test := range tests {
		status, out := g.do(http.MethodPost, "/kbs/v0/auth", "", []byte(test.body))
		var refused brokeradmin.ErrorBody
		if err := json.Unmarshal(out, &refused); err != nil || status != test.status || refused.Code != test.code || refused.Remedy == "" {
			t.Errorf("%s: %d %s", test.name, status, out)
		}
	}
	g.auth()
	body := g.attestBody("x")
	body["init-data"] = map[string]string{"format": "json", "body": "{}"}
	if _, _, refused := g.attest(body); refused.Code != "broker.init-data-unsupported" {
		t.Errorf("%+v", refused)
	}
}

func TestOneAddressCannotFloodTheBroker(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Rate, c.Burst = 1, 5 })
	g := w.guest()
	for range 5 { // one went into registering
		g.do(http.MethodPost, "/kbs/v0/auth", "", []byte("{}"))
	}
	status, out := g.do(http.MethodPost, "/kbs/v0/auth", "", []byte("{}"))
	if status != http.StatusTooManyRequests || !strings.Contains(string(out), "broker.rate-limited") {
		t.Fatalf("%d %s", status, out)
	}
	w.clock.advance(time.Second)
	g.auth()
}

func registered(a brokeradmin.AppraisalPolicy) func(*brokeradmin.Launch) {
	return func(l *brokeradmin.Launch) { l.AppraisalPolicy = &a }
}

func TestAdminAPINeedsItsTokenAndKeepsManifestsFixed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.web.Certificate().Raw})
	stranger, err := brokeradmin.NewClient(w.web.URL, ca, adminToken[1:])
	if err != nil {
		t.Fatal(err)
	}
	code := func(err error) string { return contract.AsRefusal(err).Code }
	if err := stranger.PutLaunch(t.Context(), launchID, &w.launch); code(err) != "broker.admin-unauthorized" {
		t.Error(err)
	}
	if _, err := stranger.Launch(t.Context(), launchID); code(err) != "broker.admin-unauthorized" {
		t.Error(err)
	}
	if _, err := w.admin.Launch(t.Context(), strings.Repeat("0", 32)); code(err) != "broker.launch-unknown" {
		t.Error(err)
	}
	changed := *w.manifest
	changed.Ports = []int{1}
	l := w.launch
	l.Manifest = encode(t, &changed)
	if err := w.admin.PutLaunch(t.Context(), launchID, &l); code(err) != "broker.launch-conflict" {
		t.Error(err)
	}
	bad := map[string]func(*brokeradmin.Launch){
		"no digest":      func(l *brokeradmin.Launch) { l.LaunchDigests = nil },
		"short digest":   func(l *brokeradmin.Launch) { l.LaunchDigests = []string{"00"} },
		"no image":       func(l *brokeradmin.Launch) { l.Image = nil },
		"broken image":   func(l *brokeradmin.Launch) { l.Image = &contract.ImageDescription{} },
		"no manifest":    func(l *brokeradmin.Launch) { l.Manifest = nil },
		"bad chip":       func(l *brokeradmin.Launch) { l.ChipIDs = []string{"zz"} },
		"PDIs for none":  func(l *brokeradmin.Launch) { l.GPUPDIs = []string{"2921ce551e4eeda3"} },
		"bad resource":   func(l *brokeradmin.Launch) { l.Resources = map[string][]byte{"../x": []byte("v")} },
		"empty resource": func(l *brokeradmin.Launch) { l.Resources = map[string][]byte{"a/b/c": {}} },
		"bad floor":      registered(brokeradmin.AppraisalPolicy{Floors: []string{"19:snp"}}),
		"many floors":    registered(brokeradmin.AppraisalPolicy{Floors: slices.Repeat([]string{"19/11:snp=1"}, 17)}),
		"bad platform":   registered(brokeradmin.AppraisalPolicy{Platform: "golden"}),
		"bad product":    registered(brokeradmin.AppraisalPolicy{ExcludeProducts: []string{"naples"}}),
		"short ID key":   registered(brokeradmin.AppraisalPolicy{IDKeyDigests: []string{"00"}}),
		"bad author key": registered(brokeradmin.AppraisalPolicy{AuthorKeyDigests: []string{"x"}}),
		"many releases":  func(l *brokeradmin.Launch) { l.Releases = brokeradmin.MaxReleases + 1 },
	}
	for name, change := range bad {
		l := w.launch
		change(&l)
		if err := w.admin.PutLaunch(t.Context(), launchID, &l); code(err) != "broker.registration-malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := w.admin.PutLaunch(t.Context(), strings.Repeat("c", 32), &w.launch); code(err) != "broker.registration-malformed" {
		t.Errorf("path and manifest differ: %v", err)
	}
}

func TestTenantRotatesAndWithdrawsResources(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	r := contract.Resource{Repository: "job", Type: "age", Tag: "data"}
	if err := w.admin.PutResource(t.Context(), launchID, r, []byte("new")); err != nil {
		t.Fatal(err)
	}
	w.start()
	g := w.guest()
	g.attest(g.attestBody(g.auth()))
	if got, _, _ := g.resource(secretName, ""); got != "new" {
		t.Fatal(got)
	}
	if err := w.admin.DeleteResource(t.Context(), launchID, r); err != nil {
		t.Fatal(err)
	}
	if _, status, _ := g.resource(secretName, ""); status != http.StatusNotFound {
		t.Fatal(status)
	}
	if err := w.admin.DeleteResource(t.Context(), launchID, r); contract.AsRefusal(err).Code != "broker.resource-unknown" {
		t.Fatal(err)
	}
}

func TestRefusalsOfALaunchAreBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	for i := range keptRefusals + 5 {
		if err := w.server.launches.refuse(launchID, contract.Refuse("broker.test", "none", "number %d", i), w.clock.Now()); err != nil {
			t.Fatal(err)
		}
	}
	s, err := w.admin.Launch(t.Context(), launchID)
	if err != nil || len(s.Refusals) != keptRefusals || s.RefusalCount != keptRefusals+5 || s.Refusals[0].Refusal.Message != "number 5" {
		t.Fatalf("%d %d %v", len(s.Refusals), s.RefusalCount, err)
	}
}

func TestDamagedStateStopsTheBroker(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	if err := os.WriteFile(w.cfg.StateDir+"/launches/"+launchID+".json", []byte(`{"version":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(w.cfg); err == nil {
		t.Fatal("a broker that forgot its counts must not start")
	}
	if _, err := New(Config{StateDir: t.TempDir(), AdminToken: "short", Logger: hclog.NewNullLogger()}); err == nil {
		t.Fatal("a short admin token must be refused")
	}
}

func TestServeSpeaksTLS13Only(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	cert := w.web.TLS.Certificates[0]
	ctx, cancel := context.WithCancel(t.Context())
	lc := tls.Config{MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true} //nolint:gosec // the version is what is tested
	ln := newListener(t)
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, cert, w.server.Handler(), w.cfg.Logger) }()
	old := tls.Dialer{Config: &lc}
	if conn, err := old.DialContext(ctx, "tcp", ln.Addr().String()); err == nil {
		t.Error(conn.Close())
		t.Error("TLS 1.2 was accepted")
	}
	current := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // the version is what is tested
	conn, err := current.DialContext(ctx, "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the server does not stop")
	}
}

func TestFloorTakesTheHigherComponent(t *testing.T) {
	t.Parallel()
	got := floor(&contract.TCB{SNP: 3, Microcode: 1}, nil, &contract.TCB{SNP: 2, Microcode: 9, FMC: 1})
	if want := (contract.TCB{SNP: 3, Microcode: 9, FMC: 1}); got != want {
		t.Fatal(got)
	}
}

func FuzzParseAttest(f *testing.F) {
	f.Add([]byte(`{"runtime-data":{"nonce":"n","tee-pubkey":{"kty":"EC"}},"tee-evidence":{"primary_evidence":{},"additional_evidence":""}}`))
	f.Add([]byte(`{"init-data":null,"runtime-data":{},"tee-evidence":{}}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, refused := parseAttest(data)
		if (a == nil) == (refused == nil) {
			t.Fatalf("%v %v", a, refused)
		}
		if refused != nil && refused.Remedy == "" {
			t.Fatal("no remedy")
		}
	})
}

func FuzzParseAuth(f *testing.F) {
	f.Add([]byte(`{"version":"0.4.0","tee":"snp","extra-params":{}}`))
	f.Add([]byte(`{"version":"0.4.0"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if refused := parseAuth(data); refused != nil && refused.Remedy == "" {
			t.Fatal("no remedy")
		}
	})
}

func FuzzValidateLaunch(f *testing.F) {
	f.Add([]byte(`{"launch_digests":["00"],"manifest":"e30=","image":null}`))
	f.Add([]byte(`{"resources":{"a/b/c":"AA=="},"chip_ids":["` + hex.EncodeToString(make([]byte, 64)) + `"]}`))
	f.Add([]byte(`{"appraisal_policy":{"floors":["19/10-1f:snp=27,mitigations=7"],"forbid_smt":true,"platform":"ecc","id_key_digests":["00"],"min_guest_svn":1}}`))
	f.Fuzz(func(_ *testing.T, data []byte) {
		var l brokeradmin.Launch
		if contract.UnmarshalStrict(data, brokeradmin.MaxLaunchBytes, &l) == nil {
			validateLaunch(launchID, &l) //nolint:errcheck // it must not panic, that is all
		}
	})
}

// A token of this broker opens the launch and key it was signed for, and
// nothing else is one.
func FuzzOpenToken(f *testing.F) {
	now := testTime()
	s, err := New(Config{StateDir: f.TempDir(), AdminToken: adminToken, Issuer: "https://broker.example", Logger: hclog.NewNullLogger()})
	if err != nil {
		f.Fatal(err)
	}
	key, jwk := newKey(f)
	token, err := s.signToken(launchID, jwk, now)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("eyJhbGciOiJIUzI1NiJ9.e30.AAAA")
	f.Add(token[:len(token)-1])
	f.Fuzz(func(t *testing.T, token string) {
		g, refused := s.openToken(token, now)
		if (g == nil) == (refused == nil) {
			t.Fatalf("%v %v", g, refused)
		}
		if g != nil && (g.launchID != launchID || !g.key.Equal(&key.PublicKey)) {
			t.Fatalf("a token nobody signed opens %s", g.launchID)
		}
	})
}

func FuzzParseKey(f *testing.F) {
	_, jwk := newKey(f)
	f.Add([]byte(jwk))
	f.Add([]byte(`{"kty":"EC","crv":"P-256","alg":"ECDH-ES+A256KW","x":"AA","y":"AA","d":"AA"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := parseKey(data)
		if (key == nil) == (err == nil) {
			t.Fatal(key, err)
		}
		if err != nil {
			return
		}
		if _, err := sealTo(key, []byte(secret)); err != nil {
			t.Fatalf("an accepted key cannot be sealed to: %v", err)
		}
	})
}

func FuzzParseResourcePath(f *testing.F) {
	for _, path := range []string{secretName, "/" + secretName, "//a/b/c", "a/b", "a/b/c/d", "../b/c", "a/..%2f/c", "a/b/c?x", "a/\x00/c", "kbs:///a/b/c"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		r, refused := parseResourcePath(path)
		if refused != nil {
			if refused.Code != "broker.resource-malformed" || refused.Remedy == "" || r != (contract.Resource{}) {
				t.Fatalf("%+v with %+v", refused, r)
			}
			return
		}
		if r.Path() != strings.TrimPrefix(path, "/") {
			t.Fatalf("%q names %q", path, r.Path())
		}
		for _, part := range []string{r.Repository, r.Type, r.Tag} {
			if !filepath.IsLocal(part) || part == "." || strings.ContainsAny(part, "/%?#\\\x00") {
				t.Fatalf("%q has the part %q", path, part)
			}
		}
	})
}

func TestAPolicyThatChangedMeanwhileReleasesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	judged, refused := w.server.launches.get(launchID)
	if refused != nil {
		t.Fatal(refused)
	}
	r := contract.Resource{Repository: "job", Type: "age", Tag: "data"}
	if err := w.admin.PutResource(t.Context(), launchID, r, []byte("rotated")); err != nil {
		t.Fatal(err)
	}
	if err := w.server.launches.release(judged, brokeradmin.Release{}); err != nil {
		t.Fatalf("a rotated resource is no other policy: %v", err)
	}
	w.launch.Releases, w.launch.LaunchDigests = 9, []string{strings.Repeat("00", 48)}
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	if err := w.server.launches.release(judged, brokeradmin.Release{}); contract.AsRefusal(err).Code != "broker.policy-changed" {
		t.Fatalf("released under the old policy: %v", err)
	}
}
