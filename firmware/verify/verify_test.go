package verify_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/firmware/verify"
)

const image = "registry.example/app@sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"

// evidence makes a bundle as a guest would, and what its verifier expects.
func evidence(tb testing.TB) (*contract.Evidence, verify.Expectations) {
	tb.Helper()
	now := time.Now()
	m := contract.Manifest{
		Version: 1, LaunchID: strings.Repeat("0a", 16), Image: image,
		Broker:   contract.Endpoint{URL: "https://broker.example", CAPEM: "pem"},
		Registry: contract.Endpoint{URL: "https://registry.example", CAPEM: "pem"},
	}
	manifest, err := m.Encode()
	if err != nil {
		tb.Fatal(err)
	}
	tcb := contract.TCB{BootLoader: 10, SNP: 27, Microcode: 86}
	chip := bytes.Repeat([]byte{1}, 64)
	chain, err := snptest.NewChain(snptest.ProductEmulated, tcb, chip, now)
	if err != nil {
		tb.Fatal(err)
	}
	e := &contract.Evidence{
		Version: 1, Nonce: bytes.Repeat([]byte{9}, 32), TLSSPKI: []byte("spki"), ResultKey: bytes.Repeat([]byte{8}, 32),
		Manifest: manifest, Endorsements: chain.Endorsements,
		Boot: contract.BootComponents{FirmwareSHA256: "f", KernelSHA256: "k", InitrdSHA256: "i", Cmdline: "c"},
	}
	v := snp.GenoaTCB(tcb)
	report := snp.Report{
		Version: 3, Policy: 0x30000, SigAlgo: 1, Family: 0x19, Model: 0x11, CurrentTCB: v, ReportedTCB: v, CommittedTCB: v, LaunchTCB: v,
		ChipID: [64]byte(chip), Measurement: [48]byte{1}, HostData: contract.HostData(manifest),
		ReportData: contract.EvidenceReportData(e.Nonce, e.TLSSPKI, e.ResultKey, nil), ReportIDMA: [32]byte(bytes.Repeat([]byte{0xFF}, 32)),
	}
	if e.Report, err = snptest.Sign(report.Marshal(), chain.Key); err != nil {
		tb.Fatal(err)
	}
	return e, verify.Expectations{
		Image: image, Nonce: e.Nonce, SPKI: e.TLSSPKI, AllowDevelopmentImage: true,
		AppraisalPolicy: snp.AppraisalPolicy{Measurements: [][]byte{report.Measurement[:]}, EmulatedRoots: []*x509.Certificate{chain.Root}, Now: now},
	}
}

