package verify_test

import (
	"bytes"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/proto/sevsnp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/firmware/verify"
	"github.com/confidential-node/agent/tests/skip"
)

// attestation is what go-sev-guest's tools write of a report.
func attestation(tb testing.TB, raw []byte, e contract.Endorsements) *sevsnp.Attestation {
	tb.Helper()
	r, err := snp.ParseReport(raw)
	if err != nil {
		tb.Fatal(err)
	}
	return &sevsnp.Attestation{
		Report: &sevsnp.Report{
			Version: r.Version, GuestSvn: r.GuestSVN, Policy: uint64(r.Policy), FamilyId: r.FamilyID[:], ImageId: r.ImageID[:], Vmpl: r.VMPL,
			SignatureAlgo: r.SigAlgo, CurrentTcb: r.CurrentTCB, PlatformInfo: uint64(r.PlatformInfo), SignerInfo: r.SignerInfo,
			ReportData: r.ReportData[:], Measurement: r.Measurement[:], HostData: r.HostData[:], IdKeyDigest: r.IDKeyDigest[:],
			AuthorKeyDigest: r.AuthorDigest[:], ReportId: r.ReportID[:], ReportIdMa: r.ReportIDMA[:], ReportedTcb: r.ReportedTCB, ChipId: r.ChipID[:],
			CommittedTcb: r.CommittedTCB, LaunchTcb: r.LaunchTCB, LaunchMitVector: r.LaunchMitigations, CurrentMitVector: r.CurrentMitigations,
			CurrentBuild: uint32(r.CurrentVersion.Build), CurrentMinor: uint32(r.CurrentVersion.Minor), CurrentMajor: uint32(r.CurrentVersion.Major),
			CommittedBuild: uint32(r.CommittedVersion.Build), CommittedMinor: uint32(r.CommittedVersion.Minor), CommittedMajor: uint32(r.CommittedVersion.Major),
			Cpuid1EaxFms: abi.FmsToCpuid1Eax(r.Family, r.Model, r.Stepping), Signature: raw[0x2A0:],
		},
		CertificateChain: &sevsnp.CertificateChain{VcekCert: e.VCEK, AskCert: e.ASK, ArkCert: e.ARK},
	}
}

func marshal(tb testing.TB, m proto.Message) []byte {
	tb.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// The signature covers bytes, so each must come back, of every generation.
func TestAnAttestationGivesBackTheReportThatWasSigned(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"milan", "genoa", "turin"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, err := os.ReadFile(filepath.Join("..", "..", "..", "shared", "data", "snp-reports", name+".report.bin"))
			if err != nil {
				skip.Missing(t, "real SEV-SNP reports in ../shared/data")
			}
			want := contract.Endorsements{VCEK: []byte("v"), ASK: []byte("s"), ARK: []byte("r")}
			data := marshal(t, attestation(t, report, want))
			if verify.Detect(data) != verify.FormatAttestation {
				t.Error("not detected")
			}
			got, e, err := verify.ParseAttestation(data)
			if err != nil || !bytes.Equal(got, report) || !bytes.Equal(e.VCEK, want.VCEK) || !bytes.Equal(e.ASK, want.ASK) || !bytes.Equal(e.ARK, want.ARK) {
				t.Errorf("%x %+v (%v)", got, e, err)
			}
		})
	}
}

