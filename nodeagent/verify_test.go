package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
	"github.com/confidential-node/agent/tests/attester"
	"github.com/confidential-node/agent/tests/skip"
)

// proof is a folder with a guest's evidence, and the command line under which
// it holds, flag by flag.
type proof struct {
	t        *testing.T
	dir      string
	file     string
	evidence *contract.Evidence
	flags    map[string]string
}

func newProof(t *testing.T) *proof {
	t.Helper()
	return newProofWith(t, nil)
}

// newProofWith is the evidence of a guest whose manifest demands GPUs.
func newProofWith(t *testing.T, demand *contract.GPU, gpus ...*spdmtest.GPU) *proof {
	t.Helper()
	image := "registry.example/app@sha256:" + strings.Repeat("ab", 32)
	manifest, err := (&contract.Manifest{
		Version: contract.ManifestVersion, LaunchID: strings.Repeat("0a", 16), Image: image, GPU: demand,
		Broker:   contract.Endpoint{URL: "https://broker.example", SPKISHA256: strings.Repeat("cd", 32)},
		Registry: contract.Endpoint{URL: "https://registry.example", SPKISHA256: strings.Repeat("cd", 32)},
	}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	chip, err := attester.NewChip(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	digest := bytes.Repeat([]byte{0x5a}, 48)
	guest, err := attester.New(chip, manifest, digest)
	if err != nil {
		t.Fatal(err)
	}
	guest.GPUs = gpus
	nonce := bytes.Repeat([]byte{9}, 32)
	p := &proof{t: t, dir: t.TempDir()}
	if p.evidence, err = guest.Evidence(nonce); err != nil {
		t.Fatal(err)
	}
	p.write()
	p.flags = map[string]string{
		"expected-image": image, "expected-digest": hex.EncodeToString(digest), "nonce": hex.EncodeToString(nonce),
		"min-tcb": attester.TCB().String(), "allow-development-image": "true",
		"allow-emulated-root": p.put("root.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: chip.ARK})),
	}
	return p
}

func (p *proof) put(name string, data []byte) string {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		p.t.Fatal(err)
	}
	return path
}

func (p *proof) write() {
	p.t.Helper()
	raw, err := json.Marshal(p.evidence)
	if err != nil {
		p.t.Fatal(err)
	}
	p.file = p.put("evidence.json", raw)
}

// verify runs the command line and returns the names of the failed checks.
func (p *proof) verify() (code int, failed []string, stderr string) {
	p.t.Helper()
	args := []string{"verify", p.file, "-o", "json"}
	for name, value := range p.flags {
		args = append(args, "--"+name+"="+value)
	}
	code, out, stderr := run(p.t, args...)
	if out == "" {
		return code, nil, stderr
	}
	matchesSchema(p.t, out)
	var doc verdict
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		p.t.Fatal(err)
	}
	for _, c := range doc.Checks {
		if c.Why == "" {
			p.t.Errorf("check %s says no reason", c.Name)
		}
		if c.Status == snp.Fail {
			failed = append(failed, c.Name)
		}
	}
	if doc.OK != (len(failed) == 0) {
		p.t.Errorf("ok is %v with failed checks %v", doc.OK, failed)
	}
	return code, failed, stderr
}

func TestGenuineEvidenceExitsWithZeroOneLinePerCheck(t *testing.T) {
	t.Parallel()
	p := newProof(t)
	if code, failed, stderr := p.verify(); code != exitOK || len(failed) != 0 || stderr != "" {
		t.Fatalf("exit %d, failed %v, stderr %q", code, failed, stderr)
	}
	args := []string{"verify", p.file}
	for name, value := range p.flags {
		args = append(args, "--"+name+"="+value)
	}
	code, out, _ := run(t, args...)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if !strings.HasPrefix(lines[0], "signed by EMULATED Genoa (Zen 4, product line Genoa), VCEK of chip 0707") || !strings.Contains(lines[1], attester.TCB().String()) {
		t.Errorf("does not say who signed: %q", lines[:2])
	}
	check := regexp.MustCompile(`^(✓|-|!) [a-z-]+ +\S.*$`)
	for _, line := range lines[2 : len(lines)-1] {
		if !check.MatchString(line) {
			t.Errorf("not a check with its reason: %q", line)
		}
	}
	if last := lines[len(lines)-1]; code != exitOK || !strings.HasSuffix(last, "2 not made: the evidence holds") {
		t.Errorf("exit %d, %q", code, last)
	}
}

func TestEachFlagDecidesItsOwnCheck(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		flag, value string // an empty value leaves the flag out
		check       string
	}{
		"another image":            {"expected-image", "registry.example/app@sha256:" + strings.Repeat("00", 32), "workload-image"},
		"another digest":           {"expected-digest", strings.Repeat("00", 48), "launch-digest"},
		"another nonce":            {"nonce", strings.Repeat("00", 32), "nonce"},
		"a higher floor":           {"min-tcb", "microcode=87", "tcb-floor"},
		"emulated root":            {"allow-emulated-root", "", "root"},
		"image without a defence":  {"allow-development-image", "", "aml-defence"},
		"one of several digests":   {"expected-digest", strings.Repeat("00", 48) + "," + strings.Repeat("5a", 48), ""},
		"no floor":                 {"min-tcb", "", ""},
		"a floor of one component": {"min-tcb", "snp=27", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProof(t)
			if p.flags[c.flag] = c.value; c.value == "" {
				delete(p.flags, c.flag)
			}
			code, failed, stderr := p.verify()
			want := exitPrecondition
			if c.check == "" {
				want = exitOK
			}
			if code != want || stderr != "" || (c.check != "" && !slices.Contains(failed, c.check)) {
				t.Errorf("exit %d, failed %v, stderr %q", code, failed, stderr)
			}
		})
	}
}

