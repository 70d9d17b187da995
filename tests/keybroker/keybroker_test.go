package keybroker

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

func TestGuestGetsItsSecretAndNobodySeesItOnTheWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	g := w.guest()
	token, status, refused := g.attest(g.attestBody(g.auth()))
	if status != http.StatusOK {
		t.Fatalf("refused: %d %+v", status, refused)
	}
	if got, _, _ := g.resource(secretName, ""); got != secret {
		t.Fatalf("by cookie: %q", got)
	}
	stranger := w.guest() // no cookie, but the token; the answer opens with g's key only
	stranger.key = g.key
	if got, _, _ := stranger.resource(secretName, token); got != secret {
		t.Fatalf("by token: %q", got)
	}
	_, raw := g.do(http.MethodGet, "/kbs/v0/resource/"+secretName, "", nil)
	var flat map[string]string
	if err := json.Unmarshal(raw, &flat); err != nil || flat["protected"] == "" || flat["encrypted_key"] == "" || flat["iv"] == "" || flat["ciphertext"] == "" || flat["tag"] == "" {
		t.Fatalf("not a flattened JWE: %s", raw)
	}
	s, err := w.admin.Launch(t.Context(), launchID)
	if err != nil || len(s.Releases) != 1 || s.MaxReleases != 1 || len(s.Refusals) != 0 || !s.Releases[0].Emulated {
		t.Fatalf("status %+v %v", s, err)
	}
	if log := w.log.String(); strings.Contains(log, secret) || strings.Contains(log, adminToken) || strings.Contains(log, token) {
		t.Fatal("the log holds a secret")
	}
}

func TestSecondReleaseIsRefusedAlsoAfterARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	g := w.guest()
	token, status, _ := g.attest(g.attestBody(g.auth()))
	if status != http.StatusOK {
		t.Fatal(status)
	}
	again := func() {
		t.Helper()
		g := w.guest()
		_, status, refused := g.attest(g.attestBody(g.auth()))
		if status != http.StatusForbidden || refused.Code != "broker.release-exhausted" || refused.Remedy == "" || refused.Type == "" || refused.Detail == "" {
			t.Fatalf("%d %+v", status, refused)
		}
	}
	again()
	w.start()
	again()
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	again()
	other := w.guest()
	other.key = g.key
	if got, _, _ := other.resource(secretName, token); got != secret {
		t.Fatal("the first guest's token did not survive the restart")
	}
	s, err := w.admin.Launch(t.Context(), launchID)
	if err != nil || len(s.Releases) != 1 || s.RefusalCount != 3 || s.Refusals[0].Refusal.Code != "broker.release-exhausted" {
		t.Fatalf("%+v %v", s, err)
	}
	w.launch.Releases = 2
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	g = w.guest()
	if _, status, refused := g.attest(g.attestBody(g.auth())); status != http.StatusOK {
		t.Fatalf("an allowed retry was refused: %+v", refused)
	}
}

func TestNoReleaseWhenTheCountCannotBeWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	if err := os.RemoveAll(w.cfg.StateDir + "/launches"); err != nil {
		t.Fatal(err)
	}
	g := w.guest()
	if _, status, refused := g.attest(g.attestBody(g.auth())); status != http.StatusInternalServerError || refused.Code != "internal" {
		t.Fatalf("%d %+v", status, refused)
	}
	if _, status, _ := g.resource(secretName, ""); status != http.StatusUnauthorized {
		t.Fatal(status)
	}
}

func TestConcurrentBootsOfOneLaunchGetOneRelease(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	const boots = 6
	bodies := make([]*guest, boots)
	requests := make([][]byte, boots)
	for i := range bodies {
		bodies[i] = w.guest()
		raw, err := json.Marshal(bodies[i].attestBody(bodies[i].auth()))
		if err != nil {
			t.Fatal(err)
		}
		requests[i] = raw
	}
	var wg sync.WaitGroup
	got := make([]int, boots)
	for i, g := range bodies {
		wg.Go(func() { _, got[i], _ = g.attest(requests[i]) })
	}
	wg.Wait()
	released := 0
	for _, status := range got {
		if status == http.StatusOK {
			released++
		}
	}
	if released != 1 {
		t.Fatalf("%d releases: %v", released, got)
	}
}

func TestNonceWorksOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	w.launch.Releases = 5
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	g := w.guest()
	body := g.attestBody(g.auth())
	if _, status, refused := g.attest(body); status != http.StatusOK {
		t.Fatalf("%+v", refused)
	}
	if _, status, refused := g.attest(body); status != http.StatusUnauthorized || refused.Code != "broker.nonce-used" {
		t.Fatalf("same session: %d %+v", status, refused)
	}
	replay := w.guest()
	replay.auth()
	if _, status, refused := replay.attest(body); status != http.StatusUnauthorized || refused.Code != "broker.nonce-mismatch" {
		t.Fatalf("other session: %d %+v", status, refused)
	}
	bare := w.guest()
	if _, status, refused := bare.attest(body); status != http.StatusUnauthorized || refused.Code != "broker.session-unknown" {
		t.Fatalf("no session: %d %+v", status, refused)
	}
	failed := w.guest()
	nonce := failed.auth()
	failed.attest([]byte("{}"))
	if _, _, refused := failed.attest(failed.attestBody(nonce)); refused.Code != "broker.nonce-used" {
		t.Fatalf("a failed attempt must spend the nonce: %+v", refused)
	}
}

func TestSessionsAndTokensExpire(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	g := w.guest()
	nonce := g.auth()
	w.clock.advance(11 * time.Minute)
	if _, _, refused := g.attest(g.attestBody(nonce)); refused.Code != "broker.session-expired" {
		t.Fatalf("%+v", refused)
	}
	g = w.guest()
	token, _, _ := g.attest(g.attestBody(g.auth()))
	w.clock.advance(11 * time.Minute)
	if _, status, refused := g.resource(secretName, ""); status != http.StatusUnauthorized || refused.Code != "broker.session-expired" {
		t.Fatalf("%+v", refused)
	}
	if _, status, refused := g.resource(secretName, token); status != http.StatusUnauthorized || refused.Code != "broker.token-expired" {
		t.Fatalf("%+v", refused)
	}
}