func bundle(tb testing.TB, e *contract.Evidence) []byte {
	tb.Helper()
	data, err := json.Marshal(e)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func TestGenuineEvidenceHolds(t *testing.T) {
	t.Parallel()
	e, x := evidence(t)
	if res := verify.Bundle(bundle(t, e), x); !res.OK() {
		t.Errorf("fails: %+v", res.Failed())
	}
}

func TestEachLieFailsItsOwnCheck(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		check string
		lie   func(*contract.Evidence, *verify.Expectations)
	}{
		"replayed for another nonce": {"nonce", func(_ *contract.Evidence, x *verify.Expectations) { x.Nonce = bytes.Repeat([]byte{7}, 32) }},
		"no nonce of one's own":      {"nonce", func(_ *contract.Evidence, x *verify.Expectations) { x.Nonce = nil }},
		"another TLS key":            {"tls-key", func(_ *contract.Evidence, x *verify.Expectations) { x.SPKI = []byte("host") }},
		"TLS key swapped in bundle":  {"report-data", func(e *contract.Evidence, _ *verify.Expectations) { e.TLSSPKI = []byte("host") }},
		"result key swapped":         {"report-data", func(e *contract.Evidence, _ *verify.Expectations) { e.ResultKey = bytes.Repeat([]byte{6}, 32) }},
		"no result key":              {"result-key", func(e *contract.Evidence, _ *verify.Expectations) { e.ResultKey = nil }},
		"result key of another kind": {"result-key", func(e *contract.Evidence, _ *verify.Expectations) { e.ResultKey = make([]byte, 31) }},
		"TLS key dropped":            {"tls-key", func(e *contract.Evidence, _ *verify.Expectations) { e.TLSSPKI = nil }},
		"no digest expected":         {"launch-digest", func(_ *contract.Evidence, x *verify.Expectations) { x.Measurements = nil }},
		"no report":                  {"report", func(e *contract.Evidence, _ *verify.Expectations) { e.Report = nil }},
		"floor above the platform":   {"tcb-floor", func(_ *contract.Evidence, x *verify.Expectations) { x.MinTCB.SNP = 28 }},
		"certificates expired":       {"chain", func(_ *contract.Evidence, x *verify.Expectations) { x.Now = x.Now.AddDate(3, 0, 0) }},
		"manifest swapped": {"host-data", func(e *contract.Evidence, _ *verify.Expectations) {
			e.Manifest = bytes.Replace(e.Manifest, []byte("0a0a"), []byte("0b0b"), 1)
		}},
		"manifest not canonical":     {"manifest", func(e *contract.Evidence, _ *verify.Expectations) { e.Manifest = append(e.Manifest, ' ') }},
		"another workload":           {"workload-image", func(_ *contract.Evidence, x *verify.Expectations) { x.Image = strings.Replace(image, "app", "apq", 1) }},
		"no workload expected":       {"workload-image", func(_ *contract.Evidence, x *verify.Expectations) { x.Image = "" }},
		"another digest":             {"launch-digest", func(_ *contract.Evidence, x *verify.Expectations) { x.Measurements = [][]byte{make([]byte, 48)} }},
		"emulated root":              {"root", func(_ *contract.Evidence, x *verify.Expectations) { x.EmulatedRoots = nil }},
		"GPU evidence from nowhere":  {"gpu-evidence", func(e *contract.Evidence, _ *verify.Expectations) { e.GPUEvidence = []byte("g") }},
		"nothing known of the image": {"aml-defence", func(_ *contract.Evidence, x *verify.Expectations) { x.AllowDevelopmentImage = false }},
		"image without defence": {"aml-defence", func(_ *contract.Evidence, x *verify.Expectations) {
			x.AllowDevelopmentImage, x.TrustedImage = false, &contract.ImageDescription{}
		}},
		"defence of another image": {"aml-defence", func(_ *contract.Evidence, x *verify.Expectations) {
			x.AllowDevelopmentImage, x.TrustedImage = false, &contract.ImageDescription{AMLDefence: true}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, x := evidence(t)
			c.lie(e, &x)
			res := verify.Bundle(bundle(t, e), x)
			if !slices.ContainsFunc(res.Checks, func(got snp.Check) bool { return got.Name == c.check && got.Status == snp.Fail && got.Why != "" }) {
				t.Errorf("check %s does not fail: %+v", c.check, res.Checks)
			}
		})
	}
}

func TestATrustedImageWithDefenceNeedsNoPermission(t *testing.T) {
	t.Parallel()
	e, x := evidence(t)
	x.AllowDevelopmentImage = false
	x.TrustedImage = &contract.ImageDescription{
		AMLDefence: true, Firmware: contract.ImageFile{SHA256: "f"}, Kernel: contract.ImageFile{SHA256: "k"}, Initrd: contract.ImageFile{SHA256: "i"}, Cmdline: "c",
	}
	if res := verify.Bundle(bundle(t, e), x); !res.OK() {
		t.Errorf("fails: %+v", res.Failed())
	}
}

