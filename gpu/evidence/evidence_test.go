package evidence_test

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/evidence"
	"github.com/confidential-node/agent/gpu/rim/rimtest"
	"github.com/confidential-node/agent/gpu/spdm"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

// authority and wholeBoard are made once: keys of P-384 are slow under the race
// detector.
var authority = sync.OnceValues(func() (*spdmtest.Authority, error) { return spdmtest.NewAuthority(time.Now()) })

// wholeBoard are eight H100 in Protected PCIe, which no test changes.
var wholeBoard = sync.OnceValues(func() (gpus []*spdmtest.GPU, err error) {
	a, err := authority()
	if err != nil {
		return nil, err
	}
	for _, c := range several(8, spdmtest.Config{Mode: spdmtest.ProtectedPCIe, Switches: board()}) {
		g, err := a.NewGPU(c)
		if err != nil {
			return nil, err
		}
		gpus = append(gpus, g)
	}
	return gpus, nil
})

// newBoard is the world of a guest that has them.
func newBoard(tb testing.TB) *world {
	tb.Helper()
	w := newWorld(tb, "H100", spdmtest.Config{PDI: 1})
	gpus, err := wholeBoard()
	if err != nil {
		tb.Fatal(err)
	}
	w.gpus, w.policy.Count = slices.Clone(gpus), len(gpus)
	return w
}

// world is an authority, the GPUs of a guest, and the policy they fit.
type world struct {
	tb        testing.TB
	authority *spdmtest.Authority
	gpus      []*spdmtest.GPU
	policy    evidence.Policy
	nonce     [contract.GPUNonceBytes]byte
}

// newWorld has one GPU per config.
func newWorld(tb testing.TB, model string, configs ...spdmtest.Config) *world {
	tb.Helper()
	w := &world{tb: tb, nonce: [contract.GPUNonceBytes]byte{1, 2, 3}}
	var err error
	if w.authority, err = authority(); err != nil {
		tb.Fatal(err)
	}
	for _, c := range configs {
		w.gpus = append(w.gpus, w.gpu(w.authority, c))
	}
	w.policy = evidence.Policy{Model: model, Count: len(configs), EmulatedRoots: []*x509.Certificate{w.authority.Root}, Now: time.Now()}
	w.manifests(w.gpus[0])
	return w
}

func (w *world) gpu(a *spdmtest.Authority, c spdmtest.Config) *spdmtest.GPU {
	w.tb.Helper()
	g, err := a.NewGPU(c)
	if err != nil {
		w.tb.Fatal(err)
	}
	return g
}

// manifests makes those that a GPU fits what the policy compares with.
func (w *world) manifests(g *spdmtest.GPU) {
	w.tb.Helper()
	driver, vbios, err := rimtest.For(w.authority, g)
	if err != nil {
		w.tb.Fatal(err)
	}
	if err := w.policy.ReadManifests(fstest.MapFS{"driver": {Data: driver}, "vbios": {Data: vbios}}); err != nil {
		w.tb.Fatal(err)
	}
}

func (w *world) evidence() []byte {
	w.tb.Helper()
	data, err := spdmtest.Evidence(w.nonce, w.gpus...)
	if err != nil {
		w.tb.Fatal(err)
	}
	return data
}

func (w *world) judge() contract.GPUAppraisal { return w.policy.Judge(w.evidence(), w.nonce) }

// several are n GPUs that differ by PDI only.
func several(n int, c spdmtest.Config) (out []spdmtest.Config) {
	for i := range n {
		c.PDI = spdm.PDI(i + 1)
		out = append(out, c)
	}
	return out
}

// board is that of HGX Hopper as its GPUs see it: eighteen links to four
// switches.
func board() (links []spdm.PDI) {
	for i := range 18 {
		links = append(links, spdm.PDI(0x100+i%4))
	}
	return links
}

