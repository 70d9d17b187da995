package snp_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/tests/skip"
)

var now = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC) //nolint:gochecknoglobals // when the fixtures are valid

// captured loads a report captured from hardware with its chain.
func captured(tb testing.TB, product string) ([]byte, contract.Endorsements) {
	tb.Helper()
	dir := filepath.Join("..", "..", "..", "shared", "data", "snp-reports")
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			skip.Missing(tb, "real SEV-SNP reports in ../shared/data")
		}
		return data
	}
	der := func(name string) []byte {
		block, _ := pem.Decode(read(name))
		if block == nil {
			tb.Fatalf("%s is not PEM", name)
		}
		return block.Bytes
	}
	return read(product + ".report.bin"), contract.Endorsements{VCEK: der(product + ".vcek.pem"), ASK: der(product + ".ask.pem"), ARK: der(product + ".ark.pem")}
}

// expectationsOf takes what a relying party would know from elsewhere.
func expectationsOf(tb testing.TB, report []byte) snp.Expect {
	tb.Helper()
	r, err := snp.ParseReport(report)
	if err != nil {
		tb.Fatal(err)
	}
	return snp.Expect{ReportData: r.ReportData[:], HostData: r.HostData[:], AppraisalPolicy: snp.AppraisalPolicy{Measurements: [][]byte{r.Measurement[:]}, Now: now}}
}

func status(t *testing.T, r snp.Result, name string) snp.Status {
	t.Helper()
	for _, c := range r.Checks {
		if c.Name == name {
			return c.Status
		}
	}
	return ""
}

func product(t *testing.T, name string) snp.Product {
	t.Helper()
	p, err := snp.ProductByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// emulated builds a report signed by a chain of our own.
func emulated(tb testing.TB, change func(*snp.Report)) ([]byte, *snptest.Chain, snp.Expect) {
	tb.Helper()
	tcb := contract.TCB{BootLoader: 10, TEE: 0, SNP: 27, Microcode: 86}
	chip := bytes.Repeat([]byte{0xC1}, 64)
	chain, err := snptest.NewChain(snptest.ProductEmulated, tcb, chip, now)
	if err != nil {
		tb.Fatal(err)
	}
	const genoaTCB = 10 | 27<<48 | 86<<56
	r := &snp.Report{
		Version: 3, Policy: 0x30000, SigAlgo: 1, Family: 0x19, Model: 0x11, Stepping: 1,
		CurrentTCB: genoaTCB, ReportedTCB: genoaTCB, CommittedTCB: genoaTCB, LaunchTCB: genoaTCB,
		ChipID: [64]byte(chip), Measurement: [48]byte{1}, HostData: [32]byte{2}, ReportData: [64]byte{3},
		ReportIDMA: [32]byte(bytes.Repeat([]byte{0xFF}, 32)),
	}
	want := *r
	if change != nil {
		change(r)
	}
	report, err := snptest.Sign(r.Marshal(), chain.Key)
	if err != nil {
		tb.Fatal(err)
	}
	return report, chain, snp.Expect{
		ReportData: want.ReportData[:], HostData: want.HostData[:],
		AppraisalPolicy: snp.AppraisalPolicy{Measurements: [][]byte{want.Measurement[:]}, EmulatedRoots: []*x509.Certificate{chain.Root}, Now: now},
	}
}

func TestAnEmulatedRootHoldsOnlyWhenAllowed(t *testing.T) {
	t.Parallel()
	report, chain, x := emulated(t, nil)
	if res := snp.Verify(report, chain.Endorsements, x); !res.OK() {
		t.Fatalf("allowed root: %+v", res.Failed())
	}
	x.EmulatedRoots = nil
	res := snp.Verify(report, chain.Endorsements, x)
	if res.OK() || !strings.Contains(res.Failed().Why, "EMULATED") {
		t.Errorf("emulated root without permission: %+v", res.Failed())
	}
	other, err := snptest.NewChain(snptest.ProductEmulated, contract.TCB{}, make([]byte, 64), now)
	if err != nil {
		t.Fatal(err)
	}
	x.EmulatedRoots = []*x509.Certificate{other.Root}
	if res := snp.Verify(report, chain.Endorsements, x); res.OK() {
		t.Error("an ARK of the same name but another key is accepted")
	}
}

func TestEachRuleOfThePolicyRefusesOnItsOwn(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		report func(*snp.Report)
		expect func(*snp.Expect)
	}{
		"signing-key":          {report: func(r *snp.Report) { r.SignerInfo = 1 << 2 }},
		"chip-id":              {report: func(r *snp.Report) { r.ChipID[0] ^= 1 }},
		"tcb-binding":          {report: func(r *snp.Report) { r.ReportedTCB-- }},
		"committed-is-current": {report: func(r *snp.Report) { r.CurrentVersion.Build = 9 }},
		"vmpl":                 {report: func(r *snp.Report) { r.VMPL = 1 }},
		"policy-debug":         {report: func(r *snp.Report) { r.Policy |= snp.PolicyDebug }},
		"policy-migration":     {report: func(r *snp.Report) { r.ReportIDMA[0] = 0 }},
		"launch-digest":        {report: func(r *snp.Report) { r.Measurement[5]++ }},
		"host-data":            {report: func(r *snp.Report) { r.HostData[5]++ }},
		"report-data":          {report: func(r *snp.Report) { r.ReportData[5]++ }},
		"product":              {report: func(r *snp.Report) { r.Family = 0x17 }},
		"tcb-floor":            {expect: func(x *snp.Expect) { x.MinTCB.Microcode = 87 }},
		"chip-allowed":         {expect: func(x *snp.Expect) { x.ChipIDs = [][]byte{make([]byte, 64)} }},
		"chain":                {expect: func(x *snp.Expect) { x.Now = now.AddDate(2, 0, 0) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, chain, x := emulated(t, c.report)
			if c.expect != nil {
				c.expect(&x)
			}
			res := snp.Verify(report, chain.Endorsements, x)
			if status(t, res, name) != snp.Fail {
				t.Errorf("check %s is %q: %+v", name, status(t, res, name), res.Checks)
			}
			for _, check := range res.Checks {
				if check.Status == snp.Fail && check.Why == "" {
					t.Errorf("check %s says no reason", check.Name)
				}
			}
		})
	}
}

