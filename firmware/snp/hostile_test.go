package snp_test

import (
	"bytes"
	"crypto/x509"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

func TestEndorsementsThatDoNotFitAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		check  string
		change func(e, other *contract.Endorsements)
	}{
		"no endorsements":            {"root", func(e, _ *contract.Endorsements) { *e = contract.Endorsements{} }},
		"no ARK":                     {"root", func(e, _ *contract.Endorsements) { e.ARK = nil }},
		"another generation's ARK":   {"chain", func(e, o *contract.Endorsements) { e.ARK = o.ARK }},
		"one bit of the ARK":         {"root", func(e, _ *contract.Endorsements) { e.ARK[len(e.ARK)-1] ^= 1 }},
		"byte after the ARK":         {"root", func(e, _ *contract.Endorsements) { e.ARK = append(e.ARK, 0) }},
		"the ASK as root":            {"root", func(e, _ *contract.Endorsements) { e.ARK = e.ASK }},
		"no ASK":                     {"chain", func(e, _ *contract.Endorsements) { e.ASK = nil }},
		"another generation's ASK":   {"chain", func(e, o *contract.Endorsements) { e.ASK = o.ASK }},
		"the ARK in the ASK's place": {"chain", func(e, _ *contract.Endorsements) { e.ASK = e.ARK }},
		"no VCEK":                    {"chain", func(e, _ *contract.Endorsements) { e.VCEK = nil }},
		"the ASK in the VCEK's place": {"chain", func(e, _ *contract.Endorsements) {
			e.VCEK = e.ASK
		}},
		"another chip's VCEK":          {"signature", func(e, o *contract.Endorsements) { e.VCEK = o.VCEK }},
		"another generation's chain":   {"signature", func(e, o *contract.Endorsements) { *e = *o }},
		"a byte after the VCEK":        {"chain", func(e, _ *contract.Endorsements) { e.VCEK = append(e.VCEK, 0) }},
		"a byte after the ASK":         {"chain", func(e, _ *contract.Endorsements) { e.ASK = append(e.ASK, 0) }},
		"one bit of the ASK's content": {"chain", func(e, _ *contract.Endorsements) { e.ASK[len(e.ASK)/2] ^= 1 }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, e := captured(t, "genoa")
			_, other := captured(t, "turin")
			x := expectationsOf(t, report)
			c.change(&e, &other)
			res := snp.Verify(report, e, x)
			if res.OK() || status(t, res, c.check) != snp.Fail {
				t.Errorf("check %s is %q: %+v", c.check, status(t, res, c.check), res.Checks)
			}
		})
	}
}

func TestValidityIsJudgedAtTheGivenTime(t *testing.T) {
	t.Parallel()
	report, e := captured(t, "genoa")
	vcek, err := x509.ParseCertificate(e.VCEK)
	if err != nil {
		t.Fatal(err)
	}
	x := expectationsOf(t, report)
	x.Now = vcek.NotBefore.AddDate(0, 0, -1)
	if res := snp.Verify(report, e, x); status(t, res, "chain") != snp.Fail {
		t.Error("a VCEK holds before it was issued")
	}
	x.Now = vcek.NotAfter.AddDate(0, 0, 1)
	if res := snp.Verify(report, e, x); status(t, res, "chain") != snp.Fail {
		t.Error("a VCEK holds after it expired")
	}
}

// A real chain and a report that says what is wanted: only the signature lies.
func TestAForgedReportUnderARealChainIsRefused(t *testing.T) {
	t.Parallel()
	report, e := captured(t, "genoa")
	r, err := snp.ParseReport(report)
	if err != nil {
		t.Fatal(err)
	}
	r.Measurement = [48]byte{7}
	chain, err := snptest.NewChain(snptest.ProductEmulated, contract.TCB{}, make([]byte, 64), now)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := snptest.Sign(r.Marshal(), chain.Key)
	if err != nil {
		t.Fatal(err)
	}
	res := snp.Verify(forged, e, expectationsOf(t, forged))
	if res.OK() || res.Failed().Name != "signature" {
		t.Errorf("%+v", res.Failed())
	}
}

