package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/nodeagent/endorsements"
	"github.com/confidential-node/agent/tests/skip"
)

// realBundle is what `endorsements export` would have written on a machine
// that fetched the certificates of a published Turin report.
func realBundle(t *testing.T) string {
	t.Helper()
	read := func(file string) []byte {
		data, err := os.ReadFile(filepath.Join("..", "..", "shared", "data", "snp-reports", "turin."+file))
		if err != nil {
			skip.Missing(t, "real SEV-SNP reports in ../shared/data")
		}
		if block, _ := pem.Decode(data); block != nil {
			return block.Bytes
		}
		return data
	}
	report, err := snp.ParseReport(read("report.bin"))
	if err != nil {
		t.Fatal(err)
	}
	type entry struct {
		Name   string `json:"name"`
		SHA256 string `json:"sha256"`
		Data   []byte `json:"data"`
	}
	var entries []entry
	for name, data := range map[string][]byte{
		"Turin/ark.der": read("ark.pem"), "Turin/vcek/ask.der": read("ask.pem"),
		fmt.Sprintf("Turin/vcek/%x/%016x.der", report.ChipID[:8], report.ReportedTCB): read("vcek.pem"),
	} {
		sum := sha256.Sum256(data)
		entries = append(entries, entry{name, hex.EncodeToString(sum[:]), data})
	}
	raw, err := json.Marshal(map[string]any{"version": 1, "created_at": time.Now().UTC(), "documents": entries})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "bundle.json")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRealCertificatesGoThroughImportStatusAndExport(t *testing.T) {
	t.Parallel()
	bundle, dir := realBundle(t), t.TempDir()
	verb := func(args ...string) string {
		t.Helper()
		code, out, stderr := run(t, append([]string{"endorsements", "--state-dir", dir}, args...)...)
		if code != exitOK {
			t.Fatalf("%v: exit %d, %s", args, code, stderr)
		}
		return out
	}
	imported := verb("import", bundle, "-o", "json")
	matchesSchema(t, imported)
	if strings.Count(imported, `"imported"`) != 3 {
		t.Errorf("imported %s", imported)
	}
	status := verb("status", "-o", "json")
	matchesSchema(t, status)
	if strings.Contains(status, "problem") || !strings.Contains(status, "Turin/vcek/59790fb1c39f35c1/5100000004010101.der") {
		t.Errorf("status %s", status)
	}
	if table := verb("status"); !strings.Contains(table, "fmc=1 boot-loader=1 tee=1 snp=4 microcode=81") || !strings.Contains(table, "2033-02-05") {
		t.Errorf("table:\n%s", table)
	}
	file := filepath.Join(t.TempDir(), "again.json")
	matchesSchema(t, verb("export", file, "-o", "json"))
	if table := verb("import", file); strings.Count(table, "kept") != 3 {
		t.Errorf("what was exported is not what was imported:\n%s", table)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, bytes.Replace(data, []byte(`"data": "MII`), []byte(`"data": "MIJ`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := run(t, "endorsements", "--state-dir", t.TempDir(), "import", file); code != exitPrecondition || !strings.Contains(stderr, "does not have its digest") || !strings.Contains(stderr, "what to do") {
		t.Errorf("a changed bundle: exit %d, %s", code, stderr)
	}
}

func TestEndorsementVerbsRefuseMistakesBeforeAnythingIsAsked(t *testing.T) {
	t.Parallel()
	dir, chip := t.TempDir(), strings.Repeat("c1", 64)
	full := "boot-loader=1,tee=0,snp=27,microcode=86"
	emulated := filepath.Join(dir, "agent.toml")
	text := fmt.Sprintf("host_id = \"h\"\ntee = \"emulated\"\nstate_dir = %q\n[emulated]\npsp_socket = \"/run/psp.sock\"\n[control]\nservers = [\"tls://c:1\"]\nca_file = \"/ca\"\ncreds_file = \"/creds\"\nissuer_keys = [\"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\"]\n", dir)
	if err := os.WriteFile(emulated, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"half a chip":       {[]string{"fetch", "--product", "Genoa", "--tcb", full}, exitUsage, "belong together"},
		"unknown product":   {[]string{"fetch", "--product", "Siena", "--chip-id", chip, "--tcb", full}, exitUsage, "Milan, Genoa and Turin"},
		"half a TCB":        {[]string{"fetch", "--product", "Genoa", "--chip-id", chip, "--tcb", "snp=27"}, exitUsage, "--tcb lacks boot-loader"},
		"Turin without FMC": {[]string{"fetch", "--product", "Turin", "--chip-id", chip[:16], "--tcb", full}, exitUsage, "--tcb lacks fmc"},
		"Genoa with FMC":    {[]string{"fetch", "--product", "Genoa", "--chip-id", chip, "--tcb", full + ",fmc=1"}, exitUsage, "no FMC"},
		"short chip id":     {[]string{"fetch", "--product", "Genoa", "--chip-id", "c1", "--tcb", full}, exitUsage, "64 bytes"},
		"masked chip id":    {[]string{"fetch", "--product", "Genoa", "--chip-id", strings.Repeat("0", 128), "--tcb", full}, exitUsage, "MASK_CHIP_ID"},
		"chip id not hex":   {[]string{"fetch", "--product", "Genoa", "--chip-id", "x", "--tcb", full}, exitUsage, "not hex"},
		"emulated platform": {[]string{"fetch", "--state-dir", "", "--config", emulated}, exitPrecondition, "--product, --chip-id and --tcb"},
		"import nothing":    {[]string{"import"}, exitUsage, "either one FILE"},
		"VLEK alone":        {[]string{"import", "--vlek", "x"}, exitUsage, "either one FILE"},
		"no such bundle":    {[]string{"import", filepath.Join(dir, "none")}, exitNotFound, "none"},
		"no such VLEK":      {[]string{"import", "--vlek", filepath.Join(dir, "none"), "--chain", filepath.Join(dir, "none")}, exitNotFound, "none"},
		"export nowhere":    {[]string{"export"}, exitUsage, "takes 1 argument"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, _, stderr := run(t, append([]string{"endorsements", "--state-dir", dir}, c.args...)...)
			if code != c.code || !strings.Contains(stderr, c.want) {
				t.Errorf("exit %d, want %d; stderr %q, want it to contain %q", code, c.code, stderr, c.want)
			}
		})
	}
	if code, _, stderr := run(t, "endorsements", "--config", filepath.Join(dir, "none.toml"), "status"); code != exitNotFound || !strings.Contains(stderr, "none.toml") {
		t.Errorf("no configuration: exit %d, %s", code, stderr)
	}
}

func TestEveryRefusalOfTheKeyServiceHasItsExitCode(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]int{
		"endorsements.unknown-chip": exitNotFound, "endorsements.rate-limited": exitConflict,
		"endorsements.unreachable": exitFailed, "endorsements.wrong-certificate": exitPrecondition,
	} {
		exit, ok := errors.AsType[*exitError](endorsementExit(contract.Refuse(code, "r", "m")))
		if !ok || exit.code != want {
			t.Errorf("%s ends in %+v, want %d", code, exit, want)
		}
	}
	if endorsementExit(nil) != nil {
		t.Error("success is a failure")
	}
}

func TestFindingsArePrintedWithTheirRemedy(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	var out bytes.Buffer
	err := printEndorsements(&out, endorsements.Status{
		KeyService: "https://kdsintf.amd.com", MayAskAt: now.Add(7 * time.Second), Source: "cache",
		Platform:  &endorsements.PlatformStatus{Product: "Genoa", ChipID: "c1c1", TCB: contract.TCB{SNP: 27}},
		Documents: []endorsements.Document{{Name: "Genoa/vcek/crl.der", NotAfter: now.Add(-time.Hour), Stale: true}},
		Findings:  []*contract.Refusal{contract.Refuse("endorsements.stale-crl", "import a newer one", "the list is old")},
	}, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"may be asked in 7s", "Genoa c1c1", "snp=27", "stale, not served", "endorsements.stale-crl: the list is old; import a newer one"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}
