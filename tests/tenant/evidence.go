package tenant

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/verify"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// pollInterval is how often the control plane is asked again.
const pollInterval = 500 * time.Millisecond

// challengeEvery is after how many polls a challenge is repeated: 5 s.
const challengeEvery = 10

// Verdict is the outcome of a verification.
type Verdict struct {
	snp.Result
	// Evidence is the bundle; believe it only when OK.
	Evidence *contract.Evidence
	// Raw is the bundle's bytes.
	Raw []byte
}

// refusal turns failed checks into an error.
func (v *Verdict) refusal() error {
	if v.OK() {
		return nil
	}
	why := "no check was made"
	if f := v.Failed(); f != nil {
		why = f.Name + ": " + f.Why
	}
	return contract.Refuse(codeUnverified, "do not trust this guest, its port or its results; see the failed checks", "the evidence does not hold: %s", why)
}

// VerifyOptions say what to expect. Empty fields take the deployment's value.
type VerifyOptions struct {
	// ExpectedImage is REF@sha256:…, or a tag this tool resolved at deploy.
	ExpectedImage string
	// ExpectedGPU is MODEL[:COUNT]; empty means what the deployment asked for.
	ExpectedGPU string
	// ExpectedPDIs are GPUs to accept, empty takes the deployment's; RIMDir has
	// NVIDIA's reference manifests, empty takes the profile's.
	ExpectedPDIs []string
	RIMDir       string
	// AllowUnmeasuredGPUs accepts GPUs without manifests to compare with.
	AllowUnmeasuredGPUs bool
	// Digests are acceptable launch digests, hex.
	Digests []string
	// Nonce in hex; empty accepts a challenge this tool made.
	Nonce string
	// MinTCB is the floor; nil takes the deployment's.
	MinTCB *contract.TCB
	// ImageDescription is a trusted image.json file.
	ImageDescription string
	// AllowEmulatedRoots, AllowDevelopmentImage and AllowProducts (names of
	// processor lines that are excluded by default) add to the profile's.
	AllowEmulatedRoots    []string
	AllowDevelopmentImage bool
	AllowProducts         []string
	// ServerName is the name that a connection to the guest asks for; "" asks
	// for none. It only finds the guest, and proves nothing.
	ServerName string
	// Appraisal adds to what the deployment demands.
	Appraisal brokeradmin.AppraisalPolicy
	spki      []byte
}

// Attest challenges the guest through the control plane and verifies the
// answer. Evidence that holds is kept.
func (t *Tenant) Attest(ctx context.Context, name string, o VerifyOptions) (*Verdict, error) {
	if err := t.needControl(); err != nil {
		return nil, err
	}
	d, err := t.launched(name)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, 32)
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("making nonce: %w", err)
	}
	if err := t.state.issued(d, hex.EncodeToString(nonce)); err != nil {
		return nil, err
	}
	t.report.Step("challenging the guest")
	raw, err := t.awaitEvidence(ctx, d.GuestID, nonce)
	if err != nil {
		return nil, err
	}
	o.Nonce = hex.EncodeToString(nonce)
	return t.judgeOwn(d, raw, o)
}

// awaitEvidence challenges the guest, again from time to time: a guest that is
// still booting may have missed, or its node may have refused, the first.
func (t *Tenant) awaitEvidence(ctx context.Context, guestID string, nonce []byte) ([]byte, error) {
	for poll := 0; ; poll++ {
		if poll%challengeEvery == 0 {
			if err := t.control.RequestEvidence(ctx, guestID, nonce); err != nil {
				return nil, fmt.Errorf("requesting evidence: %w", err)
			}
		}
		raw, err := t.control.Evidence(ctx, guestID, nonce)
		if err != nil {
			return nil, fmt.Errorf("fetching evidence: %w", err)
		}
		if len(raw) > 0 {
			return raw, nil
		}
		g, err := t.control.Guest(ctx, guestID)
		if err != nil {
			return nil, fmt.Errorf("asking for the guest: %w", err)
		}
		if g.ended() {
			return nil, contract.Refuse(codeGuestEnded, "attest while the guest runs; tenant wait and deploy --wait do so by themselves",
				"guest %s has ended and answers no challenge", guestID)
		}
		if err := wait(ctx); err != nil {
			return nil, fmt.Errorf("waiting for evidence: %w", err)
		}
	}
}

func (t *Tenant) launched(name string) (*Deployment, error) {
	d, err := t.state.load(name)
	if err != nil {
		return nil, err
	}
	if d.GuestID == "" {
		return nil, contract.Refuse("tenant.not-launched", "deploy again with --replace", "deployment %q was not launched", name)
	}
	return d, nil
}