// Whoever may name extra roots cannot smuggle in one that does not call
// itself EMULATED.
func TestAnExtraRootMustSayThatItIsEmulated(t *testing.T) {
	t.Parallel()
	report, e := captured(t, "genoa")
	x := expectationsOf(t, report)
	ask, err := x509.ParseCertificate(e.ASK)
	if err != nil {
		t.Fatal(err)
	}
	x.EmulatedRoots = []*x509.Certificate{ask}
	e.ARK = e.ASK
	if res := snp.Verify(report, e, x); status(t, res, "root") != snp.Fail {
		t.Errorf("an AMD intermediate is accepted as a root: %+v", res.Checks)
	}
}

// turin builds an emulated report in the layout of Turin.
func turin(t *testing.T, hwid []byte, change func(*snp.Report)) ([]byte, *snptest.Chain, snp.Expect) {
	t.Helper()
	tcb := contract.TCB{FMC: 1, BootLoader: 2, TEE: 3, SNP: 4, Microcode: 0x51}
	chain, err := snptest.NewChain(snptest.ProductEmulated, tcb, hwid, now)
	if err != nil {
		t.Fatal(err)
	}
	const raw = 0x51<<56 | 4<<24 | 3<<16 | 2<<8 | 1
	r := &snp.Report{
		Version: 5, Policy: 0x30000, SigAlgo: 1, Family: 0x1A, Model: 0x02, CurrentTCB: raw, ReportedTCB: raw, CommittedTCB: raw, LaunchTCB: raw,
		Measurement: [48]byte{1}, HostData: [32]byte{2}, ReportData: [64]byte{3}, ReportIDMA: [32]byte(bytes.Repeat([]byte{0xFF}, 32)),
	}
	copy(r.ChipID[:], hwid[:8])
	if change != nil {
		change(r)
	}
	report, err := snptest.Sign(r.Marshal(), chain.Key)
	if err != nil {
		t.Fatal(err)
	}
	return report, chain, snp.Expect{
		ReportData: r.ReportData[:], HostData: r.HostData[:],
		AppraisalPolicy: snp.AppraisalPolicy{Measurements: [][]byte{r.Measurement[:]}, EmulatedRoots: []*x509.Certificate{chain.Root}, Now: now},
	}
}

func TestTurinsChipIDIsEightBytes(t *testing.T) {
	t.Parallel()
	hwid := []byte{1, 2, 3, 4, 5, 6, 7, 8}
	report, chain, x := turin(t, hwid, nil)
	if res := snp.Verify(report, chain.Endorsements, x); !res.OK() {
		t.Fatalf("fails: %+v", res.Failed())
	}
	x.MinTCB.FMC = 2
	if res := snp.Verify(report, chain.Endorsements, x); status(t, res, "tcb-floor") != snp.Fail {
		t.Error("FMC below the floor is accepted")
	}
	report, chain, x = turin(t, hwid, func(r *snp.Report) { r.ChipID[63] = 1 })
	if res := snp.Verify(report, chain.Endorsements, x); status(t, res, "chip-id") != snp.Fail {
		t.Error("bytes behind a Turin chip id are accepted")
	}
}

// A certificate without an FMC level must not match a report whose level is 0.
func TestTheLayoutsOfReportAndCertificateMustAgree(t *testing.T) {
	t.Parallel()
	noFMC := func(r *snp.Report) {
		for _, tcb := range []*uint64{&r.ReportedTCB, &r.CurrentTCB, &r.CommittedTCB, &r.LaunchTCB} {
			*tcb &^= 0xff
		}
	}
	report, chain, x := turin(t, bytes.Repeat([]byte{9}, 64), noFMC) // 64 bytes: the certificate states no FMC
	res := snp.Verify(report, chain.Endorsements, x)
	for _, name := range []string{"chip-id", "tcb-binding"} {
		if status(t, res, name) != snp.Fail {
			t.Errorf("check %s is %q", name, status(t, res, name))
		}
	}
}

