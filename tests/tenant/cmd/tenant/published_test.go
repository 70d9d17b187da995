package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/tenant"
)

const (
	records = "canary: the records"
	weights = "canary: the weights"
)

// sealedModel makes the key and the objects that the published example names.
func (p *platform) sealedModel() (key string) {
	p.t.Helper()
	key = filepath.Join(p.dir, "K")
	p.must("keygen", key)
	model := p.file("llm", []byte(weights))
	p.must("seal", model, "--encryption-key", "file://"+key)
	p.must("upload", model+".age", "--to", "models/llm.age")
	if err := p.objects.Replace("data", "records.csv", []byte(records)); err != nil {
		p.t.Fatal(err)
	}
	return key
}

// deployLine is the platform's published example; later flags win.
func (p *platform) deployLine(name, key string, more ...string) []string {
	return append([]string{
		"deploy", "confidential", "--name", name, "--image", p.image, "--confidential", "--dataset", "s3://data/records.csv",
		"--model", "encrypted://models/llm.age", "--encryption-key", "file://" + key, "--key-management", "file", "--port", "8000",
		"--attestation-required",
	}, more...)
}

func TestThePublishedLinesRunOnAPlatform(t *testing.T) {
	t.Parallel()
	p := newPlatform(t)
	key := p.sealedModel()
	digest := digestOf(t, p.must(p.deployLine("llm", key, "--node", nodeName, "--result", "report.json")...))
	objects, err := p.objects.Objects()
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range objects {
		if name != "data/records.csv" && (strings.Contains(string(data), records) || strings.Contains(string(data), weights)) {
			t.Errorf("plaintext in the store: %s", name)
		}
	}
	evidence := filepath.Join(p.dir, "evidence.json")
	out := p.must("confidential", "attest", "llm", "--out", evidence)
	if !strings.Contains(out, "✓ launch-digest") || !strings.Contains(out, "✓ own-manifest") || !strings.Contains(out, "the evidence holds") {
		t.Errorf("attest prints\n%s", out)
	}
	for _, what := range []string{"llm", evidence} {
		p.must("confidential", "verify", what, "--expected-image", p.image, "--expected-digest", digest, "--min-tcb", "snp=27,microcode=86")
	}
	for flag, value := range map[string]string{
		"--expected-image":  strings.Split(p.image, ":")[0] + ":1/x@sha256:" + strings.Repeat("0", 64),
		"--expected-digest": strings.Repeat("0", 96), "--expected-gpu": "H100", "--min-tcb": "snp=28", "--nonce": strings.Repeat("0", 32),
		"--floor": "19/10-1f:snp=28", "--require-platform": "ecc", "--exclude-product": "genoa", "--id-key-digest": strings.Repeat("0d", 48),
		"--author-key-digest": strings.Repeat("0d", 48), "--min-guest-svn": "1", "--forbid-smt": "--forbid-smt", "--require-crl": "--require-crl",
	} {
		args := []string{"confidential", "verify", "llm", flag, value}
		if strings.HasPrefix(value, flag) { // a flag without a value
			args = args[:4]
		}
		code, out, errs := p.tenant(args...)
		if code != tenant.ExitPrecondition || !strings.Contains(out, "✗ ") || !strings.Contains(out, "the evidence does NOT hold") || errs != "" {
			t.Errorf("verify %s %s: exit %d\n%s%s", flag, value, code, out, errs)
		}
	}
	if out := p.must("confidential", "verify", "llm", "--explain"); strings.Count(out, "against: ") < 20 {
		t.Errorf("verify --explain prints\n%s", out)
	}
	if out := p.must("confidential", "verify", "llm", "--explain", "-o", "json"); strings.Count(out, `"protects_from":"`) < 20 {
		t.Errorf("verify --explain -o json prints\n%s", out)
	}
	if out := p.must("confidential", "verify", "llm"); strings.Contains(out, "against: ") {
		t.Errorf("verify explains without being asked\n%s", out)
	}
	if out := p.must("wait", "llm"); !strings.Contains(out, "exit code 0") {
		t.Errorf("wait prints %q", out)
	}
	results := filepath.Join(p.dir, "results")
	p.must("results", "llm", "--out", results)
	if got, err := os.ReadFile(filepath.Join(results, "report.json")); err != nil || string(got) != "result report.json" {
		t.Errorf("result %q, %v", got, err)
	}
	if out := p.must("status", "llm"); !strings.Contains(out, "(asked for "+p.image+")") || !strings.Contains(out, "finished") || !strings.Contains(out, "1 of 1 releases") {
		t.Errorf("status prints\n%s", out)
	}
	if out := p.must("rotate-key", "llm", "--key-out", filepath.Join(p.dir, "K2")); strings.Count(out, "=encrypted://sealed/") != 2 {
		t.Errorf("rotate-key prints\n%s", out)
	}
}

