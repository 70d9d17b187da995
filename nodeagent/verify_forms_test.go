package main

import (
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/proto/sevsnp"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/tests/skip"
)

// silicon is a folder with a report captured from hardware, its certificates
// in one PEM file each, and the command line under which it holds.
func silicon(t *testing.T, product string) (report *snp.Report, args []string) {
	t.Helper()
	dir := filepath.Join("..", "..", "shared", "data", "snp-reports")
	file := filepath.Join(dir, product+".report.bin")
	raw, err := os.ReadFile(file)
	if err != nil {
		skip.Missing(t, "real SEV-SNP reports in ../shared/data")
	}
	if report, err = snp.ParseReport(raw); err != nil {
		t.Fatal(err)
	}
	args = []string{
		"verify", file, "--expected-digest", hex.EncodeToString(report.Measurement[:]),
		"--report-data", hex.EncodeToString(report.ReportData[:]), "--host-data", hex.EncodeToString(report.HostData[:]),
	}
	for _, cert := range []string{"ark", "vcek", "ask"} { // any order
		args = append(args, "--certs", filepath.Join(dir, product+"."+cert+".pem"))
	}
	return report, args
}

// judged runs a verification and returns its document.
func judged(t *testing.T, args ...string) (code int, doc verdict, stderr string) {
	t.Helper()
	code, out, stderr := run(t, append(args, "-o", "json")...)
	if out != "" {
		matchesSchema(t, out)
		if err := json.Unmarshal([]byte(out), &doc); err != nil {
			t.Fatal(err)
		}
	}
	return code, doc, stderr
}

func failed(doc verdict) (names []string) {
	for _, c := range doc.Checks {
		if c.Status == snp.Fail {
			names = append(names, c.Name)
		}
	}
	return names
}

func TestARawReportHoldsWithItsCertificates(t *testing.T) {
	t.Parallel()
	for _, product := range []string{"genoa", "turin"} {
		_, args := silicon(t, product)
		code, doc, stderr := judged(t, args...)
		if code != exitOK || !doc.OK || doc.Signer == nil || !strings.EqualFold(doc.Signer.Product, product) || len(doc.Warnings) == 0 {
			t.Errorf("%s: exit %d, failed %v, %+v, stderr %q", product, code, failed(doc), doc.Signer, stderr)
		}
		code, doc, _ = judged(t, args[:len(args)-2]...) // without the ASK
		if code != exitPrecondition || !slices.Equal(failed(doc), []string{"chain"}) || doc.Signer != nil {
			t.Errorf("%s without its ASK: exit %d, failed %v", product, code, failed(doc))
		}
	}
}

func TestMilanHoldsOnlyWhenAllowed(t *testing.T) {
	t.Parallel()
	_, args := silicon(t, "milan")
	if code, doc, _ := judged(t, args...); code != exitPrecondition || !slices.Equal(failed(doc), []string{"product"}) {
		t.Errorf("exit %d, failed %v", code, failed(doc))
	}
	code, doc, _ := judged(t, append(args, "--allow-product", "milan")...)
	if code != exitOK || !slices.ContainsFunc(doc.Warnings, func(w snp.Warning) bool { return w.Name == "product" }) {
		t.Errorf("allowed: exit %d, failed %v, warnings %+v", code, failed(doc), doc.Warnings)
	}
}

func TestEachDemandOnThePlatformHasItsFlag(t *testing.T) {
	t.Parallel()
	report, args := silicon(t, "turin")
	chip := hex.EncodeToString(report.ChipID[:8])
	for _, c := range []struct {
		flags []string
		check string // that fails, "" when all hold
	}{
		{[]string{"--chip-id", chip}, ""},
		{[]string{"--chip-id", strings.Repeat("01", 64)}, "chip-allowed"},
		{[]string{"--chip-id", strings.Repeat("01", 64), "--chip-id", chip}, ""},
		{[]string{"--min-tcb", "fmc=1,snp=4,microcode=0x51"}, ""},
		{[]string{"--min-tcb", "snp=5"}, "tcb-floor"},
		{[]string{"--floor", "1a/00-11:snp=4,mitigations=0x3f", "--floor", "19/11:snp=255"}, ""},
		{[]string{"--floor", "1a/02:mitigations=0x40"}, "mitigations"},
		{[]string{"--floor", "19/11:snp=1"}, "tcb-floor"},
		{[]string{"--require-platform", "alias-check,iommu-write-safe"}, ""},
		{[]string{"--require-platform", "ciphertext-hiding"}, "platform-info"},
		{[]string{"--exclude-product", "turin"}, "product"},
		{[]string{"--forbid-smt"}, "smt"},
		{[]string{"--require-crl"}, "revocation"},
		{[]string{"--id-key", strings.Repeat("01", 48)}, "id-key"},
		{[]string{"--author-key", strings.Repeat("01", 48)}, "author-key"},
		{[]string{"--min-guest-svn", "4000000000"}, "guest-svn"},
		{[]string{"--family-id", strings.Repeat("01", 16)}, "family-id"},
		{[]string{"--image-id", strings.Repeat("01", 16)}, "image-id"},
		{[]string{"--allow-vlek", "--allow-provisional"}, ""},
	} {
		code, doc, stderr := judged(t, append(slices.Clone(args), c.flags...)...)
		want, names := exitOK, []string(nil)
		if c.check != "" {
			want, names = exitPrecondition, []string{c.check}
		}
		if code != want || !slices.Equal(failed(doc), names) {
			t.Errorf("%v: exit %d, failed %v, stderr %q", c.flags, code, failed(doc), stderr)
		}
	}
}