func TestGPUsThatFitHold(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		model   string
		configs []spdmtest.Config
		mode    string
	}{
		"one H100":                {"H100", several(1, spdmtest.Config{}), "on"},
		"the vendor before it":    {"NVIDIA H200", several(1, spdmtest.Config{}), "on"},
		"eight H100":              {"H100", several(8, spdmtest.Config{Mode: spdmtest.ProtectedPCIe, Switches: board()}), "ppcie"},
		"one B200":                {"B200", several(1, spdmtest.Config{Chip: "GB100", VBIOS: "97.00.D9.00.35"}), "on"},
		"one B200, links guarded": {"B200", several(1, spdmtest.Config{Chip: "GB100", Mode: spdmtest.MultiPassthrough}), "multi-gpu"},
		"four B300":               {"B300", several(4, spdmtest.Config{Chip: "GB110", Mode: spdmtest.MultiPassthrough}), "multi-gpu"},
		"one RTX PRO 6000":        {"RTX PRO 6000 Server Edition", several(1, spdmtest.Config{Chip: "GB202"}), "on"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, c.model, c.configs...)
			a := w.judge()
			if !a.OK() {
				t.Fatalf("%+v", a.Failed())
			}
			if len(a.GPUs) != len(c.configs) {
				t.Fatalf("%d GPUs", len(a.GPUs))
			}
			for i, g := range a.GPUs {
				if g.PDI != c.configs[i].PDI.String() || g.Chip != w.gpus[i].Chip || g.Driver != w.gpus[i].Driver || g.VBIOS != w.gpus[i].VBIOS ||
					g.Mode != c.mode || g.Board != "1010-0210-886" || !g.Emulated {
					t.Errorf("%+v", g)
				}
			}
		})
	}
}

