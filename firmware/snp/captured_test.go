package snp_test

import (
	"bytes"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

func TestRealReportsOfThreeGenerationsHold(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]snp.Signer{
		"milan": {
			Product: "Milan", Processor: "Milan", Generation: "Zen 3", Key: "VCEK", Firmware: "1.55.29",
			TCB: contract.TCB{BootLoader: 4, SNP: 0x18, Microcode: 0xDB},
		},
		"genoa": {
			Product: "Genoa", Processor: "Genoa", Generation: "Zen 4", Key: "VCEK", Firmware: "1.55.40",
			TCB: contract.TCB{BootLoader: 10, SNP: 0x17, Microcode: 0x54},
		},
		"turin": {
			Product: "Turin", Processor: "Turin", Generation: "Zen 5", Key: "VCEK", Firmware: "1.55.65",
			TCB: contract.TCB{FMC: 1, BootLoader: 1, TEE: 1, SNP: 4, Microcode: 0x51},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, e := captured(t, name)
			x := expectationsOf(t, report)
			if name == "milan" {
				res := snp.Verify(report, e, x)
				if res.OK() || status(t, res, "product") != snp.Fail || !strings.Contains(res.Failed().Why, "can be extracted") {
					t.Errorf("Milan is accepted without being allowed: %+v", res)
				}
				x.AllowProducts = []snp.Product{product(t, snp.ProductMilan)}
			}
			res := snp.Verify(report, e, x)
			if !res.OK() {
				t.Fatalf("fails: %+v", res.Failed())
			}
			r, err := snp.ParseReport(report)
			if err != nil {
				t.Fatal(err)
			}
			size := 64
			if name == "turin" {
				size = 8
			}
			want.ChipID = hex.EncodeToString(r.ChipID[:size])
			if *res.Signer != want {
				t.Errorf("signed by %+v, want %+v", *res.Signer, want)
			}
		})
	}
}

// What holds has to hold because of every byte: parsing refuses what means
// nothing, the signature all the rest.
func TestEveryByteOfARealReportCounts(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"milan", "genoa", "turin"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, e := captured(t, name)
			x := expectationsOf(t, report)
			x.AllowProducts = []snp.Product{product(t, snp.ProductMilan)}
			verify := snp.WithEndorsements(e, x)
			if res := verify(report); !res.OK() {
				t.Fatalf("fails: %+v", res.Failed())
			}
			for i := range report {
				flipped := slices.Clone(report)
				flipped[i] ^= 1 << (i % 8)
				res := verify(flipped)
				if i%97 == 0 { // both halves together
					res = snp.Verify(flipped, e, x)
				}
				if res.OK() || res.Signer != nil || status(t, res, "report") != snp.Fail && status(t, res, "signature") != snp.Fail {
					t.Fatalf("bit %d of byte %#x may be flipped: %+v", i%8, i, res)
				}
			}
		})
	}
}

// A chip's certificate falls with every byte on its own, without any report.
func TestEveryByteOfTheChipsCertificateCounts(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"milan", "genoa", "turin"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, e := captured(t, name)
			x := expectationsOf(t, report)
			if !snp.ChainHolds(e, x.AppraisalPolicy) {
				t.Fatal("the genuine chain does not hold")
			}
			for i := range e.VCEK {
				f := e
				f.VCEK = slices.Clone(e.VCEK)
				f.VCEK[i] ^= 1 << (i % 8)
				if snp.ChainHolds(f, x.AppraisalPolicy) {
					t.Fatalf("bit %d of byte %d of the VCEK may be flipped", i%8, i)
				}
			}
		})
	}
}

// The root is compared, never verified: not one byte of it may differ.
func TestARootThatIsNotByteForByteThePinnedOneIsRefused(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"milan", "genoa", "turin"} {
		report, e := captured(t, name)
		x := expectationsOf(t, report)
		genuine := e.ARK
		for i := range genuine {
			e.ARK = slices.Clone(genuine)
			e.ARK[i] ^= 1 << (i % 8)
			if snp.ChainHolds(e, x.AppraisalPolicy) {
				t.Fatalf("%s: bit %d of byte %d of the ARK may be flipped", name, i%8, i)
			}
		}
		for what, ark := range map[string][]byte{"a byte behind it": append(bytes.Clone(genuine), 0), "cut off": genuine[:len(genuine)-1], "none": nil} {
			e.ARK = ark
			if res := snp.Verify(report, e, x); res.OK() || status(t, res, "root") != snp.Fail || res.Signer != nil {
				t.Errorf("%s: ARK with %s: %+v", name, what, res.Checks)
			}
		}
	}
}

