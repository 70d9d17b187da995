package snp_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

func TestAnIdentityIsOneThatAChipCanHave(t *testing.T) {
	t.Parallel()
	full := bytes.Repeat([]byte{7}, 64)
	short := append(bytes.Repeat([]byte{7}, 8), make([]byte, 56)...)
	for name, c := range map[string]struct {
		product string
		chip    []byte
		tcb     contract.TCB
		hwid    int // 0: refused
	}{
		"Genoa":              {snp.ProductGenoa, full, contract.TCB{SNP: 1}, 64},
		"Turin, whole":       {snp.ProductTurin, short, contract.TCB{FMC: 1}, 8},
		"Turin, as at KDS":   {snp.ProductTurin, short[:8], contract.TCB{FMC: 1}, 8},
		"Turin, too much":    {snp.ProductTurin, full, contract.TCB{}, 0},
		"Genoa, cut":         {snp.ProductGenoa, full[:63], contract.TCB{}, 0},
		"Genoa with 8 bytes": {snp.ProductGenoa, full[:8], contract.TCB{}, 0},
		"masked":             {snp.ProductGenoa, make([]byte, 64), contract.TCB{}, 0},
		"masked Turin":       {snp.ProductTurin, make([]byte, 64), contract.TCB{}, 0},
		"FMC on Genoa":       {snp.ProductGenoa, full, contract.TCB{FMC: 1}, 0},
		"unknown product":    {"Naples", full, contract.TCB{}, 0},
		"nothing":            {snp.ProductGenoa, nil, contract.TCB{}, 0},
	} {
		id, err := snp.NewIdentity(c.product, c.chip, c.tcb)
		if (err == nil) != (c.hwid > 0) || len(id.HWID) != c.hwid {
			t.Errorf("%s: %d bytes (%v)", name, len(id.HWID), err)
		}
	}
}

// realIdentity is the chip and TCB that a captured report names.
func realIdentity(t *testing.T, product string, report []byte) snp.Identity {
	t.Helper()
	r, err := snp.ParseReport(report)
	if err != nil {
		t.Fatal(err)
	}
	line, err := snp.ProductByName(product)
	if err != nil {
		t.Fatal(err)
	}
	id, err := snp.NewIdentity(product, r.ChipID[:], line.TCB(r.ReportedTCB))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestRealCertificatesFitTheirChipAndNoOther(t *testing.T) {
	t.Parallel()
	roots, err := snp.PinnedRoots()
	if err != nil {
		t.Fatal(err)
	}
	for file, product := range map[string]string{"milan": snp.ProductMilan, "genoa": snp.ProductGenoa, "turin": snp.ProductTurin} {
		t.Run(product, func(t *testing.T) {
			t.Parallel()
			report, e := captured(t, file)
			id, root := realIdentity(t, product, report), roots[product]
			if !bytes.Equal(root.Raw, e.ARK) {
				t.Error("another root is pinned")
			}
			if err := snp.CheckIntermediate(e.ASK, false, root, now); err != nil {
				t.Error(err)
			}
			if snp.CheckIntermediate(e.ASK, true, root, now) == nil || snp.CheckIntermediate(e.ARK, false, root, now) == nil {
				t.Error("an ASK passes as ASVK, or the ARK as ASK")
			}
			if err := snp.CheckVCEK(e.VCEK, e.ASK, root, id, now); err != nil {
				t.Error(err)
			}
			if p, tcb, err := snp.ReadLeaf(e.VCEK); err != nil || p != id.Product || tcb != id.TCB {
				t.Errorf("reads as %v %v (%v)", p, tcb, err)
			}
			if snp.CheckVLEK(e.VCEK, e.ASK, root, id.Product, id.TCB, now) == nil {
				t.Error("a VCEK passes as VLEK")
			}
			if snp.CheckVCEK(e.VCEK, e.ASK, root, id, now.AddDate(8, 0, 0)) == nil {
				t.Error("an expired one passes")
			}
			other := id
			other.HWID = slices.Clone(id.HWID)
			other.HWID[0] ^= 1
			if snp.CheckVCEK(e.VCEK, e.ASK, root, other, now) == nil {
				t.Error("fits another chip")
			}
			for name, change := range map[string]func(*contract.TCB){
				"boot loader": func(c *contract.TCB) { c.BootLoader++ }, "tee": func(c *contract.TCB) { c.TEE++ },
				"snp": func(c *contract.TCB) { c.SNP++ }, "microcode": func(c *contract.TCB) { c.Microcode++ }, "fmc": func(c *contract.TCB) { c.FMC++ },
			} {
				other := id
				change(&other.TCB)
				if snp.CheckVCEK(e.VCEK, e.ASK, root, other, now) == nil {
					t.Errorf("fits another %s level", name)
				}
			}
			for _, foreign := range roots {
				if foreign != root && snp.CheckVCEK(e.VCEK, e.ASK, foreign, id, now) == nil {
					t.Errorf("holds under %s", foreign.Subject.CommonName)
				}
			}
		})
	}
}

func TestAVLEKNamesNoChip(t *testing.T) {
	t.Parallel()
	a, err := snptest.NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	for _, product := range []string{snp.ProductGenoa, snp.ProductTurin} {
		line, err := snp.ProductByName(product)
		if err != nil {
			t.Fatal(err)
		}
		tcb := contract.TCB{BootLoader: 1, SNP: 27, Microcode: 86}
		vlek, _, err := a.VLEK(product, "CN=csp.example", tcb)
		if err != nil {
			t.Fatal(err)
		}
		if err := snp.CheckVLEK(vlek.Raw, a.ASVK.Raw, a.ARK, line, tcb, now); err != nil {
			t.Errorf("%s: %v", product, err)
		}
		if snp.CheckVLEK(vlek.Raw, a.ASK.Raw, a.ARK, line, tcb, now) == nil {
			t.Errorf("%s: holds under the VCEKs' intermediate", product)
		}
		if p, got, err := snp.ReadLeaf(vlek.Raw); err != nil || p != line || got != tcb {
			t.Errorf("%s: reads as %v %v (%v)", product, p, got, err)
		}
		tcb.SNP++
		if snp.CheckVLEK(vlek.Raw, a.ASVK.Raw, a.ARK, line, tcb, now) == nil {
			t.Errorf("%s: holds for another TCB", product)
		}
	}
}

func TestARevocationListIsTheRootsAndSaysUntilWhen(t *testing.T) {
	t.Parallel()
	a, errA := snptest.NewAuthority(now)
	b, errB := snptest.NewAuthority(now)
	good, errGood := a.CRL(now, now.AddDate(0, 1, 0), a.ASK)
	over, errOver := a.CRL(now, now.Add(-time.Hour))
	for _, err := range []error{errA, errB, errGood} {
		if err != nil {
			t.Fatal(err)
		}
	}
	crl, err := snp.ParseCRL(good, a.ARK)
	if err != nil || len(crl.RevokedCertificateEntries) != 1 || crl.RevokedCertificateEntries[0].SerialNumber.Cmp(a.ASK.SerialNumber) != 0 {
		t.Errorf("%+v %v", crl, err)
	}
	for name, root := range map[string]*x509.Certificate{"another root": b.ARK, "the intermediate": a.ASK} {
		if _, err := snp.ParseCRL(good, root); err == nil {
			t.Errorf("holds under %s", name)
		}
	}
	if _, err := snp.ParseCRL(append(slices.Clone(good), 0), a.ARK); err == nil {
		t.Error("a byte may follow")
	}
	if errOver == nil {
		if _, err := snp.ParseCRL(over, a.ARK); err == nil {
			t.Error("it may end before it begins")
		}
	}
}

func FuzzCRL(f *testing.F) {
	a, err := snptest.NewAuthority(now)
	if err != nil {
		f.Fatal(err)
	}
	good, err := a.CRL(now, now.AddDate(0, 1, 0), a.ASK)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, der []byte) {
		if _, err := snp.ParseCRL(der, a.ARK); err == nil && !bytes.Equal(der, good) {
			t.Error("a list that nobody signed holds")
		}
	})
}