// Every component counts: a description that fits in all but one is of
// another image.
func TestADefenceCountsOnlyForTheImageThatWasLaunched(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*contract.BootComponents){
		"firmware": func(b *contract.BootComponents) { b.FirmwareSHA256 = "x" },
		"kernel":   func(b *contract.BootComponents) { b.KernelSHA256 = "x" },
		"initrd":   func(b *contract.BootComponents) { b.InitrdSHA256 = "x" },
		"cmdline":  func(b *contract.BootComponents) { b.Cmdline += " " },
	} {
		e, x := evidence(t)
		x.AllowDevelopmentImage = false
		x.TrustedImage = &contract.ImageDescription{
			AMLDefence: true, Firmware: contract.ImageFile{SHA256: "f"}, Kernel: contract.ImageFile{SHA256: "k"}, Initrd: contract.ImageFile{SHA256: "i"}, Cmdline: "c",
		}
		change(&e.Boot)
		if res := verify.Bundle(bundle(t, e), x); res.OK() || res.Failed().Name != "aml-defence" {
			t.Errorf("%s differs: %+v", name, res.Failed())
		}
	}
}

// The bundle carries the host's copy of image.json; it never counts.
func TestTheBundlesOwnImageDescriptionIsNoDefence(t *testing.T) {
	t.Parallel()
	e, x := evidence(t)
	x.AllowDevelopmentImage = false
	e.Boot.Image = json.RawMessage(`{"version":1,"aml_defence":true}`)
	if res := verify.Bundle(bundle(t, e), x); res.OK() || res.Failed().Name != "aml-defence" {
		t.Errorf("%+v", res.Failed())
	}
}

// withGPU makes the manifest ask for one, and the guest show evidence of it.
func withGPU(e *contract.Evidence) {
	e.Manifest = bytes.Replace(e.Manifest, []byte(`"image"`), []byte(`"gpu":{"count":1,"model":"H100"},"image"`), 1)
	e.GPUEvidence = []byte("evidence of GPUs")
}

func gpuCheck(t *testing.T, res snp.Result) snp.Check {
	t.Helper()
	i := slices.IndexFunc(res.Checks, func(c snp.Check) bool { return c.Name == "gpu-evidence" })
	if i < 0 {
		t.Fatalf("no such check: %+v", res.Checks)
	}
	return res.Checks[i]
}

func TestGPUsAreLeftToTheVerifiersJudge(t *testing.T) {
	t.Parallel()
	e, x := evidence(t)
	withGPU(e)
	asked := 0
	x.GPUs = func(data []byte, nonce [contract.GPUNonceBytes]byte) contract.GPUAppraisal {
		asked++
		want := contract.GPUNonce(contract.EvidenceReportData(x.Nonce, e.TLSSPKI, e.ResultKey, nil))
		if !bytes.Equal(data, e.GPUEvidence) || nonce != want {
			t.Errorf("asked about %q under %x", data, nonce)
		}
		a := contract.GPUAppraisal{GPUs: []contract.AttestedGPU{{Chip: "GH100"}}, Warnings: []contract.Warning{{Name: "gpu-binding", Why: "not proven"}}}
		a.Add("gpu-evidence", false, "", "", "", "no")
		return a
	}
	res := verify.Bundle(bundle(t, e), x)
	if asked != 1 || gpuCheck(t, res).Why != "no" || len(res.GPUs) != 1 || res.Warnings[len(res.Warnings)-1].Name != "gpu-binding" {
		t.Errorf("asked %d times: %+v", asked, res)
	}
	// Another nonce than the bundle's own claim.
	e.Nonce = bytes.Repeat([]byte{1}, 32)
	_ = verify.Bundle(bundle(t, e), x)
}

// gpuJudge is one that must not be asked.
type gpuJudge struct{ t *testing.T }

func (j *gpuJudge) judge([]byte, [contract.GPUNonceBytes]byte) contract.GPUAppraisal {
	j.t.Error("the judge was asked")
	return contract.GPUAppraisal{}
}

