package snp_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

// Names are an interface: tools branch on them. Everything that can be
// demanded is.
func TestNamesOfChecksAreStable(t *testing.T) {
	t.Parallel()
	report, chain, x := emulated(t, func(r *snp.Report) {
		r.Version, r.Policy = 5, snp.PolicyReservedOne
		r.LaunchMitigations, r.CurrentMitigations = 3, 3
		r.PlatformInfo, r.SignerInfo = snp.PlatformAliasCheck, 1
		r.IDKeyDigest, r.AuthorDigest, r.GuestSVN = [48]byte{4}, [48]byte{5}, 6
	})
	x.ChipIDs = [][]byte{bytes.Repeat([]byte{0xC1}, 64)}
	x.Platform, x.ForbidSMT = snp.PlatformAliasCheck, true
	x.MinTCB, x.Floors = contract.TCB{SNP: 27}, []snp.Floor{{Family: 0x19, FirstModel: 0x10, LastModel: 0x1F, Mitigations: 2}}
	x.IDKeys, x.AuthorKeys, x.MinGuestSVN = [][]byte{append([]byte{4}, make([]byte, 47)...)}, [][]byte{append([]byte{5}, make([]byte, 47)...)}, 6
	x.FamilyID, x.ImageID = make([]byte, 16), make([]byte, 16)
	var names []string
	res := snp.Verify(report, chain.Endorsements, x)
	for _, c := range res.Checks {
		names = append(names, c.Name)
		if (c.Status != snp.Pass && c.Name != "revocation") || c.Why == "" {
			t.Errorf("%+v", c)
		}
	}
	want := strings.Fields("report signing-key root chain revocation signature product chip-id tcb-binding tcb-layout tcb-floor mitigations committed-is-current" +
		" platform-info chip-allowed smt vmpl policy-reserved policy-debug policy-migration policy-cxl id-key author-key guest-svn family-id image-id launch-digest host-data report-data")
	if !slices.Equal(names, want) {
		t.Errorf("checks are %q, want %q", names, want)
	}
	if got := warnings(res); !slices.Equal(got, []string{"root", "revocation"}) {
		t.Errorf("warns of %q", got)
	}
	if s := res.Signer; s == nil || !s.Emulated || s.Key != "VCEK" {
		t.Errorf("signed by %+v", s)
	}
}

func TestEachDemandRefusesOnItsOwn(t *testing.T) {
	t.Parallel()
	key := func(first byte) [][]byte { return [][]byte{append([]byte{first}, make([]byte, 47)...)} }
	for name, c := range map[string]struct {
		check  string
		report func(*snp.Report)
		demand func(*snp.Expect)
	}{
		"SMT permitted":                  {"smt", nil, func(x *snp.Expect) { x.ForbidSMT = true }},
		"SMT active":                     {"smt", func(r *snp.Report) { r.Policy, r.PlatformInfo = snp.PolicyReservedOne, snp.PlatformSMT }, func(x *snp.Expect) { x.ForbidSMT = true }},
		"CXL allowed":                    {"policy-cxl", func(r *snp.Report) { r.Policy |= snp.PolicyCXL }, nil},
		"unknown policy bit":             {"policy-reserved", func(r *snp.Report) { r.Policy |= 1 << 26 }, nil},
		"policy without its fixed bit":   {"policy-reserved", func(r *snp.Report) { r.Policy = snp.PolicySMT }, nil},
		"unknown signer bit":             {"signing-key", func(r *snp.Report) { r.SignerInfo = 1 << 5 }, nil},
		"VLEK allowed, VCEK's chain":     {"signing-key", func(r *snp.Report) { r.SignerInfo = 1 << 2 }, func(x *snp.Expect) { x.AllowVLEK = true }},
		"unused TCB byte":                {"tcb-layout", func(r *snp.Report) { r.LaunchTCB |= 1 << 16 }, nil},
		"no alias check":                 {"platform-info", nil, func(x *snp.Expect) { x.Platform = snp.PlatformAliasCheck }},
		"mitigation missing at launch":   {"mitigations", func(r *snp.Report) { r.Version, r.LaunchMitigations, r.CurrentMitigations = 5, 1, 3 }, demandMitigations(2)},
		"mitigation missing now":         {"mitigations", func(r *snp.Report) { r.Version, r.LaunchMitigations, r.CurrentMitigations = 5, 3, 1 }, demandMitigations(2)},
		"ID key of nobody":               {"id-key", nil, func(x *snp.Expect) { x.IDKeys = [][]byte{make([]byte, 48)} }},
		"another ID key":                 {"id-key", func(r *snp.Report) { r.IDKeyDigest[0] = 1 }, func(x *snp.Expect) { x.IDKeys = key(2) }},
		"author key that did not sign":   {"author-key", func(r *snp.Report) { r.AuthorDigest[0] = 1 }, func(x *snp.Expect) { x.AuthorKeys = key(1) }},
		"another author key":             {"author-key", func(r *snp.Report) { r.AuthorDigest[0], r.SignerInfo = 1, 1 }, func(x *snp.Expect) { x.AuthorKeys = key(2) }},
		"older guest":                    {"guest-svn", func(r *snp.Report) { r.GuestSVN = 6 }, func(x *snp.Expect) { x.MinGuestSVN = 7 }},
		"another family":                 {"family-id", func(r *snp.Report) { r.FamilyID[0] = 1 }, func(x *snp.Expect) { x.FamilyID = make([]byte, 16) }},
		"another image":                  {"image-id", func(r *snp.Report) { r.ImageID[0] = 1 }, func(x *snp.Expect) { x.ImageID = make([]byte, 16) }},
		"no revocation list":             {"revocation", nil, func(x *snp.Expect) { x.RequireCRL = true }},
		"firmware version not committed": {"committed-is-current", func(r *snp.Report) { r.CurrentVersion.Build++ }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, chain, x := emulated(t, c.report)
			if c.demand != nil {
				c.demand(&x)
			}
			res := snp.Verify(report, chain.Endorsements, x)
			failed := 0
			for _, check := range res.Checks {
				if check.Status == snp.Fail {
					failed++
				}
			}
			if status(t, res, c.check) != snp.Fail || failed != 1 {
				t.Errorf("check %s is %q, %d fail: %+v", c.check, status(t, res, c.check), failed, res.Checks)
			}
		})
	}
}