// Evidence of a job with a GPU cannot hold before somebody judges the GPU's.
func TestAGPUThatNobodyAttestsDoesNotHold(t *testing.T) {
	t.Parallel()
	p := newPlatform(t)
	code, _, errs := p.tenant(p.deployLine("llm", p.sealedModel(), "--node", nodeName, "--gpu", "H100", "--count", "1")...)
	if code != tenant.ExitPrecondition || !strings.Contains(errs, "broker.gpu-evidence-missing") {
		t.Errorf("deploy: exit %d, %s", code, errs)
	}
	code, _, errs = p.tenant("confidential", "verify", "llm", "--expected-image", p.image, "--expected-gpu", "H100")
	if code != tenant.ExitPrecondition || !strings.Contains(errs, "tenant.evidence-missing") {
		t.Errorf("verify: exit %d, %s", code, errs)
	}
}

// From the command line to the keys: the guest's own client sends what its GPU
// says, the broker and the tenant judge it, and the tenant reads which it was.
func TestARentedGPUIsAttestedOnTheWay(t *testing.T) {
	t.Parallel()
	p := newPlatform(t)
	p.gpus = []*spdmtest.GPU{p.gpu(spdmtest.Config{PDI: 0x431d480fe5e87274})}
	key := p.sealedModel()
	p.must(p.deployLine("llm", key, "--node", nodeName, "--gpu", "H100", "--gpu-pdi", "431d480fe5e87274")...)
	out := p.must("confidential", "attest", "llm")
	for _, want := range []string{"GPU EMULATED GH100, PDI 0x431d480fe5e87274", "✓ gpu-measurements", "✓ gpu-allowed", "✓ gpu-demand", "! gpu-binding"} {
		if !strings.Contains(out, want) {
			t.Errorf("attest prints no %q:\n%s", want, out)
		}
	}
	if out := p.must("status", "llm"); !strings.Contains(out, "with GPU GH100, PDI 0x431d480fe5e87274, mode on") {
		t.Errorf("status prints\n%s", out)
	}
	p.gpus = []*spdmtest.GPU{p.gpu(spdmtest.Config{PDI: 0x431d480fe5e87274, Mode: spdmtest.DevTools})}
	code, _, errs := p.tenant(p.deployLine("debugged", key, "--node", nodeName, "--gpu", "H100")...)
	if code != tenant.ExitPrecondition || !strings.Contains(errs, "broker.gpu-measurements") {
		t.Errorf("devtools: exit %d, %s", code, errs)
	}
}

// What the broker refuses to a guest, the guest reports and the tenant sees.
func TestTheBrokersReasonReachesTheTenant(t *testing.T) {
	t.Parallel()
	p := newPlatform(t)
	key := p.sealedModel()
	p.must(p.deployLine("llm", key, "--node", nodeName)...)
	p.mu.Lock()
	for _, g := range p.guests {
		if err := boot(t.Context(), g.Guest); err == nil || !strings.Contains(err.Error(), "broker.release-exhausted") {
			t.Errorf("a second boot of the same launch: %v", err)
		}
	}
	p.firmware = make([]byte, 48)
	p.mu.Unlock()
	if out := p.must("status", "llm"); !strings.Contains(out, "1 of 1 releases, 1 refusals") || !strings.Contains(out, "broker.release-exhausted: ") ||
		!strings.Contains(out, "    remedy: deploy again") {
		t.Errorf("status prints\n%s", out)
	}
	code, _, errs := p.tenant(p.deployLine("swapped", key, "--node", nodeName)...)
	if code != tenant.ExitPrecondition || strings.Count(errs, "tenant: refused: ") != 2 || !strings.Contains(errs, "code:   guest.broker-refused") ||
		!strings.Contains(errs, "code:   broker.launch-digest") || !strings.Contains(errs, "boot exactly the firmware") {
		t.Errorf("another firmware: exit %d\n%s", code, errs)
	}
	if out := p.must("status", "swapped"); !strings.Contains(out, "0 of 1 releases") {
		t.Errorf("status prints\n%s", out)
	}
}