func TestAWrongFlagIsAUsageErrorThatNamesIt(t *testing.T) {
	t.Parallel()
	for flag, value := range map[string]string{
		"expected-image": "registry.example/app:1", "expected-digest": "5a", "nonce": "xyz", "min-tcb": "svn=1",
	} {
		p := newProof(t)
		p.flags[flag] = value
		if code, _, stderr := p.verify(); code != exitUsage || !strings.Contains(stderr, "--"+flag) {
			t.Errorf("--%s %s: exit %d, %q", flag, value, code, stderr)
		}
	}
	p := newProof(t)
	for flag, content := range map[string]string{"allow-emulated-root": "no certificate", "image": "{}"} {
		p.flags[flag] = p.put(flag, []byte(content))
		if code, _, stderr := p.verify(); code != exitUsage || !strings.Contains(stderr, "--"+flag) {
			t.Errorf("--%s: exit %d, %q", flag, code, stderr)
		}
		p.flags[flag] = filepath.Join(p.dir, "none")
		if code, _, stderr := p.verify(); code != exitNotFound || !strings.Contains(stderr, "none") {
			t.Errorf("--%s without its file: exit %d, %q", flag, code, stderr)
		}
		delete(p.flags, flag)
	}
}

func TestATrustedImageDescriptionReplacesThePermission(t *testing.T) {
	t.Parallel()
	p := newProof(t)
	file := func(name, fill string) contract.ImageFile {
		return contract.ImageFile{File: name, SHA256: strings.Repeat(fill, 32), Size: 1}
	}
	image := contract.ImageDescription{
		Version: contract.ImageVersion, Name: "guest", Variant: contract.VariantProduction, AMLDefence: true,
		Firmware: file("fw", "01"), Kernel: file("k", "02"), Initrd: file("i", "03"), Cmdline: "quiet",
	}
	p.evidence.Boot = contract.BootComponents{
		FirmwareSHA256: image.Firmware.SHA256, KernelSHA256: image.Kernel.SHA256, InitrdSHA256: image.Initrd.SHA256, Cmdline: image.Cmdline,
	}
	p.write()
	describe := func() {
		raw, err := json.Marshal(image)
		if err != nil {
			t.Fatal(err)
		}
		p.flags["image"] = p.put("image.json", raw)
	}
	delete(p.flags, "allow-development-image")
	describe()
	if code, failed, _ := p.verify(); code != exitOK {
		t.Errorf("an image with a defence: exit %d, failed %v", code, failed)
	}
	image.AMLDefence = false
	describe()
	if code, failed, _ := p.verify(); code != exitPrecondition || !slices.Equal(failed, []string{"aml-defence"}) {
		t.Errorf("an image without: exit %d, failed %v", code, failed)
	}
}

// A report captured from hardware needs no flag for its root. It was made for
// another manifest and nonce, so the verdict is still no.
func TestAMDsRootsAreTheDefault(t *testing.T) {
	t.Parallel()
	p := newProof(t)
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join("..", "..", "shared", "data", "snp-reports", name))
		if err != nil {
			skip.Missing(t, "real SEV-SNP reports in ../shared/data")
		}
		if block, _ := pem.Decode(data); block != nil {
			return block.Bytes
		}
		return data
	}
	delete(p.flags, "allow-emulated-root")
	p.evidence.Report = read("genoa.report.bin")
	p.evidence.Endorsements = contract.Endorsements{VCEK: read("genoa.vcek.pem"), ASK: read("genoa.ask.pem"), ARK: read("genoa.ark.pem")}
	p.write()
	code, failed, _ := p.verify()
	for _, name := range []string{"root", "chain", "signature", "chip-id", "tcb-binding"} {
		if slices.Contains(failed, name) {
			t.Errorf("%s fails for real silicon", name)
		}
	}
	if code != exitPrecondition || !slices.Contains(failed, "host-data") || !slices.Contains(failed, "report-data") {
		t.Errorf("exit %d, failed %v", code, failed)
	}
}