// judgeOwn verifies evidence of a deployment and keeps it when it holds.
func (t *Tenant) judgeOwn(d *Deployment, raw []byte, o VerifyOptions) (*Verdict, error) {
	v, err := t.judge(raw, d, o)
	if err != nil || !v.OK() {
		return v, err
	}
	return v, t.state.write(d.Name, "evidence.json", raw)
}

// Verify checks an evidence file's bytes. When a deployment of this tool has
// the same manifest, its values are the expectations.
func (t *Tenant) Verify(raw []byte, o VerifyOptions) (*Verdict, error) {
	d, err := t.ownerOf(raw)
	if err != nil {
		return nil, err
	}
	return t.judge(raw, d, o)
}

// VerifyDeployment checks the latest evidence that was kept for a deployment.
func (t *Tenant) VerifyDeployment(name string, o VerifyOptions) (*Verdict, error) {
	d, err := t.state.load(name)
	if err != nil {
		return nil, err
	}
	raw, err := t.state.read(name, "evidence.json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, contract.Refuse("tenant.evidence-missing", "run tenant confidential attest "+name+" while the guest runs",
			"there is no verified evidence of %q yet", name)
	}
	if err != nil {
		return nil, fmt.Errorf("reading evidence: %w", err)
	}
	return t.judge(raw, d, o)
}

// Known reports whether a deployment of that name exists here.
func (t *Tenant) Known(name string) bool {
	_, err := t.state.load(name)
	return err == nil
}

// ownerOf finds the deployment whose manifest the bundle carries, nil when
// there is none.
func (t *Tenant) ownerOf(raw []byte) (*Deployment, error) {
	e, err := contract.ParseEvidence(raw)
	if err != nil {
		return nil, nil //nolint:nilnil,nilerr // no owner; the verification itself says what is wrong
	}
	names, err := t.state.list()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if own, err := t.state.read(name, "manifest.json"); err == nil && bytes.Equal(own, e.Manifest) {
			return t.state.load(name)
		}
	}
	return nil, nil //nolint:nilnil // nobody's is an answer
}

// judge verifies a bundle against the deployment (if any) and the options.
func (t *Tenant) judge(raw []byte, d *Deployment, o VerifyOptions) (*Verdict, error) {
	x, err := t.expectations(raw, d, o)
	if err != nil {
		return nil, err
	}
	demand, err := expectedGPUs(d, o.ExpectedGPU)
	if err != nil {
		return nil, err
	}
	if demand != nil {
		if x.GPUs, err = t.gpuJudge(demand, d, o, x.EmulatedRoots); err != nil {
			return nil, err
		}
	}
	v := &Verdict{Result: verify.Bundle(raw, x), Raw: raw}
	if v.Evidence, err = contract.ParseEvidence(raw); err != nil {
		return v, nil //nolint:nilerr // a failed check says so
	}
	if d != nil {
		own, err := t.state.read(d.Name, "manifest.json")
		if err != nil {
			return nil, fmt.Errorf("reading manifest: %w", err)
		}
		v.Add("own-manifest", bytes.Equal(own, v.Evidence.Manifest), d.LaunchID, "", "the manifest is the one written for "+d.Name,
			"the guest was started with another manifest than the one written for "+d.Name)
	}
	checkDemand(v, demand)
	return v, nil
}

func (t *Tenant) expectations(raw []byte, d *Deployment, o VerifyOptions) (verify.Expectations, error) {
	x := verify.Expectations{
		SPKI: o.spki, AllowDevelopmentImage: o.AllowDevelopmentImage || t.profile.Verify.AllowDevelopmentImage,
		AppraisalPolicy: snp.AppraisalPolicy{EmulatedRoots: slices.Clone(t.roots), Now: t.now()},
	}
	var err error
	if x.AllowProducts, err = snp.ParseProducts(slices.Concat(t.profile.Verify.AllowProducts, o.AllowProducts)); err != nil {
		return x, Usage("--allow-product or allow_products: %v", err)
	}
	more, err := readRoots(o.AllowEmulatedRoots)
	if err != nil {
		return x, err
	}
	x.EmulatedRoots = append(x.EmulatedRoots, more...)
	digests := o.Digests
	if d != nil {
		x.Image, x.TrustedImage = d.Image, d.GuestImage
		if len(digests) == 0 {
			digests = d.LaunchDigests
		}
		if d.TCBFloor != nil {
			x.MinTCB = *d.TCBFloor
		}
		if err := d.Appraisal.Demand(&x.AppraisalPolicy); err != nil {
			return x, fmt.Errorf("reading deployment %s: appraisal policy: %w", d.Name, err)
		}
	}
	if err := o.Appraisal.Demand(&x.AppraisalPolicy); err != nil {
		return x, Usage("appraisal policy: %v", err)
	}
	if o.MinTCB != nil {
		x.MinTCB = *o.MinTCB
	}
	if o.ExpectedImage != "" {
		if x.Image, err = t.pinnedImage(o.ExpectedImage); err != nil {
			return x, err
		}
	}
	if x.Nonce, err = t.ownNonce(raw, d, o.Nonce); err != nil {
		return x, err
	}
	if err := t.trustedImage(&x, o.ImageDescription); err != nil {
		return x, err
	}
	if len(digests) == 0 {
		digests = t.predictFor(raw)
	}
	for _, text := range digests {
		digest, err := hex.DecodeString(text)
		if err != nil || len(digest) != 48 {
			return x, Usage("launch digest %.100q is not 96 hex digits", text)
		}
		x.Measurements = append(x.Measurements, digest)
	}
	return x, nil
}

