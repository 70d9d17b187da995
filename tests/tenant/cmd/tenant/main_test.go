package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/confidential-node/agent/tests/tenant"
)

// call runs one command line in a folder with a minimal profile.
func call(t *testing.T, dir, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	profile := filepath.Join(dir, "tenant.toml")
	if err := os.WriteFile(profile, []byte("state_dir = \"state\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	code = run(t.Context(), append([]string{"--profile", profile}, args...), strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// published is the platform's example, flag by flag.
func published(gpu, count, keyManagement string) []string {
	return []string{
		"deploy", "confidential", "--name", "llm", "--image", "registry.example/llm:1", "--gpu", gpu, "--count", count,
		"--confidential", "--dataset", "s3://data/records.csv", "--model", "encrypted://models/llm.age",
		"--encryption-key", "file://key", "--key-management", keyManagement, "--port", "8000", "--compliance", "hipaa",
		"--attestation-required", "--audit-logging",
	}
}

func TestPublishedExamplesParseAndEndInTheirAnswer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"four H100", published("H100", "4", "file"), tenant.ExitPrecondition, "gpu."},
		{"A100", published("A100", "1", "file"), tenant.ExitPrecondition, "gpu."},
		{"hsm", published("H100", "1", "hsm"), tenant.ExitPrecondition, "tenant.key-management-unsupported"},
		{"one H100, empty profile", published("H100", "1", "file"), tenant.ExitUsage, "the profile lacks"},
		{"not confidential", append(published("H100", "1", "file"), "--confidential=false"), tenant.ExitPrecondition, "tenant.confidential-mandatory"},
		{"no attestation", append(published("H100", "1", "file"), "--attestation-required=false"), tenant.ExitPrecondition, "tenant.attestation-mandatory"},
		{"attest nobody", []string{"confidential", "attest", "nobody"}, tenant.ExitUsage, "control_plane"},
		{"verify nothing", []string{"confidential", "verify", "nobody", "--expected-image", "x", "--expected-gpu", "H100"}, tenant.ExitNotFound, "tenant.not-found"},
		{"bad floor", append(published("H100", "1", "file"), "--floor", "19:snp"), tenant.ExitUsage, "floors: "},
		{"ID key without block", append(published("H100", "1", "file"), "--id-key-digest", strings.Repeat("0d", 48)), tenant.ExitUsage, "--id-block"},
		{"unknown flag", []string{"deploy", "confidential", "--nonsense"}, tenant.ExitUsage, "nonsense"},
		{"unknown verb", []string{"dance"}, tenant.ExitUsage, "dance"},
		{"unknown output", []string{"status", "-o", "xml"}, tenant.ExitUsage, "xml"},
		{"missing argument", []string{"results"}, tenant.ExitUsage, "results"},
	} {
		code, _, stderr := call(t, t.TempDir(), "", c.args...)
		if code != c.code || !strings.Contains(stderr, c.says) || !strings.Contains(stderr, "remedy:") {
			t.Errorf("%s: exit %d, %s", c.name, code, stderr)
		}
	}
}

func TestVerbsWithoutProfileSayWhichFileIsMissing(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{"--profile", filepath.Join(t.TempDir(), "none.toml"), "status"}, nil, &out, &errs)
	if code != tenant.ExitNotFound || !strings.Contains(errs.String(), "none.toml") {
		t.Fatal(code, errs.String())
	}
}

func TestHelpExplainsEveryMarkOfAVerdict(t *testing.T) {
	t.Parallel()
	code, help, _ := call(t, t.TempDir(), "", "confidential", "verify", "--help")
	for _, mark := range []string{"✓", "✗", "-", "!"} {
		if code != 0 || !strings.Contains(help, "\n  "+mark+"  ") {
			t.Errorf("exit %d, no line for %q in\n%s", code, mark, help)
		}
	}
}

func TestKeygenAndSealMakeWhatAgeOpens(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	key, sealed := filepath.Join(dir, "key"), filepath.Join(dir, "x.age")
	code, recipient, stderr := call(t, dir, "", "keygen", key)
	if code != 0 || !strings.HasPrefix(recipient, "age1") {
		t.Fatal(code, recipient, stderr)
	}
	if code, _, stderr := call(t, dir, "", "keygen", key); code != tenant.ExitConflict {
		t.Fatal(code, stderr)
	}
	code, stdout, stderr := call(t, dir, "hello", "seal", "-", "--encryption-key", "file://"+key, "--out", sealed, "-o", "json")
	var doc struct {
		Kind string `json:"kind"`
		Data struct {
			SHA256 string `json:"sha256"`
		} `json:"data"`
	}
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil || code != 0 || doc.Kind != "Sealed" || len(doc.Data.SHA256) != 64 {
		t.Fatal(code, stdout, stderr, err)
	}
	raw, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(stdout+stderr, strings.TrimSpace(string(raw))) {
		t.Fatal("a key was printed")
	}
	ids, err := age.ParseIdentities(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(sealed)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // only read from
	if _, err := age.Decrypt(f, ids...); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := call(t, dir, "hello", "seal", "-", "--encryption-key", "file://"+key, "--out", sealed); code == 0 {
		t.Fatal("an existing file was overwritten")
	}
}

func TestGarbageEvidenceExitsWithFive(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "evidence.json")
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, stdout, _ := call(t, dir, "", "confidential", "verify", file)
	if code != tenant.ExitPrecondition || !strings.Contains(stdout, "✗ bundle") || !strings.Contains(stdout, "does NOT hold") {
		t.Fatal(code, stdout)
	}
	code, stdout, _ = call(t, dir, "", "confidential", "verify", file, "-o", "json")
	if code != tenant.ExitPrecondition || !strings.Contains(stdout, `"ok":false`) {
		t.Fatal(code, stdout)
	}
}
