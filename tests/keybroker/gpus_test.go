package keybroker

import (
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/evidence"
	"github.com/confidential-node/agent/gpu/rim/rimtest"
	"github.com/confidential-node/agent/gpu/spdm"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

// testGPUs is who certifies all GPUs of these tests, made once.
var testGPUs = sync.OnceValues(func() (*spdmtest.Authority, error) { return spdmtest.NewAuthority(testTime()) })

// gpuGuest is a guest of a launch that asks for GPUs.
type gpuGuest struct {
	*guest
	gpus []*spdmtest.GPU
	// answered is the nonce the GPUs answer; that of the session and key when
	// nil.
	answered *[contract.GPUNonceBytes]byte
}

func gpuAuthority(t *testing.T) *spdmtest.Authority {
	t.Helper()
	a, err := testGPUs()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newGPU(t *testing.T, c spdmtest.Config) *spdmtest.GPU {
	t.Helper()
	g, err := gpuAuthority(t).NewGPU(c)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// newGPUWorld is a broker that has manifests for GPUs of one kind.
func newGPUWorld(t *testing.T, demand contract.GPU, kind spdmtest.Config, change func(*Config)) *world {
	t.Helper()
	authority := gpuAuthority(t)
	driver, vbios, err := rimtest.For(authority, newGPU(t, kind))
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(c *Config) {
		c.EmulatedRoots = append(c.EmulatedRoots, authority.Root)
		policy := evidence.Policy{EmulatedRoots: c.EmulatedRoots, Now: testTime()}
		if err := policy.ReadManifests(fstest.MapFS{"driver": {Data: driver}, "vbios": {Data: vbios}}); err != nil {
			t.Fatal(err)
		}
		c.GPUManifests = policy.Manifests
		if change != nil {
			change(c)
		}
	})
	w.manifest.GPU, w.manifest.LaunchID = &demand, strings.Repeat("a", 32)
	w.launch.Manifest = encode(t, w.manifest)
	w.report.HostData = contract.HostData(w.launch.Manifest)
	w.register()
	return w
}

// register registers the launch of the manifest, again where it was before.
func (w *world) register() {
	w.t.Helper()
	if err := w.admin.PutLaunch(w.t.Context(), w.manifest.LaunchID, &w.launch); err != nil {
		w.t.Fatal(err)
	}
}

// body asks the GPUs, and then the processor.
func (g *gpuGuest) body(nonce string) map[string]any {
	g.w.t.Helper()
	without, err := contract.BrokerReportData("", nonce, g.jwk)
	if err != nil {
		g.w.t.Fatal(err)
	}
	asked := contract.GPUNonce(without)
	if g.answered != nil {
		asked = *g.answered
	}
	data, err := spdmtest.Evidence(asked, g.gpus...)
	if err != nil {
		g.w.t.Fatal(err)
	}
	g.extra = string(data)
	return g.attestBody(nonce)
}

func TestALaunchWithGPUsGetsItsKeysForTheirEvidence(t *testing.T) {
	t.Parallel()
	w := newGPUWorld(t, contract.GPU{Model: "H100", Count: 1}, spdmtest.Config{}, nil)
	w.launch.GPUPDIs = []string{"2921ce551e4eeda3", "0x431d480fe5e87274"}
	w.register()
	g := &gpuGuest{guest: w.guest(), gpus: []*spdmtest.GPU{newGPU(t, spdmtest.Config{PDI: 0x431d480fe5e87274})}}
	token, status, refused := g.attest(g.body(g.auth()))
	if status != http.StatusOK {
		t.Fatalf("%+v", refused)
	}
	if got, _, refused := g.resource(secretName, token); got != secret {
		t.Fatalf("%q %+v", got, refused)
	}
	// The tenant sees which GPU it was.
	s, err := w.admin.Launch(t.Context(), w.manifest.LaunchID)
	if err != nil || len(s.Releases) != 1 || len(s.Releases[0].GPUs) != 1 || s.Releases[0].GPUs[0].PDI != "0x431d480fe5e87274" || !s.Releases[0].Emulated {
		t.Errorf("%+v %v", s, err)
	}
}

func TestEveryWrongGPUIsRefusedWithItsReason(t *testing.T) {
	t.Parallel()
	one := contract.GPU{Model: "H100", Count: 1}
	for name, c := range map[string]struct {
		code   string
		demand contract.GPU
		cfg    func(*Config)
		lie    func(*gpuGuest)
	}{
		"none":          {code: "broker.gpu-count", demand: contract.GPU{Model: "H100", Count: 8}},
		"one too many":  {code: "broker.gpu-count", lie: func(g *gpuGuest) { g.gpus = append(g.gpus, newGPU(g.w.t, spdmtest.Config{PDI: 2})) }},
		"a cheaper one": {code: "broker.gpu-model", lie: func(g *gpuGuest) { g.gpus[0] = newGPU(g.w.t, spdmtest.Config{PDI: 1, Chip: "GB202"}) }},
		"not on the list": {code: "broker.gpu-allowed", lie: func(g *gpuGuest) {
			g.w.launch.GPUPDIs = []string{"2921ce551e4eeda3"}
			g.w.register()
		}},
		"devtools":     {code: "broker.gpu-measurements", lie: func(g *gpuGuest) { g.gpus[0] = newGPU(g.w.t, spdmtest.Config{PDI: 1, Mode: spdmtest.DevTools}) }},
		"no manifests": {code: "broker.gpu-measurements", cfg: func(c *Config) { c.GPUManifests = nil }},
		"in Protected PCIe": {code: "broker.gpu-mode", lie: func(g *gpuGuest) {
			g.gpus[0] = newGPU(g.w.t, spdmtest.Config{PDI: 1, Mode: spdmtest.ProtectedPCIe, Switches: []spdm.PDI{1, 2, 3, 4}})
		}},
		"nobody's root":    {code: "broker.gpu-root", cfg: func(c *Config) { c.EmulatedRoots = c.EmulatedRoots[:1] }},
		"another's chain":  {code: "broker.gpu-signature", lie: func(g *gpuGuest) { g.gpus[0].Certificates = newGPU(g.w.t, spdmtest.Config{PDI: 2}).Certificates }},
		"recorded earlier": {code: "broker.gpu-nonce", lie: func(g *gpuGuest) { g.answered = &[contract.GPUNonceBytes]byte{1} }},
		"one shown as two": {code: "broker.gpu-count", lie: func(g *gpuGuest) { g.gpus = append(g.gpus, g.gpus[0]) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			demand := one
			if c.demand.Count > 0 {
				demand = c.demand
			}
			w := newGPUWorld(t, demand, spdmtest.Config{}, c.cfg)
			g := &gpuGuest{guest: w.guest(), gpus: []*spdmtest.GPU{newGPU(t, spdmtest.Config{PDI: 1})}}
			if c.lie != nil {
				c.lie(g)
			}
			_, _, refused := g.attest(g.body(g.auth()))
			if refused.Code != c.code || refused.Remedy == "" || !strings.Contains(refused.Message, "failed checks") {
				t.Fatalf("%+v, want %s", refused, c.code)
			}
			s, err := w.admin.Launch(t.Context(), w.manifest.LaunchID)
			if err != nil || len(s.Releases) != 0 || s.RefusalCount != 1 {
				t.Errorf("%+v %v", s, err)
			}
		})
	}
}

func TestUnmeasuredGPUsOnlyWhenTold(t *testing.T) {
	t.Parallel()
	w := newGPUWorld(t, contract.GPU{Model: "H100", Count: 1}, spdmtest.Config{}, func(c *Config) { c.GPUManifests, c.AllowUnmeasuredGPUs = nil, true })
	g := &gpuGuest{guest: w.guest(), gpus: []*spdmtest.GPU{newGPU(t, spdmtest.Config{PDI: 1})}}
	if _, status, refused := g.attest(g.body(g.auth())); status != http.StatusOK {
		t.Fatalf("%+v", refused)
	}
}

// What the processor has not signed for is nobody's: evidence that the host
// puts in, takes away or exchanges on the way.
func TestGPUEvidenceHasToBeCoveredByTheReport(t *testing.T) {
	t.Parallel()
	evidenceOf := func(body map[string]any) map[string]any {
		return body["tee-evidence"].(map[string]any) //nolint:errcheck // it is what attestBody makes
	}
	for name, c := range map[string]struct {
		code   string
		change func(evidence map[string]any, other string)
	}{
		"taken away":         {"broker.gpu-evidence-missing", func(e map[string]any, _ string) { e["additional_evidence"] = "" }},
		"exchanged":          {"broker.report-data", func(e map[string]any, other string) { e["additional_evidence"] = other }},
		"no evidence at all": {"broker.report-data", func(e map[string]any, _ string) { e["additional_evidence"] = "x" }},
	} {
		w := newGPUWorld(t, contract.GPU{Model: "H100", Count: 1}, spdmtest.Config{}, nil)
		g := &gpuGuest{guest: w.guest(), gpus: []*spdmtest.GPU{newGPU(t, spdmtest.Config{PDI: 1})}}
		nonce := g.auth()
		honest := g.body(nonce)
		g.gpus[0] = newGPU(t, spdmtest.Config{PDI: 2})
		g.body(nonce)
		c.change(evidenceOf(honest), g.extra)
		if _, _, refused := g.attest(honest); refused.Code != c.code {
			t.Errorf("%s: %+v, want %s", name, refused, c.code)
		}
	}
}

func TestDemandsOnGPUsThatNobodyCanMeetAreNotRegistered(t *testing.T) {
	t.Parallel()
	w := newGPUWorld(t, contract.GPU{Model: "H100", Count: 1}, spdmtest.Config{}, nil)
	for name, c := range map[string]struct {
		gpu  contract.GPU
		pdis []string
	}{
		"a model without CC": {contract.GPU{Model: "A100", Count: 1}, nil},
		"a model of nobody":  {contract.GPU{Model: "X1", Count: 1}, nil},
		"half a board":       {contract.GPU{Model: "H100", Count: 4}, nil},
		"a PDI that is none": {contract.GPU{Model: "H100", Count: 1}, []string{"12"}},
		"a list without end": {contract.GPU{Model: "H100", Count: 1}, slices.Repeat([]string{"2921ce551e4eeda3"}, 5000)},
	} {
		w.manifest.GPU, w.manifest.LaunchID = &c.gpu, strings.Repeat("b", 32)
		w.launch.Manifest, w.launch.GPUPDIs = encode(t, w.manifest), c.pdis
		err := w.admin.PutLaunch(t.Context(), w.manifest.LaunchID, &w.launch)
		if contract.AsRefusal(err).Code != "broker.registration-malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