// The evidence that NVIDIA publishes as a sample, as a guest would have handed
// it out: it holds under NVIDIA's root alone.
func TestTheEvidenceOfARealH100Holds(t *testing.T) {
	t.Parallel()
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	report := read("spdm/testdata/hopper-report.bin")
	nonce := [contract.GPUNonceBytes]byte(report[4:])
	data, err := contract.EncodeGPUEvidence([]contract.GPUEvidence{{
		Arch: contract.ArchHopper, Nonce: hex.EncodeToString(nonce[:]), Report: report, Certificates: read("spdm/testdata/hopper-chain.pem"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	signed := time.Date(2024, 6, 1, 0, 0, 0, 0, time.UTC)
	p := evidence.Policy{Model: "H100", Count: 1, PDIs: []spdm.PDI{0x431d480fe5e87274}, AllowUnmeasured: true, Now: signed}
	a := p.Judge(data, nonce)
	want := contract.AttestedGPU{Chip: "GH100", PDI: "0x431d480fe5e87274", Board: "1010-0200-882", Driver: "550.90.07", VBIOS: "96.00.9F.00.01", Mode: "on"}
	if !a.OK() || len(a.GPUs) != 1 || a.GPUs[0] != want {
		t.Errorf("%+v, %+v", a.Failed(), a.GPUs)
	}
	// A manifest of NVIDIA's for another driver is none for this one, even
	// where unmeasured GPUs are allowed.
	if err := p.ReadManifests(fstest.MapFS{"driver": {Data: read("rim/testdata/driver-545.swidtag")}}); err != nil {
		t.Fatal(err)
	}
	a = p.Judge(data, nonce)
	if f := a.Failed(); f == nil || f.Name != "gpu-measurements" || !strings.Contains(f.Why, "no manifest for driver 550.90.07") {
		t.Errorf("%+v", a.Checks)
	}
}

// What no check can prove is said each time, not in a manual.
func TestWhatIsNotProvenIsSaid(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "H100", several(1, spdmtest.Config{})...)
	names := func(a contract.GPUAppraisal) (out []string) {
		for _, warning := range a.Warnings {
			out = append(out, warning.Name)
		}
		return out
	}
	if got := names(w.judge()); !slices.Equal(got, []string{"gpu-binding", "gpu-revocation", "gpu-board"}) {
		t.Errorf("%q", got)
	}
	// Boards that are known by PDI are known.
	w.policy.PDIs = []spdm.PDI{1}
	if got := names(w.judge()); !slices.Equal(got, []string{"gpu-binding", "gpu-revocation"}) {
		t.Errorf("%q", got)
	}
	if got := names(newBoard(t).judge()); !slices.Contains(got, "gpu-switches") {
		t.Errorf("%q", got)
	}
}

func TestEachWrongGPUFailsItsOwnCheck(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		check string
		wrong func(*world)
	}{
		"recorded earlier":                    {"gpu-nonce", func(w *world) { w.nonce[0]++ }},
		"one too few":                         {"gpu-count", func(w *world) { w.policy.Count = 8 }},
		"one too many":                        {"gpu-count", func(w *world) { w.gpus = append(w.gpus, w.gpu(w.authority, spdmtest.Config{PDI: 9})) }},
		"one shown twice":                     {"gpu-distinct", func(w *world) { w.gpus = append(w.gpus, w.gpus[0]) }},
		"no count":                            {"gpu-count", func(w *world) { w.policy.Count = 0 }},
		"no model":                            {"gpu-model", func(w *world) { w.policy.Model = "" }},
		"another model":                       {"gpu-model", func(w *world) { w.policy.Model = "B200" }},
		"a model that cannot be confidential": {"gpu-model", func(w *world) { w.policy.Model = "A100" }},
		"a cheaper one":                       {"gpu-model", func(w *world) { w.gpus[0] = w.gpu(w.authority, spdmtest.Config{PDI: 1, Chip: "GB202"}) }},
		"nobody's root":                       {"gpu-root", func(w *world) { w.policy.EmulatedRoots = nil }},
		"another's root":                      {"gpu-root", func(w *world) { w.gpus[0] = w.gpu(stranger(w.tb), spdmtest.Config{PDI: 1}) }},
		"expired certificates":                {"gpu-root", func(w *world) { w.policy.Now = w.policy.Now.AddDate(2, 0, 0) }},
		"another's certificates":              {"gpu-signature", func(w *world) { w.gpus[0].Certificates = w.gpu(w.authority, spdmtest.Config{PDI: 2}).Certificates }},
		"not on the list":                     {"gpu-allowed", func(w *world) { w.policy.PDIs = []spdm.PDI{7, 8} }},
		"devtools":                            {"gpu-measurements", func(w *world) { w.gpus[0] = w.gpu(w.authority, spdmtest.Config{PDI: 1, Mode: spdmtest.DevTools}) }},
		"other firmware":                      {"gpu-measurements", func(w *world) { w.gpus[0].Measurements[45][0]++ }},
		"a driver nobody knows":               {"gpu-measurements", func(w *world) { w.gpus[0] = w.gpu(w.authority, spdmtest.Config{PDI: 1, Driver: "1.2.3"}) }},
		"no manifests":                        {"gpu-measurements", func(w *world) { w.policy.Manifests = nil }},
		"one in Protected PCIe": {"gpu-mode", func(w *world) {
			w.gpus[0] = w.gpu(w.authority, spdmtest.Config{PDI: 1, Mode: spdmtest.ProtectedPCIe, Switches: board()})
		}},
		"Hopper as if it were Blackwell": {"gpu-mode", func(w *world) {
			w.gpus[0] = w.gpu(w.authority, spdmtest.Config{PDI: 1, Mode: spdmtest.MultiPassthrough})
		}},
		"a driver that names none": {"gpu-driver", func(w *world) { w.gpus[0].Driver = "" }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "H100", spdmtest.Config{PDI: 1})
			data := w.evidence()
			if c.wrong(w); name != "recorded earlier" {
				data = w.evidence()
			}
			fails(t, w.policy.Judge(data, w.nonce), c.check)
		})
	}
}

// stranger is another authority.
func stranger(tb testing.TB) *spdmtest.Authority {
	tb.Helper()
	a, err := spdmtest.NewAuthority(time.Now())
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func fails(t *testing.T, a contract.GPUAppraisal, check string) {
	t.Helper()
	if !slices.ContainsFunc(a.Checks, func(c contract.Check) bool { return c.Name == check && c.Status == contract.Fail && c.Why != "" }) {
		t.Errorf("check %s does not fail: %+v", check, a.Checks)
	}
}

func TestEveryGPUOfABoardHasToFit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		check string
		last  spdmtest.Config
	}{
		"alone out of Protected PCIe": {"gpu-mode", spdmtest.Config{PDI: 8}},
		"on another board":            {"gpu-switches", spdmtest.Config{PDI: 8, Mode: spdmtest.ProtectedPCIe, Switches: []spdm.PDI{1, 2, 3, 4}}},
		"with a switch missing":       {"gpu-switches", spdmtest.Config{PDI: 8, Mode: spdmtest.ProtectedPCIe, Switches: board()[:3]}},
		"of another guest":            {"gpu-driver", spdmtest.Config{PDI: 8, Mode: spdmtest.ProtectedPCIe, Switches: board(), Driver: "595.71.06"}},
		"of another kind":             {"gpu-model", spdmtest.Config{PDI: 8, Chip: "GB100"}},
		"debugged":                    {"gpu-measurements", spdmtest.Config{PDI: 8, Mode: spdmtest.DevTools}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newBoard(t)
			w.gpus[7] = w.gpu(w.authority, c.last)
			a := w.judge()
			fails(t, a, c.check)
			i := slices.IndexFunc(a.Checks, func(c contract.Check) bool { return c.Status == contract.Fail })
			if !strings.Contains(a.Checks[i].Why, "GPU 8 of 8") {
				t.Errorf("it does not say which: %q", a.Checks[i].Why)
			}
		})
	}
	// Links between several of Blackwell have to be encrypted.
	w := newWorld(t, "B200", several(2, spdmtest.Config{Chip: "GB100"})...)
	fails(t, w.judge(), "gpu-mode")
}