func demandMitigations(bits uint64) func(*snp.Expect) {
	return func(x *snp.Expect) {
		x.Floors = []snp.Floor{{Family: 0x19, FirstModel: 0x11, LastModel: 0x11, Mitigations: bits}}
	}
}

func TestProvisionalFirmwareIsAcceptedOnlyWhenAllowed(t *testing.T) {
	t.Parallel()
	report, chain, x := emulated(t, func(r *snp.Report) { r.CurrentVersion.Build++ })
	if res := snp.Verify(report, chain.Endorsements, x); status(t, res, "committed-is-current") != snp.Fail {
		t.Errorf("not allowed: %+v", res.Checks)
	}
	x.AllowProvisional = true
	res := snp.Verify(report, chain.Endorsements, x)
	if !res.OK() || status(t, res, "committed-is-current") != snp.Skip || !slices.Contains(warnings(res), "committed-is-current") {
		t.Errorf("allowed: %+v", res)
	}
}

func TestAMissingAliasCheckAndUnknownFactsAreWarnedOf(t *testing.T) {
	t.Parallel()
	report, chain, x := emulated(t, func(r *snp.Report) { r.PlatformInfo = 1 << 8 })
	if got := warnings(snp.Verify(report, chain.Endorsements, x)); !slices.Contains(got, "alias-check") || !slices.Contains(got, "platform-info") {
		t.Errorf("warns of %v", got)
	}
}

// leased builds a report signed by a cloud provider's VLEK.
func leased(t *testing.T, change func(*snp.Report)) ([]byte, contract.Endorsements, *snptest.Authority, snp.Expect) {
	t.Helper()
	a, err := snptest.NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	vlek, key, err := a.VLEK(snp.ProductGenoa, "CN=cloud.example", contract.TCB{BootLoader: 10, SNP: 27, Microcode: 86})
	if err != nil {
		t.Fatal(err)
	}
	_, _, x := emulated(t, nil)
	raw, _, _ := emulated(t, nil)
	r, err := snp.ParseReport(raw)
	if err != nil {
		t.Fatal(err)
	}
	r.SignerInfo, r.ChipID = snp.SignerVLEK<<2, [64]byte{}
	if change != nil {
		change(r)
	}
	x.AllowVLEK, x.EmulatedRoots = true, []*x509.Certificate{a.ARK}
	return sign(t, r, key), contract.Endorsements{VCEK: vlek.Raw, ASK: a.ASVK.Raw, ARK: a.ARK.Raw}, a, x
}