func TestGPUsNobodyExpectsOrShowsAreNotTakenForProven(t *testing.T) {
	t.Parallel()
	judge := (&gpuJudge{t}).judge
	for name, c := range map[string]struct {
		change func(*contract.Evidence, *verify.Expectations)
		status snp.Status
	}{
		"shown, not expected":              {func(e *contract.Evidence, _ *verify.Expectations) { withGPU(e) }, snp.Skip},
		"asked for, not shown":             {func(e *contract.Evidence, _ *verify.Expectations) { withGPU(e); e.GPUEvidence = nil }, snp.Fail},
		"expected, not asked for":          {func(_ *contract.Evidence, x *verify.Expectations) { x.GPUs = judge }, snp.Fail},
		"shown, not asked for":             {func(e *contract.Evidence, _ *verify.Expectations) { e.GPUEvidence = []byte("g") }, snp.Fail},
		"shown, expected, not asked for":   {func(e *contract.Evidence, x *verify.Expectations) { e.GPUEvidence, x.GPUs = []byte("g"), judge }, snp.Fail},
		"not shown, expected or asked for": {func(*contract.Evidence, *verify.Expectations) {}, snp.Pass},
	} {
		e, x := evidence(t)
		c.change(e, &x)
		if got := gpuCheck(t, verify.Bundle(bundle(t, e), x)); got.Status != c.status || got.Why == "" {
			t.Errorf("%s: %+v, want %s", name, got, c.status)
		}
	}
}

func TestAKeyOfNoConnectionIsNotCompared(t *testing.T) {
	t.Parallel()
	e, x := evidence(t)
	x.SPKI = nil
	res := verify.Bundle(bundle(t, e), x)
	if !res.OK() || slices.ContainsFunc(res.Checks, func(c snp.Check) bool { return c.Name == "tls-key" }) {
		t.Errorf("%+v", res.Checks)
	}
}

func TestNamesOfChecksAreStable(t *testing.T) {
	t.Parallel()
	e, x := evidence(t)
	var names []string
	res := verify.Bundle(bundle(t, e), x)
	for _, c := range res.Checks {
		names = append(names, c.Name)
		if c.Why == "" {
			t.Errorf("check %s says nothing", c.Name)
		}
	}
	want := strings.Fields("bundle nonce result-key tls-key report signing-key root chain revocation signature product chip-id tcb-binding tcb-layout tcb-floor" +
		" committed-is-current vmpl policy-reserved policy-debug policy-migration policy-cxl launch-digest host-data report-data manifest workload-image gpu-evidence aml-defence")
	if !slices.Equal(names, want) {
		t.Errorf("checks are %q, want %q", names, want)
	}
}

// seed is what a fuzzer mutates: a bundle that holds under its expectations.
func seed(f *testing.F) ([]byte, verify.Expectations) {
	f.Helper()
	e, x := evidence(f)
	return bundle(f, e), x
}

// A change anywhere in what silicon or signatures cover must be refused, so
// only a bundle that says the same may hold.
func FuzzBundle(f *testing.F) {
	data, x := seed(f)
	f.Add(data)
	f.Add([]byte(`{"version":1}`))
	genuine, err := contract.ParseEvidence(data)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		strict := verify.Bundle(data, verify.Expectations{AppraisalPolicy: snp.AppraisalPolicy{Now: x.Now}})
		if strict.OK() {
			t.Error("evidence holds although nothing was expected")
		}
		res := verify.Bundle(data, x)
		if !res.OK() {
			return
		}
		e, err := contract.ParseEvidence(data)
		if err != nil || !bytes.Equal(e.Manifest, genuine.Manifest) || !bytes.Equal(e.TLSSPKI, genuine.TLSSPKI) ||
			!bytes.Equal(e.ResultKey, genuine.ResultKey) || !bytes.Equal(e.Report[:0x2A0], genuine.Report[:0x2A0]) {
			t.Errorf("changed evidence holds: %q", data)
		}
	})
}