func TestEveryWrongEvidenceIsRefusedWithItsReason(t *testing.T) {
	t.Parallel()
	_, otherKey := newKey(t)
	otherManifest := contract.Manifest{}
	tests := []struct {
		name string
		code string
		cfg  func(*Config)
		reg  func(*world)
		lie  func(*guest)
	}{
		{name: "another kernel", code: "broker.launch-digest", lie: func(g *guest) { g.report.Measurement[0] ^= 1 }},
		{name: "key not bound by the report", code: "broker.report-data", lie: func(g *guest) { g.bound = otherKey }},
		{name: "report over another nonce", code: "broker.report-data", lie: func(g *guest) { g.boundNonce = g.w.guest().auth() }},
		{name: "report changed after it was signed", code: "broker.signature", lie: func(g *guest) {
			g.tamper = func(signed []byte) { signed[bytes.Index(signed, g.report.ReportIDMA[:])-1] ^= 1 } // the end of REPORT_ID
		}},
		{name: "signature changed", code: "broker.signature", lie: func(g *guest) {
			g.tamper = func(signed []byte) { signed[len(signed)-512] ^= 1 } // R's first byte
		}},
		{name: "report of another manifest", code: "broker.host-data", lie: func(g *guest) { g.report.HostData[3] ^= 1 }},
		{name: "debug policy", code: "broker.policy-debug", lie: func(g *guest) { g.report.Policy |= snp.PolicyDebug }},
		{name: "migration policy", code: "broker.policy-migration", lie: func(g *guest) { g.report.Policy |= snp.PolicyMigrationAgent }},
		{name: "report from user code", code: "broker.vmpl", lie: func(g *guest) { g.report.VMPL = 1 }},
		{name: "provisional firmware", code: "broker.committed-is-current", lie: func(g *guest) { g.report.CommittedTCB -= 1 << 56 }},
		{name: "below the registered floor", code: "broker.tcb-floor", reg: func(w *world) { w.launch.TCBFloor = &contract.TCB{Microcode: 87} }},
		{name: "chip not on the list", code: "broker.chip-allowed", reg: func(w *world) { w.launch.ChipIDs = []string{strings.Repeat("09", 64)} }},
		{name: "SMT forbidden", code: "broker.smt", reg: demand(brokeradmin.AppraisalPolicy{ForbidSMT: true})},
		{name: "no revocation list", code: "broker.revocation", reg: demand(brokeradmin.AppraisalPolicy{RequireCRL: true})},
		{name: "below this processor's floor", code: "broker.tcb-floor", reg: demand(brokeradmin.AppraisalPolicy{Floors: []string{"19/10-1f:microcode=87"}})},
		{name: "no ID block", code: "broker.id-key", reg: demand(brokeradmin.AppraisalPolicy{IDKeyDigests: []string{strings.Repeat("0d", 48)}})},
		{name: "no author key", code: "broker.author-key", reg: demand(brokeradmin.AppraisalPolicy{AuthorKeyDigests: []string{strings.Repeat("0d", 48)}})},
		{name: "an old image", code: "broker.guest-svn", reg: demand(brokeradmin.AppraisalPolicy{MinGuestSVN: 1})},
		{name: "a platform without ECC", code: "broker.platform-info", reg: demand(brokeradmin.AppraisalPolicy{Platform: "ecc"})},
		{name: "an excluded line", code: "broker.product", reg: demand(brokeradmin.AppraisalPolicy{ExcludeProducts: []string{"genoa"}})},
		{name: "no endorsements", code: "broker.root", lie: func(g *guest) { g.endorse = contract.Endorsements{} }},
		{name: "emulated root not allowed", code: "broker.root", cfg: func(c *Config) { c.EmulatedRoots = nil }},
		{name: "Milan", code: "broker.product", lie: func(g *guest) { g.report.Model = 1 }},
		{name: "additional evidence", code: "broker.additional-evidence-unsupported", lie: func(g *guest) { g.extra = "{}" }},
		{name: "no AML defence", code: "broker.image-aml-defence", reg: func(w *world) { w.launch.Image.AMLDefence = false }},
		{name: "debug variant", code: "broker.image-debug", reg: func(w *world) { w.launch.Image.Variant = contract.VariantDebug }},
		{name: "another manifest of the same launch", code: "broker.manifest-mismatch", lie: func(g *guest) {
			otherManifest = *g.w.manifest
			otherManifest.Ports = []int{80}
			g.manifest = encode(g.w.t, &otherManifest)
			g.report.HostData = contract.HostData(g.manifest)
		}},
		{name: "unregistered launch", code: "broker.launch-unknown", lie: func(g *guest) {
			m := *g.w.manifest
			m.LaunchID = strings.Repeat("0", 32)
			g.manifest = encode(g.w.t, &m)
		}},
		{name: "manifest that is none", code: "broker.manifest-malformed", lie: func(g *guest) { g.manifest = []byte("{}") }},
		{name: "RSA key", code: "broker.key-unsupported", lie: func(g *guest) { g.jwk = json.RawMessage(`{"kty":"RSA"}`) }},
		{name: "point off the curve", code: "broker.key-unsupported", lie: func(g *guest) {
			zero := base64.RawURLEncoding.EncodeToString(make([]byte, 32))
			g.jwk = json.RawMessage(`{"kty":"EC","crv":"P-256","alg":"ECDH-ES+A256KW","x":"` + zero + `","y":"` + zero + `"}`)
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, test.cfg)
			if test.reg != nil {
				test.reg(w)
				if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
					t.Fatal(err)
				}
			}
			g := w.guest()
			if test.lie != nil {
				test.lie(g)
			}
			token, status, refused := g.attest(g.attestBody(g.auth()))
			if status != http.StatusUnauthorized || refused.Code != test.code || refused.Remedy == "" || token != "" {
				t.Fatalf("got %d %+v, want %s", status, refused, test.code)
			}
			if _, status, refused := g.resource(secretName, ""); status != http.StatusUnauthorized || refused.Code != "broker.not-attested" {
				t.Fatalf("after the refusal: %d %+v", status, refused)
			}
			s, err := w.admin.Launch(t.Context(), launchID)
			if err != nil || len(s.Releases) != 0 {
				t.Fatalf("%+v %v", s, err)
			}
			if known := test.code != "broker.launch-unknown" && test.code != "broker.key-unsupported" && test.code != "broker.manifest-malformed"; known &&
				(len(s.Refusals) != 1 || s.Refusals[0].Refusal.Code != test.code) {
				t.Fatalf("the tenant does not see why: %+v", s.Refusals)
			}
		})
	}
}

