package tenant

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

func TestWhatTheTenantDemandsIsDemandedFromLaunchAndEvidence(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		demand brokeradmin.AppraisalPolicy
		swap   func(*api.LaunchGuest)
		later  VerifyOptions
		fails  string // "": the evidence holds
	}{
		"SMT forbidden, and off":    {demand: brokeradmin.AppraisalPolicy{ForbidSMT: true}},
		"SMT forbidden, and on":     {demand: brokeradmin.AppraisalPolicy{ForbidSMT: true}, swap: func(l *api.LaunchGuest) { l.Machine.Policy |= uint64(snp.PolicySMT) }, fails: "smt"},
		"SMT forbidden afterwards":  {later: VerifyOptions{Appraisal: brokeradmin.AppraisalPolicy{ForbidSMT: true}}, fails: "smt"},
		"no revocation list":        {demand: brokeradmin.AppraisalPolicy{RequireCRL: true}, fails: "revocation"},
		"a processor's floor":       {demand: brokeradmin.AppraisalPolicy{Floors: []string{"19/10-1f:snp=27"}}},
		"below a processor's floor": {demand: brokeradmin.AppraisalPolicy{Floors: []string{"19/10-1f:snp=28"}}, fails: "tcb-floor"},
		"a fact it does not state":  {demand: brokeradmin.AppraisalPolicy{Platform: "ecc"}, fails: "platform-info"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.node.swap = c.swap
			image, _ := w.push(0)
			o := w.options(image)
			o.Appraisal = c.demand
			if _, err := w.tenant.Deploy(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			w.reopen() // what is demanded is on disk
			v, err := w.tenant.Attest(t.Context(), "job", c.later)
			if err != nil || v.OK() != (c.fails == "") || c.fails != "" && !failed(v, c.fails) {
				t.Errorf("%v: %+v", err, v.Failed())
			}
		})
	}
}

// publisher signs an ID block for a launch and writes it as nodeagent measure
// prints it.
func (w *world) publisher(digest string, policy uint64) (IDBlockFiles, *idblock.Signed) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	raw, err := hex.DecodeString(digest)
	if err != nil {
		w.t.Fatal(err)
	}
	signed, err := idblock.Sign(idblock.Block{LaunchDigest: [idblock.DigestSize]byte(raw), GuestSVN: 2, Policy: policy}, key, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	encode := base64.StdEncoding.EncodeToString
	return IDBlockFiles{Block: w.file("block-"+digest[:8], encode(signed.RawBlock)+"\n"), Auth: w.file("auth-"+digest[:8], encode(signed.RawAuth))}, signed
}

// predict is the launch digest of a deployment that says nothing of its machine.
func (w *world) predict() string {
	w.t.Helper()
	guest, err := loadImage(w.profile.ImageDir)
	if err != nil {
		w.t.Fatal(err)
	}
	digest, err := guest.predict(defaultVCPUs, defaultCPUModel, guestFeatures)
	if err != nil {
		w.t.Fatal(err)
	}
	return digest
}

func TestAnIDBlockGoesWithTheLaunchAndItsKeyIsDemanded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	digest := w.predict()
	o := w.options(image)
	files, signed := w.publisher(digest, guestPolicy)
	o.IDBlock = files
	o.Appraisal = brokeradmin.AppraisalPolicy{IDKeyDigests: []string{hex.EncodeToString(signed.IDKeyDigest[:])}, MinGuestSVN: 2}
	if _, err := w.tenant.Deploy(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{}); err != nil || !v.OK() {
		t.Fatalf("%v %+v", err, v)
	}
	w.guest().IDBlock = nil // a host that leaves it out
	if v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{}); err != nil || !failed(v, "id-key") || !failed(v, "guest-svn") {
		t.Errorf("without the ID block: %v", err)
	}
}

func TestDemandsThatNoLaunchCouldMeetAreRefusedEarly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	otherDigest, _ := w.publisher(strings.Repeat("0d", 48), guestPolicy)
	digest := w.predict()
	fitting, _ := w.publisher(digest, guestPolicy) // guest SVN 2, no author key
	key := strings.Repeat("0d", 48)
	for name, c := range map[string]struct {
		code   string
		change func(*DeployOptions)
	}{
		"a floor that is none":   {codeUsage, func(o *DeployOptions) { o.Appraisal.Floors = []string{"x"} }},
		"a key without ID block": {codeUsage, func(o *DeployOptions) { o.Appraisal.IDKeyDigests = []string{key} }},
		"SVN without ID block":   {codeUsage, func(o *DeployOptions) { o.Appraisal.MinGuestSVN = 1 }},
		"half a pair":            {codeUsage, func(o *DeployOptions) { o.IDBlock.Block = otherDigest.Block }},
		"another launch's":       {"tenant.id-block-mismatch", func(o *DeployOptions) { o.IDBlock = otherDigest }},
		"a key not demanded":     {"tenant.id-block-mismatch", func(o *DeployOptions) { o.IDBlock, o.Appraisal.IDKeyDigests = fitting, []string{key} }},
		"no author key":          {"tenant.id-block-mismatch", func(o *DeployOptions) { o.IDBlock, o.Appraisal.AuthorKeyDigests = fitting, []string{key} }},
		"an old guest SVN":       {"tenant.id-block-mismatch", func(o *DeployOptions) { o.IDBlock, o.Appraisal.MinGuestSVN = fitting, 3 }},
		"no pair":                {"tenant.id-block-malformed", func(o *DeployOptions) { o.IDBlock = IDBlockFiles{otherDigest.Auth, otherDigest.Block} }},
		"not base64":             {codeUsage, func(o *DeployOptions) { o.IDBlock = IDBlockFiles{w.file("no", "!"), otherDigest.Auth} }},
	} {
		o := w.options(image)
		c.change(&o)
		if _, err := w.tenant.Deploy(t.Context(), o); code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
		if _, err := os.Stat(w.tenant.state.path("job")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: left a deployment behind", name)
		}
	}
	if w.launches() != 0 {
		t.Error("something was started")
	}
}

// An image without a defence against the host's ACPI code is refused by the
// tenant's own verification too, unless the profile or a flag says otherwise.
func TestAnImageWithoutAMLDefenceIsRefusedUnlessAllowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	w.profile.Verify.AllowDevelopmentImage = false
	w.reopen()
	v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{})
	if err != nil || v.OK() || !failed(v, "aml-defence") {
		t.Fatalf("%v %+v", err, v)
	}
	if _, err := w.tenant.Wait(t.Context(), "job"); code(err) != codeUnverified {
		t.Errorf("wait: %v", err)
	}
	if v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{AllowDevelopmentImage: true}); err != nil || !v.OK() {
		t.Errorf("allowed by flag: %v", err)
	}
}