// The remaining rules that no bit of an emulated Genoa report reaches.
func TestRarePlatformsAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		check  string
		change func(*snp.Report)
	}{
		"masked chip key":       {"signing-key", func(r *snp.Report) { r.SignerInfo = 1 << 1 }},
		"no signer":             {"signing-key", func(r *snp.Report) { r.SignerInfo = 7 << 2 }},
		"another algorithm":     {"signing-key", func(r *snp.Report) { r.SigAlgo = 0 }},
		"masked chip id":        {"chip-id", func(r *snp.Report) { r.ChipID = [64]byte{} }},
		"asked for by the host": {"vmpl", func(r *snp.Report) { r.VMPL = 0xFFFFFFFF }},
		"migration agent":       {"policy-migration", func(r *snp.Report) { r.Policy |= snp.PolicyMigrationAgent }},
		"version 2 without product": {"product", func(r *snp.Report) {
			r.Version, r.Family, r.Model, r.Stepping = 2, 0, 0, 0
		}},
		"committed below current": {"committed-is-current", func(r *snp.Report) { r.CommittedTCB-- }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, chain, x := emulated(t, c.change)
			if res := snp.Verify(report, chain.Endorsements, x); res.OK() || status(t, res, c.check) != snp.Fail {
				t.Errorf("check %s is %q: %+v", c.check, status(t, res, c.check), res.Checks)
			}
		})
	}
}

// Each of the four TCB versions in a report has to reach the floor.
func TestEveryTCBOfAReportHasToReachTheFloor(t *testing.T) {
	t.Parallel()
	const low = 10 | 26<<48 | 86<<56
	for name, change := range map[string]func(*snp.Report){
		"committed": func(r *snp.Report) { r.CommittedTCB = low },
		"current":   func(r *snp.Report) { r.CurrentTCB = low },
		"launch":    func(r *snp.Report) { r.LaunchTCB = low },
		"reported":  func(r *snp.Report) { r.ReportedTCB = low },
	} {
		report, chain, x := emulated(t, change)
		x.MinTCB = contract.TCB{SNP: 27}
		res := snp.Verify(report, chain.Endorsements, x)
		at := slices.IndexFunc(res.Checks, func(c snp.Check) bool { return c.Name == "tcb-floor" })
		if at < 0 || res.Checks[at].Status != snp.Fail || !strings.Contains(res.Checks[at].Got, name) {
			t.Errorf("%s TCB below the floor: %+v", name, res.Checks)
		}
	}
}

// No chip has the id zero, even if a certificate says so.
func TestAMaskedChipIDDoesNotMatchAnEmptyCertificate(t *testing.T) {
	t.Parallel()
	report, chain, x := turin(t, make([]byte, 8), nil)
	if res := snp.Verify(report, chain.Endorsements, x); status(t, res, "chip-id") != snp.Fail {
		t.Errorf("%+v", res.Checks)
	}
}

// Every line's processors, those without a captured report too.
func TestEveryGenerationIsNamedByItsCPUID(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		family, model                  uint8
		processor, generation, product string
	}{
		{0x19, 0x11, "Genoa", "Zen 4", snp.ProductGenoa},
		{0x19, 0xA0, "Bergamo/Siena", "Zen 4c", snp.ProductGenoa},
		{0x1A, 0x02, "Turin", "Zen 5", snp.ProductTurin},
		{0x1A, 0x11, "Turin Dense", "Zen 5c", snp.ProductTurin},
	} {
		change := func(r *snp.Report) { r.Version, r.Family, r.Model = 5, c.family, c.model }
		report, chain, x := emulated(t, change)
		if c.product == snp.ProductTurin {
			report, chain, x = turin(t, []byte{1, 2, 3, 4, 5, 6, 7, 8}, change)
		}
		res := snp.Verify(report, chain.Endorsements, x)
		if s := res.Signer; !res.OK() || s == nil || s.Processor != c.processor || s.Generation != c.generation || s.Product != c.product {
			t.Errorf("%s: signed by %+v: %+v", c.processor, s, res.Failed())
		}
	}
}