// demand registers the launch with more than the floor.
func demand(a brokeradmin.AppraisalPolicy) func(*world) {
	return func(w *world) { w.launch.AppraisalPolicy = &a }
}

func TestAGuestThatMeetsEveryDemandGetsItsKeysAlsoAfterARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	demand(brokeradmin.AppraisalPolicy{
		ForbidSMT: true, Floors: []string{"19/10-1f:snp=27,microcode=86", "1a/0-11:snp=4"}, IDKeyDigests: []string{strings.Repeat("0e", 48), strings.Repeat("0d", 48)},
		MinGuestSVN: 3, Platform: "ecc", ExcludeProducts: []string{"turin"},
	})(w)
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	w.web.Close()
	w.start()
	g := w.guest()
	g.report.Policy &^= snp.PolicySMT
	g.report.GuestSVN, g.report.PlatformInfo = 3, snp.PlatformECC
	copy(g.report.IDKeyDigest[:], bytes.Repeat([]byte{0x0d}, 48))
	if token, status, refused := g.attest(g.attestBody(g.auth())); status != http.StatusOK || token == "" {
		t.Errorf("got %d %+v", status, refused)
	}
}

func TestAnExcludedProcessorLineGetsKeysOnlyWhenAllowed(t *testing.T) {
	t.Parallel()
	milan, err := snp.ParseProducts([]string{"milan"})
	if err != nil {
		t.Fatal(err)
	}
	g := newWorld(t, func(c *Config) { c.AllowProducts = milan }).guest()
	g.report.Model = 1
	if token, status, refused := g.attest(g.attestBody(g.auth())); status != http.StatusOK || token == "" {
		t.Errorf("got %d %+v", status, refused)
	}
}

func TestDevelopmentImageOnlyWhenTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.AllowDevelopmentImage = true })
	w.launch.Image.AMLDefence = false
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	g := w.guest()
	if _, status, refused := g.attest(g.attestBody(g.auth())); status != http.StatusOK {
		t.Fatalf("%+v", refused)
	}
}

func TestResourcesOfOtherLaunchesAreOutOfReach(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	other := *w.manifest
	other.LaunchID = strings.Repeat("b", 32)
	l := w.launch
	l.Manifest = encode(t, &other)
	l.Resources = map[string][]byte{"theirs/age/data": []byte("theirs")}
	if err := w.admin.PutLaunch(t.Context(), other.LaunchID, &l); err != nil {
		t.Fatal(err)
	}
	g := w.guest()
	token, _, _ := g.attest(g.attestBody(g.auth()))
	for _, bearer := range []string{"", token} {
		if _, status, refused := g.resource("theirs/age/data", bearer); status != http.StatusNotFound || refused.Code != "broker.resource-unknown" {
			t.Fatalf("%d %+v", status, refused)
		}
	}
	if _, status, refused := g.resource("..%2fx/age/data", token); status != http.StatusBadRequest || refused.Code != "broker.resource-malformed" {
		t.Fatalf("%d %+v", status, refused)
	}
	if err := w.admin.DeleteLaunch(t.Context(), launchID); err != nil {
		t.Fatal(err)
	}
	if _, status, refused := g.resource(secretName, token); status != http.StatusUnauthorized || refused.Code != "broker.launch-unknown" {
		t.Fatalf("after deletion: %d %+v", status, refused)
	}
}

func TestForgedTokensAreRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	g := w.guest()
	token, _, _ := g.attest(g.attestBody(g.auth()))
	other := newWorld(t, nil)
	og := other.guest()
	foreign, _, _ := og.attest(og.attestBody(og.auth()))
	parts := strings.Split(token, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + "."
	for name, forged := range map[string]string{
		"garbage": "x", "another broker's": foreign, "alg none": none, "cut signature": parts[0] + "." + parts[1] + ".AAAA", "huge": strings.Repeat("a", 9<<10),
	} {
		if _, status, refused := g.resource(secretName, forged); status != http.StatusUnauthorized || refused.Code != "broker.token-invalid" {
			t.Errorf("%s: %d %+v", name, status, refused)
		}
	}
}