func TestGPUsNobodyMeasuredCountOnlyWhenAllowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "H100", spdmtest.Config{PDI: 1})
	w.policy.Manifests, w.policy.AllowUnmeasured = nil, true
	a := w.judge()
	if last := a.Checks[len(a.Checks)-1]; !a.OK() || last.Name != "gpu-measurements" || last.Status != contract.Skip {
		t.Errorf("%+v", a.Checks)
	}
}

func TestEvidenceInNoKnownFormIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "H100", spdmtest.Config{PDI: 1})
	good := w.evidence()
	recorded, err := w.gpus[0].Evidence([contract.GPUNonceBytes]byte{9})
	if err != nil {
		t.Fatal(err)
	}
	recorded.Nonce = hex.EncodeToString(w.nonce[:])
	relabelled, err := contract.EncodeGPUEvidence([]contract.GPUEvidence{recorded})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data  []byte
		check string
	}{
		"none":                 {nil, "gpu-evidence"},
		"no container":         {[]byte("x"), "gpu-evidence"},
		"recorded, relabelled": {relabelled, "gpu-nonce"},
		"another nonce around": {bytes.Replace(good, []byte(`"nonce":"010203`), []byte(`"nonce":"010204`), 1), "gpu-nonce"},
		"another architecture": {bytes.Replace(good, []byte(contract.ArchHopper), []byte(contract.ArchBlackwell), 1), "gpu-model"},
	} {
		a := w.policy.Judge(c.data, w.nonce)
		if bytes.Equal(c.data, good) {
			t.Fatalf("%s changes nothing", name)
		}
		fails(t, a, c.check)
	}
}

func TestNamesOfGPUChecksAreStable(t *testing.T) {
	t.Parallel()
	w := newBoard(t)
	for i := range w.gpus {
		w.policy.PDIs = append(w.policy.PDIs, spdm.PDI(i+1))
	}
	var names []string
	for _, c := range w.judge().Checks {
		names = append(names, c.Name)
	}
	want := strings.Fields("gpu-evidence gpu-count gpu-root gpu-signature gpu-nonce gpu-distinct gpu-model gpu-allowed gpu-mode gpu-switches gpu-driver gpu-measurements")
	if !slices.Equal(names, want) {
		t.Errorf("checks are %q, want %q", names, want)
	}
}

// Whatever is changed in evidence that holds: it holds no longer, or says the
// same.
func FuzzJudge(f *testing.F) {
	w := newWorld(f, "H100", spdmtest.Config{PDI: 1})
	f.Add(w.evidence())
	f.Add([]byte(`[]`))
	genuine := w.judge()
	f.Fuzz(func(t *testing.T, data []byte) {
		if a := (&evidence.Policy{Now: w.policy.Now}).Judge(data, w.nonce); a.OK() {
			t.Error("evidence holds although nothing was expected")
		}
		if a := w.policy.Judge(data, w.nonce); a.OK() && a.GPUs[0] != genuine.GPUs[0] {
			t.Errorf("changed evidence holds: %+v", a.GPUs)
		}
	})
}

func BenchmarkJudge(b *testing.B) {
	w := newBoard(b)
	data := w.evidence()
	for b.Loop() {
		if a := w.policy.Judge(data, w.nonce); !a.OK() {
			b.Fatal(a.Failed())
		}
	}
}