func sign(t *testing.T, r *snp.Report, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	report, err := snptest.Sign(r.Marshal(), key)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func TestAVLEKHoldsOnlyWhenAllowedAndUnderItsOwnIntermediate(t *testing.T) {
	t.Parallel()
	report, e, a, x := leased(t, nil)
	res := snp.Verify(report, e, x)
	if !res.OK() || status(t, res, "chip-id") != snp.Skip || res.Signer.Key != "VLEK" || res.Signer.CSP != "CN=cloud.example" || res.Signer.ChipID != "" {
		t.Errorf("allowed: %+v", res)
	}
	if !slices.Contains(warnings(res), "signing-key") {
		t.Errorf("warns of %v", warnings(res))
	}
	x.AllowVLEK = false
	if res := snp.Verify(report, e, x); status(t, res, "signing-key") != snp.Fail {
		t.Errorf("not allowed: %+v", res.Checks)
	}
	x.AllowVLEK = true
	x.ChipIDs = [][]byte{bytes.Repeat([]byte{1}, 64)}
	if res := snp.Verify(report, e, x); status(t, res, "chip-allowed") != snp.Fail {
		t.Errorf("a VLEK is on a list of chips: %+v", res.Checks)
	}
	x.ChipIDs = nil
	e.ASK = a.ASK.Raw
	if res := snp.Verify(report, e, x); status(t, res, "chain") != snp.Fail {
		t.Errorf("VLEK under the intermediate for VCEKs: %+v", res.Checks)
	}
	report, e, _, x = leased(t, func(r *snp.Report) { r.SignerInfo = 0 })
	if res := snp.Verify(report, e, x); status(t, res, "signing-key") != snp.Fail {
		t.Errorf("a VLEK passes for a chip's own key: %+v", res.Checks)
	}
}

func TestRevocationIsJudgedByTheRootsOwnCurrentList(t *testing.T) {
	t.Parallel()
	report, e, a, x := leased(t, nil)
	other, err := snptest.NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	list := func(a *snptest.Authority, from, to time.Time, revoked ...*x509.Certificate) []byte {
		der, err := a.CRL(from, to, revoked...)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	from, to := now.Add(-time.Hour), now.Add(time.Hour)
	good := list(a, from, to, a.ASK) // the other intermediate
	damaged := slices.Clone(good)
	damaged[len(damaged)-1] ^= 1
	for name, c := range map[string]struct {
		crl    []byte
		status snp.Status
		why    string
	}{
		"current, others revoked": {good, snp.Pass, "revokes neither"},
		"nothing revoked":         {list(a, from, to), snp.Pass, "revokes neither"},
		"ASVK revoked":            {list(a, from, to, a.ASVK), snp.Fail, "has revoked"},
		"root revoked":            {list(a, from, to, a.ARK), snp.Fail, "has revoked"},
		"stale":                   {list(a, from, now.Add(-time.Second)), snp.Fail, "not current"},
		"of tomorrow":             {list(a, now.Add(time.Second), to), snp.Fail, "not current"},
		"another root's":          {list(other, from, to), snp.Fail, "did not sign"},
		"damaged":                 {damaged, snp.Fail, "did not sign"},
		"no list":                 {[]byte("x"), snp.Fail, "parsing CRL"},
		"none":                    {nil, snp.Skip, "NOT checked"},
	} {
		e.CRL = c.crl
		res := snp.Verify(report, e, x)
		i := slices.IndexFunc(res.Checks, func(c snp.Check) bool { return c.Name == "revocation" })
		if got := res.Checks[i]; got.Status != c.status || !strings.Contains(got.Why, c.why) {
			t.Errorf("%s: %+v", name, got)
		}
		if slices.Contains(warnings(res), "revocation") != (c.status == snp.Skip) {
			t.Errorf("%s: warns of %v", name, warnings(res))
		}
	}
	// One's own list counts, not the one that came with the evidence.
	e.CRL, x.CRL = good, list(a, from, to, a.ASVK)
	if res := snp.Verify(report, e, x); status(t, res, "revocation") != snp.Fail {
		t.Errorf("the evidence's list replaces one's own: %+v", res.Checks)
	}
}

func TestFloorsAreReadStrictly(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]snp.Floor{
		"19/11:snp=27":                          {Family: 0x19, FirstModel: 0x11, LastModel: 0x11, TCB: contract.TCB{SNP: 27}},
		"1a/00-11:snp=4,fmc=1,mitigations=0x3f": {Family: 0x1A, LastModel: 0x11, TCB: contract.TCB{FMC: 1, SNP: 4}, Mitigations: 0x3F},
		"19/a0-AF:mitigations=11":               {Family: 0x19, FirstModel: 0xA0, LastModel: 0xAF, Mitigations: 11},
		"19/11:mitigations=1,microcode=0x56":    {Family: 0x19, FirstModel: 0x11, LastModel: 0x11, TCB: contract.TCB{Microcode: 0x56}, Mitigations: 1},
	} {
		got, err := snp.ParseFloor(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v (%v)", text, got, err)
		}
	}
	for _, text := range []string{
		"", ":", "19/11", "19/11:", "19:snp=1", "/11:snp=1", "19/:snp=1", "19/11-:snp=1", "19/12-11:snp=1", "119/11:snp=1", "0x19/11:snp=1", "19/11:svn=1",
		"19/11:snp=1,snp=2", "19/11:mitigations=", "19/11:mitigations=0", "19/11:mitigations=1,mitigations=2", "19/11:snp=256", "snp=27",
	} {
		if got, err := snp.ParseFloor(text); err == nil || got != (snp.Floor{}) {
			t.Errorf("%q is read as %+v (%v)", text, got, err)
		}
	}
}

func TestPlatformFactsHaveNames(t *testing.T) {
	t.Parallel()
	const turin = snp.PlatformInfo(0x65) // from a report captured on hardware
	if got := turin.String(); got != "smt,ecc,alias-check,iommu-write-safe" {
		t.Errorf("0x65 is %q", got)
	}
	if got := (turin | 1<<9).String(); !strings.HasSuffix(got, ",0x200") {
		t.Errorf("an unknown bit is lost: %q", got)
	}
	if got, err := snp.ParsePlatformInfo("smt,ecc,alias-check,iommu-write-safe"); err != nil || got != turin {
		t.Errorf("%v (%v)", got, err)
	}
	for _, text := range []string{"", "ecc,", "ecc,ecc", "ECC", "0x65"} {
		if got, err := snp.ParsePlatformInfo(text); err == nil {
			t.Errorf("%q is read as %v", text, got)
		}
	}
}

func TestProductsAreReadInAnyCase(t *testing.T) {
	t.Parallel()
	want := []snp.Product{product(t, snp.ProductMilan), product(t, snp.ProductGenoa), product(t, snp.ProductTurin)}
	if got, err := snp.ParseProducts([]string{"milan", "Genoa", "TURIN"}); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v (%v)", got, err)
	}
	for _, name := range []string{"", "rome", "siena", "Emulated"} {
		if got, err := snp.ParseProducts([]string{"milan", name}); err == nil || got != nil {
			t.Errorf("%q is read as %v", name, got)
		}
	}
}