func FuzzLeaf(f *testing.F) {
	chain, err := snptest.NewChain(snp.ProductGenoa, contract.TCB{SNP: 27}, bytes.Repeat([]byte{7}, 64), now)
	if err != nil {
		f.Fatal(err)
	}
	id, err := snp.NewIdentity(snp.ProductGenoa, bytes.Repeat([]byte{7}, 64), contract.TCB{SNP: 27})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(chain.VCEK)
	if text, err := os.ReadFile(filepath.Join("..", "..", "..", "shared", "data", "snp-reports", "turin.vcek.pem")); err == nil {
		if block, _ := pem.Decode(text); block != nil {
			f.Add(block.Bytes)
		}
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		if _, _, err := snp.ReadLeaf(der); err != nil && snp.CheckVCEK(der, chain.ASK, chain.Root, id, now) == nil {
			t.Error("checks, but cannot be read")
		}
		if snp.CheckVCEK(der, chain.ASK, chain.Root, id, now) == nil && !bytes.Equal(der, chain.VCEK) {
			t.Error("a certificate that nobody signed holds")
		}
	})
}

func TestCertificatesBelongToTheReportTheirKeySigned(t *testing.T) {
	t.Parallel()
	genoa, e := captured(t, "genoa")
	turin, other := captured(t, "turin")
	if err := snp.CheckSigned(genoa, e, nil); err != nil {
		t.Error(err)
	}
	if err := snp.CheckSigned(turin, other, nil); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*contract.Endorsements){
		"another's leaf": func(e *contract.Endorsements) { e.VCEK = other.VCEK },
		"another's ASK":  func(e *contract.Endorsements) { e.ASK = other.ASK },
		"another's ARK":  func(e *contract.Endorsements) { e.ARK = other.ARK },
		"no root":        func(e *contract.Endorsements) { e.ARK = nil },
		"no leaf":        func(e *contract.Endorsements) { e.VCEK = nil },
	} {
		wrong := e
		change(&wrong)
		if snp.CheckSigned(genoa, wrong, nil) == nil {
			t.Errorf("%s passes", name)
		}
	}
	if snp.CheckSigned(genoa[1:], e, nil) == nil {
		t.Error("half a report passes")
	}
}