func TestFlagsThatCannotBeReadOrMeanNothingAreUsageErrors(t *testing.T) {
	t.Parallel()
	p := newProof(t)
	report := p.put("report.bin", p.evidence.Report)
	raw := func(without string) []string {
		args := []string{"verify", report}
		for name, value := range map[string]string{"expected-digest": strings.Repeat("5a", 48), "report-data": strings.Repeat("00", 64), "host-data": strings.Repeat("00", 32)} {
			if name != without {
				args = append(args, "--"+name, value)
			}
		}
		return args
	}
	for _, c := range []struct {
		flag, value string
	}{
		{"floor", "snp=1"},
		{"allow-product", "rome"},
		{"exclude-product", "rome"},
		{"require-platform", "fast"},
		{"chip-id", "01"},
		{"id-key", "01"},
		{"author-key", "xy"},
		{"family-id", "01"},
		{"image-id", "01"},
		{"report-data", "01"},
		{"host-data", "01"},
		{"min-tcb", "svn=1"},
		{"crl", p.put("no.crl", []byte("x"))},
		{"certs", p.put("no.pem", []byte("x"))},
		{"nonce", "00"},
		{"expected-image", "r.example/a"},
		{"image", "image.json"},
		{"expected-gpu", "H100"},
		{"rim-dir", "rims"},
	} {
		if code, _, stderr := run(t, append(raw(c.flag), "--"+c.flag, c.value)...); code != exitUsage || !strings.Contains(stderr, "--"+c.flag) {
			t.Errorf("--%s %s: exit %d, %q", c.flag, c.value, code, stderr)
		}
	}
	for _, name := range []string{"expected-digest", "report-data", "host-data"} {
		if code, _, stderr := run(t, raw(name)...); code != exitUsage || !strings.Contains(stderr, "--"+name) {
			t.Errorf("a report without --%s: exit %d, %q", name, code, stderr)
		}
	}
	p.flags["report-data"] = strings.Repeat("00", 64)
	if code, _, stderr := p.verify(); code != exitUsage || !strings.Contains(stderr, "--report-data") {
		t.Errorf("a bundle with --report-data: exit %d, %q", code, stderr)
	}
	delete(p.flags, "report-data")
	delete(p.flags, "nonce")
	if code, _, stderr := p.verify(); code != exitUsage || !strings.Contains(stderr, "--nonce") {
		t.Errorf("a bundle without --nonce: exit %d, %q", code, stderr)
	}
}

func TestAnAttestationOfGoSevGuestCarriesItsCertificates(t *testing.T) {
	t.Parallel()
	p := newProof(t)
	message, err := abi.ReportToProto(p.evidence.Report)
	if err != nil {
		t.Fatal(err)
	}
	e := p.evidence.Endorsements
	data, err := proto.Marshal(&sevsnp.Attestation{Report: message, CertificateChain: &sevsnp.CertificateChain{VcekCert: e.VCEK, AskCert: e.ASK, ArkCert: e.ARK}})
	if err != nil {
		t.Fatal(err)
	}
	args := []string{
		"verify", p.put("attestation.pb", data), "--expected-digest", hex.EncodeToString(message.GetMeasurement()), "--report-data", hex.EncodeToString(message.GetReportData()),
		"--host-data", hex.EncodeToString(message.GetHostData()), "--allow-emulated-root", p.flags["allow-emulated-root"],
	}
	if code, doc, stderr := judged(t, args...); code != exitOK {
		t.Errorf("exit %d, failed %v, stderr %q", code, failed(doc), stderr)
	}
	args[1] = p.put("cut.pb", data[:len(data)-1])
	if code, doc, stderr := judged(t, args...); code != exitPrecondition || !slices.Equal(failed(doc), []string{"report"}) {
		t.Errorf("cut off: exit %d, failed %v, stderr %q", code, failed(doc), stderr)
	}
}

// One's own list counts, whatever came with the evidence.
func TestARevocationListOfOnesOwn(t *testing.T) {
	t.Parallel()
	p := newProof(t)
	a, crl := listedAuthority(t)
	p.flags["crl"] = p.put("list.crl", crl)
	if code, failed, _ := p.verify(); code != exitPrecondition || !slices.Contains(failed, "revocation") {
		t.Errorf("list of %s: exit %d, failed %v", a, code, failed)
	}
}

func TestExplainSaysWhatEachCheckProtectsFrom(t *testing.T) {
	t.Parallel()
	p := newProof(t)
	args := []string{"verify", p.file, "--explain"}
	for name, value := range p.flags {
		args = append(args, "--"+name+"="+value)
	}
	code, doc, _ := judged(t, args...)
	for _, c := range doc.Checks {
		if c.ProtectsFrom == "" {
			t.Errorf("%s protects from nothing", c.Name)
		}
	}
	_, text, _ := run(t, args...)
	if code != exitOK || strings.Count(text, "against:") != len(doc.Checks) {
		t.Errorf("exit %d\n%s", code, text)
	}
}

// listedAuthority is another authority than any chip's, and its list.
func listedAuthority(t *testing.T) (string, []byte) {
	t.Helper()
	a, err := snptest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	der, err := a.CRL(time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return a.ARK.Subject.CommonName, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}