// Real platforms are not perfect: what they state shows.
func TestWhatRealPlatformsStateIsWarnedOf(t *testing.T) {
	t.Parallel()
	for name, want := range map[string][]string{
		"milan": {"revocation", "product", "tcb-floor", "smt"},
		"genoa": {"revocation", "tcb-floor", "smt"},
		"turin": {"revocation", "tcb-floor", "smt"},
	} {
		report, e := captured(t, name)
		x := expectationsOf(t, report)
		x.AllowProducts = []snp.Product{product(t, snp.ProductMilan)}
		if got := warnings(snp.Verify(report, e, x)); !slices.Equal(got, want) {
			t.Errorf("%s: warns of %v, want %v", name, got, want)
		}
	}
}

func warnings(res snp.Result) []string {
	var names []string
	for _, w := range res.Warnings {
		names = append(names, w.Name)
	}
	return names
}

// The facts of the three platforms decide the demands on them.
func TestDemandsOnRealPlatforms(t *testing.T) {
	t.Parallel()
	floor := func(text string) snp.Floor {
		f, err := snp.ParseFloor(text)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	for _, c := range []struct {
		name, product, check string
		status               snp.Status
		demand               func(*snp.Expect)
	}{
		{"Turin is IOMMU write safe", "turin", "platform-info", snp.Pass, func(x *snp.Expect) { x.Platform = snp.PlatformAliasCheck | snp.PlatformIOMMUWriteSafe }},
		{"this Genoa is not", "genoa", "platform-info", snp.Fail, func(x *snp.Expect) { x.Platform = snp.PlatformIOMMUWriteSafe }},
		{"SMT is on", "turin", "smt", snp.Fail, func(x *snp.Expect) { x.ForbidSMT = true }},
		{"Turin states mitigations", "turin", "mitigations", snp.Pass, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("1a/00-11:mitigations=0x3f")} }},
		{"but not all", "turin", "mitigations", snp.Fail, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("1a/02:mitigations=0x40")} }},
		{"version 3 states none", "genoa", "mitigations", snp.Fail, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("19/11:mitigations=1")} }},
		{"floor of its model", "genoa", "tcb-floor", snp.Pass, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("19/10-1f:snp=0x17,microcode=0x54")} }},
		{"floor above it", "genoa", "tcb-floor", snp.Fail, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("19/10-1f:snp=0x1b")} }},
		{"floor of lower models", "genoa", "tcb-floor", snp.Fail, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("19/00-10:snp=1")} }},
		{"floor of another model", "genoa", "tcb-floor", snp.Fail, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("19/a0-af:snp=1")} }},
		{"floor of another family", "genoa", "tcb-floor", snp.Fail, func(x *snp.Expect) { x.Floors = []snp.Floor{floor("1a/11:snp=1")} }},
		{"excluded by name", "genoa", "product", snp.Fail, func(x *snp.Expect) { x.Exclude = []snp.Product{product(t, snp.ProductGenoa)} }},
		{"excluded though allowed", "genoa", "product", snp.Fail, func(x *snp.Expect) {
			x.Exclude = []snp.Product{product(t, snp.ProductGenoa)}
			x.AllowProducts = x.Exclude
		}},
		{"another line allowed", "milan", "product", snp.Fail, func(x *snp.Expect) { x.AllowProducts = []snp.Product{product(t, snp.ProductGenoa)} }},
	} {
		report, e := captured(t, c.product)
		x := expectationsOf(t, report)
		c.demand(&x)
		if res := snp.Verify(report, e, x); status(t, res, c.check) != c.status {
			t.Errorf("%s: %s is %q, want %q: %+v", c.name, c.check, status(t, res, c.check), c.status, res.Checks)
		}
	}
}