// trustedImage loads a description given by hand, or else the profile's.
func (t *Tenant) trustedImage(x *verify.Expectations, file string) error {
	if file == "" && (x.TrustedImage != nil || t.profile.ImageDir == "") {
		return nil
	}
	if file == "" {
		image, err := loadImage(t.profile.ImageDir)
		if err != nil {
			return err
		}
		x.TrustedImage = image.desc
		return nil
	}
	data, err := readSmall(file)
	if err != nil {
		return fmt.Errorf("reading image description: %w", err)
	}
	x.TrustedImage, err = contract.ParseImageDescription(data)
	return err
}

// pinnedImage turns an expected image into one with digest. A tag means what
// it meant when this tool deployed it: a registry's answer of today is no
// ground for trust. The same goes for the digest of an image of several
// platforms, of which deploy took one.
func (t *Tenant) pinnedImage(ref string) (string, error) {
	names, err := t.state.list()
	if err != nil {
		return "", err
	}
	pinned := ""
	for _, name := range names {
		d, err := t.state.load(name)
		if err != nil || d.RequestedImage != ref {
			continue
		}
		if pinned != "" && pinned != d.Image {
			return "", contract.Refuse("tenant.image-unpinned", "give the image as REF@sha256:DIGEST", "%q meant several digests in your deployments", ref)
		}
		pinned = d.Image
	}
	if _, _, _, err := contract.SplitImage(ref); pinned == "" && err == nil {
		return ref, nil
	}
	if pinned == "" {
		return "", contract.Refuse("tenant.image-unpinned", "give the image as REF@sha256:DIGEST", "%q is a tag that no deployment of yours resolved", ref)
	}
	return pinned, nil
}

// ownNonce is the nonce to expect: the one given, or the bundle's if this
// tool made that challenge. Anything else proves no freshness and fails.
func (t *Tenant) ownNonce(raw []byte, d *Deployment, given string) ([]byte, error) {
	if given != "" {
		nonce, err := hex.DecodeString(given)
		if err != nil {
			return nil, Usage("--nonce is not hex")
		}
		return nonce, nil
	}
	e, err := contract.ParseEvidence(raw)
	if err != nil || d == nil || !slices.Contains(d.Nonces, hex.EncodeToString(e.Nonce)) {
		return nil, nil //nolint:nilerr // the check "nonce" fails
	}
	return e.Nonce, nil
}

// predictFor computes the digest of the profile's own image for the shape the
// bundle claims. A false claim gives a digest that the report does not have.
func (t *Tenant) predictFor(raw []byte) []string {
	e, err := contract.ParseEvidence(raw)
	if err != nil || t.profile.ImageDir == "" {
		return nil
	}
	image, err := loadImage(t.profile.ImageDir)
	if err != nil {
		return nil
	}
	digest, err := image.predict(e.Boot.VCPUs, e.Boot.CPUModel, e.Boot.GuestFeatures)
	if err != nil {
		return nil
	}
	return []string{digest}
}

// checkDocument is a check for programs.
type checkDocument struct {
	snp.Check
	ProtectsFrom string `json:"protects_from,omitempty"`
}

// JSON encodes the checks, for programs; with explain also what each protects
// from.
func (v *Verdict) JSON(explain bool) ([]byte, error) {
	var checks []checkDocument
	for _, c := range v.Checks {
		doc := checkDocument{Check: c}
		if explain {
			doc.ProtectsFrom = verify.Explain(c.Name)
		}
		checks = append(checks, doc)
	}
	return json.Marshal(struct {
		APIVersion string                 `json:"apiVersion"`
		Kind       string                 `json:"kind"`
		OK         bool                   `json:"ok"`
		Signer     *snp.Signer            `json:"signer,omitempty"`
		GPUs       []contract.AttestedGPU `json:"gpus,omitempty"`
		Checks     []checkDocument        `json:"checks"`
		Warnings   []snp.Warning          `json:"warnings,omitempty"`
	}{"tenant/v1", "Verdict", v.OK(), v.Signer, v.GPUs, checks, v.Warnings})
}