func FuzzParseFloor(f *testing.F) {
	f.Add("19/11:snp=27")
	f.Add("1a/00-11:snp=4,fmc=1,mitigations=0x3f")
	f.Fuzz(func(t *testing.T, text string) {
		floor, err := snp.ParseFloor(text)
		if err != nil {
			return
		}
		if again, err := snp.ParseFloor(floor.String()); err != nil || again != floor {
			t.Errorf("%q is %v, read again %v (%v)", text, floor, again, err)
		}
	})
}

func FuzzParsePlatformInfo(f *testing.F) {
	f.Add("smt,alias-check")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := snp.ParsePlatformInfo(text)
		if err != nil {
			return
		}
		if again, err := snp.ParsePlatformInfo(p.String()); err != nil || again != p {
			t.Errorf("%q is %v, read again %v (%v)", text, p, again, err)
		}
	})
}

// Nothing but what the root signed is its list, however it is mangled.
func FuzzParseCRL(f *testing.F) {
	a, err := snptest.NewAuthority(now)
	if err != nil {
		f.Fatal(err)
	}
	genuine, err := a.CRL(now, now.Add(time.Hour), a.ASK)
	if err != nil {
		f.Fatal(err)
	}
	list, err := x509.ParseRevocationList(genuine)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(genuine)
	f.Fuzz(func(t *testing.T, der []byte) {
		crl, err := snp.ParseCRL(der, a.ARK)
		if err == nil && !bytes.Equal(crl.RawTBSRevocationList, list.RawTBSRevocationList) {
			t.Errorf("a list nobody signed is accepted: %x", der)
		}
	})
}

// Most of it is the chain, two RSA-4096 signatures, and one of ECDSA P-384.
func BenchmarkVerifyGenoa(b *testing.B) {
	report, e := captured(b, "genoa")
	x := expectationsOf(b, report)
	b.ReportAllocs()
	for b.Loop() {
		if res := snp.Verify(report, e, x); !res.OK() {
			b.Fatalf("%+v", res.Failed())
		}
	}
}