func TestWhatIsForbiddenEndsInItsRefusalWithARemedy(t *testing.T) {
	t.Parallel()
	p := newPlatform(t)
	key := p.sealedModel()
	gpg := p.file("model.gpg", []byte("-----BEGIN PGP MESSAGE-----\n"))
	if err := p.objects.Replace("models", "llm.gpg", []byte("\x85\x01\x0c\x03 a session key")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		more         []string
		code, remedy string
	}{
		{[]string{"--gpu", "A100"}, "gpu.unsupported-model", "ask for H100"},
		{[]string{"--gpu", "H100", "--count", "4"}, "gpu.unsupported-count", "ask for 1, or for 8 under PPCIe"},
		{[]string{"--gpu", "V100"}, "gpu.unknown-model", "ask for H100"},
		{[]string{"--compliance", "hipaa"}, api.CodeFeatureUnknown, ""},
		{[]string{"--compliance", "hipaa", "--audit-logging"}, api.CodeFeatureUnknown, ""},
		{[]string{"--key-management", "hsm"}, "tenant.key-management-unsupported", "--key-management file"},
		{[]string{"--confidential=false"}, "tenant.confidential-mandatory", "--confidential"},
		{[]string{"--attestation-required=false"}, "tenant.attestation-mandatory", "--attestation-required"},
		{[]string{"--model", "encrypted://models/llm.gpg"}, "tenant.format-gpg", "gpg --decrypt"},
		{[]string{"--dataset", "file://" + gpg}, "tenant.format-gpg", "tenant seal"},
		{[]string{"--dataset", "x=encrypted://data/records.csv"}, "tenant.not-sealed", "tenant seal"},
		{[]string{"--dataset", "x=s3://models/llm.age"}, "tenant.already-sealed", "encrypted://"},
		{[]string{"--image", "docker.io/library/app:1"}, "tenant.registry-mismatch", "registry.url"},
	} {
		code, out, errs := p.tenant(p.deployLine("job", key, append([]string{"--node", nodeName}, c.more...)...)...)
		if code != tenant.ExitPrecondition || out != "" || !strings.Contains(errs, "tenant: refused: ") ||
			!strings.Contains(errs, "\n  code:   "+c.code+"\n") || !strings.Contains(errs, "\n  remedy: ") || !strings.Contains(errs, c.remedy) {
			t.Errorf("%v: exit %d\n%s%s", c.more, code, out, errs)
		}
		if code, _, errs := p.tenant("status", "job"); code != tenant.ExitNotFound {
			t.Errorf("%v left a deployment behind: exit %d, %s", c.more, code, errs)
		}
	}
	launches, err := os.ReadDir(filepath.Join(p.dir, "broker", "launches"))
	if err != nil || len(launches) != 0 {
		t.Errorf("the broker holds %d launches, %v", len(launches), err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.guests) != 0 {
		t.Errorf("%d guests were started", len(p.guests))
	}
}

func TestAWrongSecretAndASilentServiceAreTold(t *testing.T) {
	t.Parallel()
	p := newPlatform(t)
	key := p.sealedModel()
	p.file("store-secret", []byte("another"))
	if code, _, errs := p.tenant(p.deployLine("job", key)...); code != tenant.ExitPrecondition ||
		!strings.Contains(errs, "data/records.csv: the object store denies access") || !strings.Contains(errs, "secret_key_file") {
		t.Errorf("wrong secret: exit %d, %s", code, errs)
	}
	p.file("store-secret", []byte(storeSecret))
	pinned, err := os.ReadFile(filepath.Join(p.dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	p.file("ca.pem", p.controlCA)
	if code, _, errs := p.tenant(p.deployLine("job", key)...); code != tenant.ExitUnreachable || !strings.Contains(errs, "certificate") || !strings.Contains(errs, "its url and ca_file") {
		t.Errorf("another CA: exit %d, %s", code, errs)
	}
	p.file("ca.pem", pinned)
	p.storeWeb.Close()
	if code, _, errs := p.tenant(p.deployLine("job", key)...); code != tenant.ExitUnreachable || !strings.Contains(errs, "its url and ca_file") {
		t.Errorf("no store: exit %d, %s", code, errs)
	}
}
