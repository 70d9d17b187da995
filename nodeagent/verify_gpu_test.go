package main

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/gpu/rim/rimtest"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

// gpuProof is the evidence of a guest with one GPU, and the flags under which
// it holds; authority is who certified the GPU.
func gpuProof(t *testing.T, c spdmtest.Config) (p *proof, authority *spdmtest.Authority) {
	t.Helper()
	authority, err := spdmtest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	g, err := authority.NewGPU(c)
	if err != nil {
		t.Fatal(err)
	}
	p = newProofWith(t, &contract.GPU{Model: "H100", Count: 1}, g)
	driver, vbios, err := rimtest.For(authority, g)
	if err != nil {
		t.Fatal(err)
	}
	rims := filepath.Join(p.dir, "rims")
	if err := os.Mkdir(rims, 0o700); err != nil {
		t.Fatal(err)
	}
	p.put("rims/driver.swidtag", driver)
	p.put("rims/vbios.swidtag", vbios)
	p.flags["expected-gpu"], p.flags["rim-dir"] = "H100", rims
	return p, authority
}

// arguments are the command line, with the root of the GPU beside the
// processor's.
func (p *proof) arguments(authority *spdmtest.Authority) []string {
	args := []string{"verify", p.file, "--allow-emulated-root", p.put("gpu-root.pem", authority.RootPEM())}
	for name, value := range p.flags {
		args = append(args, "--"+name+"="+value)
	}
	return args
}

func TestEvidenceOfAGPUIsJudgedAndSaysWhatItDoesNotProve(t *testing.T) {
	t.Parallel()
	p, authority := gpuProof(t, spdmtest.Config{PDI: 0x2921ce551e4eeda3})
	p.flags["expected-pdi"] = "2921CE551E4EEDA3,0x431d480fe5e87274"
	args := p.arguments(authority)
	code, doc, stderr := judged(t, args...)
	if code != exitOK || len(doc.GPUs) != 1 {
		t.Fatalf("exit %d, failed %v, GPUs %+v, %s", code, failed(doc), doc.GPUs, stderr)
	}
	want := contract.AttestedGPU{
		Chip: "GH100", PDI: "0x2921ce551e4eeda3", Board: "1010-0210-886", Driver: "595.71.05", VBIOS: "96.00.9F.00.04", Mode: "on", Emulated: true,
	}
	if doc.GPUs[0] != want {
		t.Errorf("%+v", doc.GPUs[0])
	}
	if !slices.ContainsFunc(doc.Warnings, func(w snp.Warning) bool {
		return w.Name == "gpu-binding" && strings.Contains(w.Why, "no signature ties a GPU to this processor")
	}) {
		t.Errorf("%+v", doc.Warnings)
	}
	_, doc, _ = judged(t, append(args, "--explain")...)
	for _, c := range doc.Checks {
		if c.ProtectsFrom == "" {
			t.Errorf("%s protects from nothing", c.Name)
		}
	}
	_, text, _ := run(t, append(args, "--explain")...)
	for _, line := range []string{
		"GPU EMULATED GH100, PDI 0x2921ce551e4eeda3, board 1010-0210-886, mode on", "  driver 595.71.05, VBIOS 96.00.9F.00.04",
		"✓ gpu-measurements", "against: firmware with known holes", "! gpu-binding", "no genuine GPU elsewhere answered in their stead",
	} {
		if !strings.Contains(text, line) {
			t.Errorf("no %q in\n%s", line, text)
		}
	}
}

// Whoever does not say what GPUs are expected has them not judged, and reads
// so; whoever does is not content with less.
func TestGPUsAreJudgedOnlyAgainstExpectations(t *testing.T) {
	t.Parallel()
	p, authority := gpuProof(t, spdmtest.Config{PDI: 1})
	delete(p.flags, "expected-gpu")
	delete(p.flags, "rim-dir")
	args := p.arguments(authority)
	code, doc, _ := judged(t, args...)
	if i := slices.IndexFunc(doc.Checks, func(c verdictCheck) bool { return c.Name == "gpu-evidence" }); code != exitOK || len(doc.GPUs) != 0 ||
		doc.Checks[i].Status != snp.Skip || !strings.Contains(doc.Checks[i].Why, "NOT judged") {
		t.Errorf("exit %d, %+v, GPUs %v", code, doc.Checks[i], doc.GPUs)
	}
	if _, text, _ := run(t, args...); !strings.Contains(text, "- gpu-evidence ") || !strings.HasSuffix(text, ", 3 not made: the evidence holds\n") {
		t.Error(text)
	}
	none := newProof(t)
	none.flags["expected-gpu"], none.flags["allow-unmeasured-gpu"] = "H100", "true"
	if code, failed, _ := none.verify(); code != exitPrecondition || !slices.Equal(failed, []string{"gpu-evidence"}) {
		t.Errorf("a guest without: exit %d, failed %v", code, failed)
	}
	silent := newProofWith(t, &contract.GPU{Model: "H100", Count: 1})
	for _, flags := range []map[string]string{{}, {"expected-gpu": "H100", "allow-unmeasured-gpu": "true"}} {
		maps.Copy(silent.flags, flags)
		if code, failed, _ := silent.verify(); code != exitPrecondition || !slices.Equal(failed, []string{"gpu-evidence"}) {
			t.Errorf("a guest that hides them, %v: exit %d, failed %v", flags, code, failed)
		}
	}
}

