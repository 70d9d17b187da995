package snp

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"maps"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// extensions are those of a well-formed leaf, by the OID below AMD's.
func extensions() map[string][]byte {
	return map[string][]byte{
		"2":   {0x16, 5, 'G', 'e', 'n', 'o', 'a'}, // IA5String
		"3.1": {2, 1, 10}, "3.2": {2, 1, 0}, "3.3": {2, 1, 27},
		"3.8": {2, 2, 0, 0xDB}, // 219: DER needs the leading zero
		"4":   make([]byte, 64),
	}
}

func leafDER(t *testing.T, curve elliptic.Curve, values map[string][]byte) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(1<<32, 0)}
	for _, id := range []string{"2", "3.1", "3.2", "3.3", "3.8", "3.9", "4", "5"} {
		if value, ok := values[id]; ok {
			oid := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}
			for _, c := range strings.ReplaceAll(id, ".", "") {
				oid = append(oid, int(c-'0'))
			}
			template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: oid, Value: value})
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), crypto.Signer(key))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestALeafStatesItsProcessor(t *testing.T) {
	t.Parallel()
	l, err := parseLeaf(leafDER(t, elliptic.P384(), extensions()))
	if err != nil {
		t.Fatal(err)
	}
	if want := (contract.TCB{BootLoader: 10, SNP: 27, Microcode: 0xDB}); l.product != "Genoa" || l.tcb != want || l.hasFMC || len(l.hwid) != 64 {
		t.Errorf("%+v", l)
	}
	turin := extensions()
	turin["3.9"] = []byte{2, 1, 0}
	if l, err = parseLeaf(leafDER(t, elliptic.P384(), turin)); err != nil || !l.hasFMC {
		t.Errorf("FMC level 0 counts as left out: %+v (%v)", l, err)
	}
	milan := extensions()
	milan["2"] = []byte{0x16, 8, 'M', 'i', 'l', 'a', 'n', '-', 'B', '0'}
	if l, err = parseLeaf(leafDER(t, elliptic.P384(), milan)); err != nil || l.product != ProductMilan {
		t.Errorf("stepping is not cut off: %+v (%v)", l, err)
	}
}

func TestALeafThatLeavesSomethingOpenIsRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		id     string
		value  []byte // nil leaves the extension out
		reason string
	}{
		"no product":             {"2", nil, "no product"},
		"no boot loader level":   {"3.1", nil, "3704.1.3.1"},
		"no TEE level":           {"3.2", nil, "3704.1.3.2"},
		"no SNP level":           {"3.3", nil, "3704.1.3.3"},
		"no microcode level":     {"3.8", nil, "3704.1.3.8"},
		"product is UTF-8":       {"2", []byte{0x0c, 5, 'G', 'e', 'n', 'o', 'a'}, "IA5String"},
		"bytes after product":    {"2", []byte{0x16, 1, 'G', 0}, "IA5String"},
		"neither chip nor CSP":   {"4", nil, "either name"},
		"both chip and CSP":      {"5", []byte{0x16, 3, 'C', 'S', 'P'}, "either name"},
		"CSP is UTF-8":           {"5", []byte{0x0c, 3, 'C', 'S', 'P'}, "IA5String"},
		"level 256":              {"3.3", []byte{2, 2, 1, 0}, "0..255"},
		"negative level":         {"3.3", []byte{2, 1, 0xDB}, "0..255"},
		"level is no number":     {"3.3", []byte{4, 1, 27}, "0..255"},
		"bytes after a level":    {"3.3", []byte{2, 1, 27, 0}, "0..255"},
		"level cut off":          {"3.3", []byte{2, 2, 27}, "0..255"},
		"FMC level out of range": {"3.9", []byte{2, 2, 1, 0}, "0..255"},
	} {
		values := maps.Clone(extensions())
		if delete(values, c.id); c.value != nil {
			values[c.id] = c.value
		}
		if l, err := parseLeaf(leafDER(t, elliptic.P384(), values)); err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: %+v (%v)", name, l, err)
		}
	}
	if _, err := parseLeaf(leafDER(t, elliptic.P256(), extensions())); err == nil {
		t.Error("a P-256 key is accepted")
	}
}

// What AMD signed with one intermediate does not count under the other.
func TestEachKindOfKeyHasItsOwnIntermediate(t *testing.T) {
	t.Parallel()
	vlek := extensions()
	delete(vlek, "4")
	vlek["5"] = []byte{0x16, 3, 'C', 'S', 'P'}
	for _, c := range []struct {
		name, issuer string
		leaf         map[string][]byte
		holds        bool
	}{
		{"VCEK", "SEV-Genoa", extensions(), true},
		{"VLEK", "SEV-VLEK-Genoa", vlek, true},
		{"VCEK of the ASVK", "SEV-VLEK-Genoa", extensions(), false},
		{"VLEK of the ASK", "SEV-Genoa", vlek, false},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		issuer := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: c.issuer}, NotAfter: time.Unix(1<<32, 0),
			BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
		}
		ask, err := x509.CreateCertificate(rand.Reader, issuer, issuer, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		root, err := x509.ParseCertificate(ask)
		if err != nil {
			t.Fatal(err)
		}
		self, err := x509.ParseCertificate(leafDER(t, elliptic.P384(), c.leaf))
		if err != nil {
			t.Fatal(err)
		}
		self.ExtraExtensions = self.Extensions
		der, err := x509.CreateCertificate(rand.Reader, self, issuer, self.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		l, err := parseLeaf(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := verifyChain(l, ask, root, time.Unix(1<<31, 0)); (err == nil) != c.holds {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