func TestAttestationsThatAreNotUnderstoodAreRefused(t *testing.T) {
	t.Parallel()
	e, _ := evidence(t)
	for name, change := range map[string]func(*sevsnp.Attestation) []byte{
		"no report":     func(a *sevsnp.Attestation) []byte { a.Report = nil; return marshal(t, a) },
		"short field":   func(a *sevsnp.Attestation) []byte { a.Report.ChipId = a.Report.ChipId[:63]; return marshal(t, a) },
		"VCEK and VLEK": func(a *sevsnp.Attestation) []byte { a.CertificateChain.VlekCert = []byte("v"); return marshal(t, a) },
		"cut off":       func(a *sevsnp.Attestation) []byte { b := marshal(t, a); return b[:len(b)-1] },
		"unknown field": func(a *sevsnp.Attestation) []byte {
			return protowire.AppendVarint(protowire.AppendTag(marshal(t, a), 99, protowire.VarintType), 1)
		},
		"too large": func(*sevsnp.Attestation) []byte { return make([]byte, contract.MaxEvidenceBytes+1) },
		"unknown within": func(a *sevsnp.Attestation) []byte {
			a.Report.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
			return marshal(t, a)
		},
	} {
		if report, got, err := verify.ParseAttestation(change(attestation(t, e.Report, e.Endorsements))); err == nil || report != nil || got.VCEK != nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestFormsOfEvidenceAreToldApart(t *testing.T) {
	t.Parallel()
	e, _ := evidence(t)
	padded := append([]byte("\n {"), make([]byte, snp.ReportSize-3)...)
	for _, c := range []struct {
		data []byte
		want verify.Format
	}{{bundle(t, e), verify.FormatBundle}, {padded, verify.FormatBundle}, {e.Report, verify.FormatReport}, {nil, verify.FormatAttestation}, {e.Report[1:], verify.FormatAttestation}} {
		if got := verify.Detect(c.data); got != c.want {
			t.Errorf("%.20q is %v, want %v", c.data, got, c.want)
		}
	}
}

func pemOf(ders ...[]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

func TestCertificatesAreSortedWhateverTheirOrder(t *testing.T) {
	t.Parallel()
	e, _ := evidence(t)
	want := e.Endorsements
	for _, files := range [][][]byte{
		{pemOf(want.VCEK, want.ASK, want.ARK)}, {pemOf(want.ARK, want.VCEK), pemOf(want.ASK)}, {pemOf(want.ASK), pemOf(want.ARK), pemOf(want.VCEK)},
	} {
		got, err := verify.ParseCertificates(files...)
		if err != nil || !bytes.Equal(got.VCEK, want.VCEK) || !bytes.Equal(got.ASK, want.ASK) || !bytes.Equal(got.ARK, want.ARK) {
			t.Errorf("%+v (%v)", got, err)
		}
	}
	a, err := snptest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	vlek, _, err := a.VLEK(snp.ProductGenoa, "CN=cloud.example", contract.TCB{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := verify.ParseCertificates(pemOf(a.ASVK.Raw, vlek.Raw)); err != nil || !bytes.Equal(got.VCEK, vlek.Raw) || !bytes.Equal(got.ASK, a.ASVK.Raw) || got.ARK != nil {
		t.Errorf("%+v (%v)", got, err)
	}
}

func TestCertificatesOfMoreThanOneChainAreRefused(t *testing.T) {
	t.Parallel()
	e, _ := evidence(t)
	c := e.Endorsements
	for name, files := range map[string][][]byte{
		"two VCEKs":    {pemOf(c.VCEK), pemOf(c.VCEK)},
		"two ASKs":     {pemOf(c.ASK, c.ASK)},
		"two ARKs":     {pemOf(c.ARK, c.ARK)},
		"DER":          {c.VCEK},
		"rubbish":      {append(pemOf(c.VCEK), "and more"...)},
		"a key":        {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: c.VCEK})},
		"not X.509":    {pemOf([]byte("x"))},
		"far too many": {bytes.Repeat([]byte("\n"), verify.MaxCertificatesBytes+1)},
	} {
		if got, err := verify.ParseCertificates(files...); err == nil || got.VCEK != nil {
			t.Errorf("%s: accepted (%v)", name, err)
		}
	}
}

func TestARevocationListIsReadAsPEMOrDER(t *testing.T) {
	t.Parallel()
	a, err := snptest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	der, err := a.CRL(time.Now(), time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{der, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})} {
		if got, err := verify.DecodeCRL(data); err != nil || !bytes.Equal(got, der) {
			t.Errorf("%x (%v)", got, err)
		}
	}
	if _, err := verify.DecodeCRL([]byte("x")); err == nil {
		t.Error("rubbish is a revocation list")
	}
}

// Every name a verifier can print has its sentence, also those that only a
// failure or a demand brings about.
func TestEveryCheckSaysWhatItProtectsFrom(t *testing.T) {
	t.Parallel()
	e, x := evidence(t)
	x.ChipIDs, x.ForbidSMT, x.Platform = [][]byte{{1}}, true, snp.PlatformECC
	x.Floors = []snp.Floor{{Family: 0x19, FirstModel: 0x11, LastModel: 0x11, Mitigations: 1}}
	x.IDKeys, x.AuthorKeys, x.MinGuestSVN, x.FamilyID, x.ImageID = [][]byte{{1}}, [][]byte{{1}}, 1, []byte{1}, []byte{1}
	res := verify.Bundle(bundle(t, e), x)
	names := []string{"own-manifest", "gpu-model"} // the tenant's tool adds these
	for _, c := range res.Checks {
		names = append(names, c.Name)
	}
	if len(names) != 39 {
		t.Errorf("%d checks: %v", len(names), names)
	}
	for _, name := range names {
		if verify.Explain(name) == "" {
			t.Errorf("%s protects from nothing", name)
		}
	}
	if text := verify.Text(&res, true); strings.Count(text, "against:") != len(res.Checks) {
		t.Error(text)
	}
	if verify.Explain("no check") != "" {
		t.Error("a check that does not exist is explained")
	}
}

func TestTheTextSaysWhoSignedAndWhatToKnow(t *testing.T) {
	t.Parallel()
	res := snp.Result{
		Checks: []snp.Check{{Name: "vmpl", Status: snp.Fail, Want: "0", Got: "1", Why: "no"}, {Name: "smt", Status: snp.Skip, Why: "not looked at"}},
		Signer: &snp.Signer{
			Product: "Genoa", Processor: "Bergamo/Siena", Generation: "Zen 4c", Key: "VCEK", ChipID: "c1c2", TCB: contract.TCB{SNP: 27}, Firmware: "1.55.49",
		},
		Warnings: []snp.Warning{{Name: "smt", Why: "is on"}},
	}
	want := `signed by Bergamo/Siena (Zen 4c, product line Genoa), VCEK of chip c1c2
  at TCB fmc=0 boot-loader=0 tee=0 snp=27 microcode=0, firmware 1.55.49
✗ vmpl  no
        expected 0
        found    1
- smt   not looked at
! smt   is on
0 of 2 checks hold, 1 not made: the evidence does NOT hold
`
	if got := verify.Text(&res, false); got != want {
		t.Errorf("prints\n%s\nwant\n%s", got, want)
	}
	res.Signer = &snp.Signer{Product: "Milan", Key: "VLEK", CSP: "CN=cloud.example", Emulated: true}
	if got := verify.Text(&res, false); !strings.HasPrefix(got, "signed by EMULATED Milan, VLEK of provider CN=cloud.example\n") {
		t.Error(got)
	}
}

func FuzzParseAttestation(f *testing.F) {
	e, _ := evidence(f)
	f.Add(marshal(f, attestation(f, e.Report, e.Endorsements)))
	f.Add([]byte{0x0a, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		report, e, err := verify.ParseAttestation(data)
		if (err == nil) != (len(report) == snp.ReportSize) || err != nil && (e.VCEK != nil || e.ASK != nil || e.ARK != nil) {
			t.Errorf("%d bytes, %+v (%v)", len(report), e, err)
		}
	})
}

func FuzzParseCertificates(f *testing.F) {
	e, _ := evidence(f)
	f.Add(pemOf(e.Endorsements.VCEK, e.Endorsements.ASK), pemOf(e.Endorsements.ARK))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n"), []byte(nil))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		got, err := verify.ParseCertificates(one, two)
		again, errAgain := verify.ParseCertificates(two, one)
		if (err == nil) != (errAgain == nil) || !bytes.Equal(got.VCEK, again.VCEK) || !bytes.Equal(got.ASK, again.ASK) || !bytes.Equal(got.ARK, again.ARK) {
			t.Errorf("order matters: %+v (%v), %+v (%v)", got, err, again, errAgain)
		}
	})
}

func FuzzDecodeCRL(f *testing.F) {
	a, err := snptest.NewAuthority(time.Now())
	if err != nil {
		f.Fatal(err)
	}
	der, err := a.CRL(time.Now(), time.Now().Add(time.Hour))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := verify.DecodeCRL(data)
		if (got == nil) == (err == nil) {
			t.Errorf("%x (%v)", got, err)
		}
	})
}

// One bundle as it is verified a thousand times a day, with three ECDSA
// signatures instead of AMD's two of RSA and one of ECDSA. Aim: below 5 ms.
func BenchmarkBundle(b *testing.B) {
	e, x := evidence(b)
	data := bundle(b, e)
	b.ReportAllocs()
	for b.Loop() {
		if res := verify.Bundle(slices.Clone(data), x); !res.OK() {
			b.Fatalf("%+v", res.Failed())
		}
	}
}