func TestEachDemandOnGPUsHasItsFlag(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		flag, value string // an empty value leaves the flag out
		check       string // that fails, "" when all hold
	}{
		"another model of the chip": {"expected-gpu", "H200", ""},
		"with a count":              {"expected-gpu", "NVIDIA H100:1", ""},
		"another chip":              {"expected-gpu", "B200", "gpu-model"},
		"more":                      {"expected-gpu", "H100:8", "gpu-count"},
		"another device":            {"expected-pdi", "431d480fe5e87274", "gpu-allowed"},
		"no manifests":              {"rim-dir", "", "gpu-measurements"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, authority := gpuProof(t, spdmtest.Config{PDI: 1})
			if p.flags[c.flag] = c.value; c.value == "" {
				delete(p.flags, c.flag)
			}
			code, doc, stderr := judged(t, p.arguments(authority)...)
			if c.check == "" {
				if code != exitOK {
					t.Errorf("exit %d, failed %v, %s", code, failed(doc), stderr)
				}
				return
			}
			if code != exitPrecondition || !slices.Contains(failed(doc), c.check) {
				t.Errorf("exit %d, failed %v, %s", code, failed(doc), stderr)
			}
		})
	}
	p, authority := gpuProof(t, spdmtest.Config{PDI: 1, Mode: spdmtest.DevTools})
	if code, doc, _ := judged(t, p.arguments(authority)...); code != exitPrecondition || !slices.Equal(failed(doc), []string{"gpu-measurements"}) {
		t.Errorf("devtools: exit %d, failed %v", code, failed(doc))
	}
	delete(p.flags, "rim-dir")
	p.flags["allow-unmeasured-gpu"] = "true"
	code, doc, _ := judged(t, p.arguments(authority)...)
	if i := slices.IndexFunc(doc.Checks, func(c verdictCheck) bool { return c.Name == "gpu-measurements" }); code != exitOK || doc.Checks[i].Status != snp.Skip {
		t.Errorf("unmeasured: exit %d, %+v", code, doc.Checks)
	}
	// The root of the GPU was not accepted, only the processor's.
	if code, failed, _ := p.verify(); code != exitPrecondition || !slices.Equal(failed, []string{"gpu-root"}) {
		t.Errorf("no root: exit %d, failed %v", code, failed)
	}
}

func TestAWrongDemandOnGPUsIsAUsageErrorThatNamesIt(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		flag, value string
		code        int
	}{
		{"expected-gpu", "H100:2", exitUsage},
		{"expected-gpu", "H100:x", exitUsage},
		{"expected-gpu", "A100", exitUsage},
		{"expected-gpu", "", exitUsage},
		{"expected-pdi", "1", exitUsage},
		{"rim-dir", "none", exitNotFound},
	} {
		p, authority := gpuProof(t, spdmtest.Config{PDI: 1})
		p.flags[c.flag] = c.value
		if code, _, stderr := run(t, p.arguments(authority)...); code != c.code || (c.code == exitUsage && !strings.Contains(stderr, "--"+c.flag)) {
			t.Errorf("--%s %q: exit %d, %q", c.flag, c.value, code, stderr)
		}
	}
	p, authority := gpuProof(t, spdmtest.Config{PDI: 1})
	p.put("rims/README", []byte("notes"))
	if code, _, stderr := run(t, p.arguments(authority)...); code != exitUsage || !strings.Contains(stderr, "--rim-dir") || !strings.Contains(stderr, "README") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	delete(p.flags, "expected-gpu")
	if code, _, stderr := run(t, p.arguments(authority)...); code != exitUsage || !strings.Contains(stderr, "--rim-dir needs --expected-gpu") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}