func TestNothingExpectedIsNotEverythingAccepted(t *testing.T) {
	t.Parallel()
	report, chain, x := emulated(t, nil)
	res := snp.Verify(report, chain.Endorsements, snp.Expect{AppraisalPolicy: snp.AppraisalPolicy{EmulatedRoots: x.EmulatedRoots, Now: now}})
	for _, name := range []string{"launch-digest", "host-data", "report-data"} {
		if status(t, res, name) != snp.Fail {
			t.Errorf("%s passes without an expectation", name)
		}
	}
}

func TestReportsRoundTrip(t *testing.T) {
	t.Parallel()
	report, _, _ := emulated(t, func(r *snp.Report) { r.Version = 5; r.LaunchMitigations = 7; r.CurrentMitigations = 9 })
	r, err := snp.ParseReport(report)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(r.Marshal(), report) || r.CurrentMitigations != 9 {
		t.Error("report changes on the way")
	}
}

func FuzzVerify(f *testing.F) {
	f.Add(make([]byte, snp.ReportSize), []byte{0x30, 0}, []byte{0x30, 0}, []byte{0x30, 0})
	report, chain, x := emulated(f, nil)
	f.Add(report, chain.VCEK, chain.ASK, chain.ARK)
	leaf, err := x509.ParseCertificate(chain.VCEK)
	if err != nil {
		f.Fatal(err)
	}
	const signed = 0x2A0
	genuine := bytes.Clone(report[:signed])
	f.Fuzz(func(t *testing.T, report, vcek, ask, ark []byte) {
		// Nothing that starts from an emulated root may ever hold here, and
		// the fuzzer has no AMD key.
		if res := snp.Verify(report, contract.Endorsements{VCEK: vcek, ASK: ask, ARK: ark}, snp.Expect{AppraisalPolicy: snp.AppraisalPolicy{Now: now}}); res.OK() {
			t.Errorf("holds: %+v", res)
		}
		// Past the root, only what the chip said under its own certificate.
		res := snp.Verify(report, contract.Endorsements{VCEK: vcek, ASK: ask, ARK: chain.ARK}, x)
		if !res.OK() {
			return
		}
		if cert, err := x509.ParseCertificate(vcek); err != nil || !bytes.Equal(cert.RawTBSCertificate, leaf.RawTBSCertificate) || !bytes.Equal(report[:signed], genuine) {
			t.Errorf("a report or certificate nobody signed holds: %x, %x", report, vcek)
		}
	})
}

func FuzzParseEmulatedRoot(f *testing.F) {
	_, chain, _ := emulated(f, nil)
	f.Add(chain.ARK)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: chain.ARK}))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		root, err := snp.ParseEmulatedRoot(data)
		if (root == nil) == (err == nil) || (root != nil && !strings.Contains(root.Subject.CommonName, snp.EmulatedMark)) {
			t.Errorf("%v %v", root, err)
		}
	})
}

func TestOnlyACertificateThatSaysEmulatedIsAnEmulatedRoot(t *testing.T) {
	t.Parallel()
	_, chain, _ := emulated(t, nil)
	for _, data := range [][]byte{chain.ARK, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: chain.ARK})} {
		if root, err := snp.ParseEmulatedRoot(data); err != nil || !root.Equal(chain.Root) {
			t.Errorf("%v %v", root, err)
		}
	}
	_, genuine := captured(t, "genoa")
	for _, data := range [][]byte{genuine.ARK, nil, []byte("no certificate")} {
		if _, err := snp.ParseEmulatedRoot(data); err == nil {
			t.Errorf("accepted: %.20q", data)
		}
	}
}
