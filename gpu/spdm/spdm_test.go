package spdm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// now is any day of the certificates.
func now() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }

func sample(tb testing.TB, name string) []byte {
	tb.Helper()
	data, err := os.ReadFile("testdata/" + name)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func nvidia() []Fingerprint { return []Fingerprint{NVIDIARoot()} }

// judge is everything this package can say of a report.
func judge(report, chain []byte) error {
	c, err := VerifyChain(chain, nvidia(), now())
	if err != nil {
		return err
	}
	r, err := Parse(report)
	if err != nil {
		return err
	}
	return r.Verify(c)
}

func TestARealReportOfHopperHolds(t *testing.T) {
	t.Parallel()
	c, err := VerifyChain(sample(t, "hopper-chain.pem"), nvidia(), now())
	if err != nil {
		t.Fatal(err)
	}
	if c.Product != "GH100" || c.PDI.String() != "0x431d480fe5e87274" {
		t.Errorf("chip %s, PDI %s", c.Product, c.PDI)
	}
	r, err := Parse(sample(t, "hopper-report.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Verify(c); err != nil {
		t.Error(err)
	}
	o := r.Opaque
	if o.Driver != "550.90.07" || o.VBIOS != "96.00.9F.00.01" || o.Project != "1010" || o.ProjectSKU != "0200" || o.ChipSKU != "882" {
		t.Errorf("board %+v", o)
	}
	if !o.NVDEC0Disabled || o.ProtectedPCIe || o.Feature != nil || len(o.Switches) != 0 || len(o.Unknown) != 0 {
		t.Errorf("mode %+v", o)
	}
	if len(r.Measurements) != 64 || hex.EncodeToString(r.Measurements[1][:4]) != "8048dfd1" || r.Measurements[0] != (Digest{}) {
		t.Errorf("%d measurements, the second is %x", len(r.Measurements), r.Measurements[1])
	}
	if hex.EncodeToString(r.Nonce[:4]) != "931d8dd0" || hex.EncodeToString(r.ResponderNonce[:4]) != "b4b8a06a" {
		t.Errorf("nonces %x, %x", r.Nonce, r.ResponderNonce)
	}
}

func TestAPDIIsReadAsItIsWritten(t *testing.T) {
	t.Parallel()
	for _, want := range []PDI{1, 0x431d480fe5e87274, 1<<64 - 1} {
		for _, text := range []string{want.String(), want.String()[2:], strings.ToUpper(want.String())} {
			if got, err := ParsePDI(text); err != nil || got != want {
				t.Errorf("%s: %s, %v", text, got, err)
			}
		}
	}
	for _, text := range []string{"", "0x", "1", "0x431d480fe5e8727", "0x431d480fe5e872741", "0x431d480fe5e8727g", "+0431d480fe5e8727"} {
		if got, err := ParsePDI(text); err == nil {
			t.Errorf("%q is taken for %s", text, got)
		}
	}
}

// sampled is of how many bytes one is followed to the signature, which takes
// milliseconds: a prime, so that over the 55-byte blocks every offset has its
// turn.
const sampled = 29

func TestEveryByteOfARealReportCounts(t *testing.T) {
	t.Parallel()
	chain, report := sample(t, "hopper-chain.pem"), sample(t, "hopper-report.bin")
	c, err := VerifyChain(chain, nvidia(), now())
	if err != nil {
		t.Fatal(err)
	}
	for i := range report {
		flipped := bytes.Clone(report)
		flipped[i] ^= 1 << (i % 8)
		r, err := Parse(flipped)
		if err != nil {
			continue
		}
		// Verify hashes the one and compares with the other, whole.
		if !bytes.Equal(slices.Concat(r.signed, r.signature), flipped) {
			t.Errorf("byte %d is neither signed nor signature", i)
		}
		if i%sampled == 0 && r.Verify(c) == nil {
			t.Errorf("bit %d of byte %d does not count", i%8, i)
		}
	}
	for n := range report {
		if _, err := Parse(report[:n]); err == nil {
			t.Errorf("the first %d bytes are taken for a report", n)
		}
	}
	if _, err := Parse(append(bytes.Clone(report), 0)); err == nil {
		t.Error("a byte more is taken for a report")
	}
}

// Some 120 bytes, for time's sake: following a chain takes milliseconds. The
// fuzz target goes on from there.
func TestBytesAllOverTheCertificatesCount(t *testing.T) {
	t.Parallel()
	report := sample(t, "hopper-report.bin")
	var ders [][]byte
	for rest := sample(t, "hopper-chain.pem"); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		ders = append(ders, block.Bytes)
	}
	encode := func() []byte {
		var out bytes.Buffer
		for _, der := range ders {
			_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: der})
		}
		return out.Bytes()
	}
	if err := judge(report, encode()); err != nil {
		t.Fatal(err)
	}
	for _, der := range ders {
		for i := 0; i < len(der); i += sampled {
			der[i] ^= 1
			if judge(report, encode()) == nil {
				t.Errorf("byte %d of a certificate does not count", i)
			}
			der[i] ^= 1
		}
	}
}

// gpu is a GPU of nobody's, with certificates that lead to a root of its own.
type gpu struct {
	key   *ecdsa.PrivateKey
	chain []byte
	root  Fingerprint
}

// newGPU issues the certificates; extension is the leaf's FWID.
func newGPU(t *testing.T, serial int64, extension *pkix.Extension) gpu {
	t.Helper()
	var out bytes.Buffer
	issue := func(name string, number *big.Int, extra []pkix.Extension, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: number, Subject: pkix.Name{CommonName: name}, NotBefore: now().AddDate(-1, 0, 0), NotAfter: now().AddDate(1, 0, 0),
			BasicConstraintsValid: true, IsCA: extra == nil, ExtraExtensions: extra,
		}
		if parent == nil {
			parent, signer = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		if c, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		return c, key
	}
	root, rootKey := issue("root", big.NewInt(1), nil, nil, nil)
	pdi := new(big.Int).Lsh(big.NewInt(0x41), 64)
	identity, identityKey := issue("GH100 identity", pdi.Add(pdi, big.NewInt(serial)), nil, root, rootKey)
	extra := []pkix.Extension{}
	if extension != nil {
		extra = append(extra, *extension)
	}
	leaf, key := issue("GH100 leaf", big.NewInt(3), extra, identity, identityKey)
	for _, c := range []*x509.Certificate{leaf, identity, root} {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return gpu{key, out.Bytes(), sha256.Sum256(root.Raw)}
}

// tcbInfo is Blackwell's extension with one FWID, and a field after it.
func tcbInfo(t *testing.T, digest []byte) *pkix.Extension {
	t.Helper()
	list, err := asn1.MarshalWithParams([]fwid{{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, digest}}, "tag:6")
	if err != nil {
		t.Fatal(err)
	}
	value, err := asn1.Marshal(struct {
		Vendor string `asn1:"utf8,tag:0"`
		FWIDs  asn1.RawValue
		Flags  asn1.BitString `asn1:"tag:7"`
	}{"NVIDIA", asn1.RawValue{FullBytes: list}, asn1.BitString{Bytes: []byte{0}, BitLength: 8}})
	if err != nil {
		t.Fatal(err)
	}
	return &pkix.Extension{Id: oidTCB(), Value: value}
}

func TestAFirmwareOfBlackwellIsFoundInItsTcbInfo(t *testing.T) {
	t.Parallel()
	want := bytes.Repeat([]byte{0x5a}, DigestSize)
	g := newGPU(t, 0x1122, tcbInfo(t, want))
	c, err := VerifyChain(g.chain, []Fingerprint{g.root}, now())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.FWID[:], want) || c.PDI != 0x1122 {
		t.Errorf("FWID %x, PDI %s", c.FWID, c.PDI)
	}
}

func TestCertificatesThatProveNothingAreRefused(t *testing.T) {
	t.Parallel()
	digest := make([]byte, DigestSize)
	sound := newGPU(t, 1, tcbInfo(t, digest))
	hopper := sample(t, "hopper-chain.pem")
	second := bytes.Index(hopper[1:], []byte("-----BEGIN")) + 1
	for name, c := range map[string]struct {
		chain []byte
		root  Fingerprint
		at    time.Time
		want  string
	}{
		"a root of somebody's own": {sound.chain, NVIDIARoot(), now(), "not to the pinned root"},
		"the real one for another": {hopper, sound.root, now(), "not to the pinned root"},
		"a gap":                    {append(bytes.Clone(hopper[:second]), hopper[bytes.LastIndex(hopper, []byte("-----BEGIN")):]...), NVIDIARoot(), now(), "unknown authority"},
		"not yet valid":            {sound.chain, sound.root, now().AddDate(-2, 0, 0), "expired or is not yet valid"},
		"the leaf alone":           {hopper[:second], NVIDIARoot(), now(), "1, want the leaf"},
		"nothing":                  {nil, NVIDIARoot(), now(), "0, want the leaf"},
		"no PEM":                   {[]byte("x"), NVIDIARoot(), now(), "not a PEM file"},
		"too many":                 {bytes.Repeat(hopper[:second], maxChain+1), NVIDIARoot(), now(), "more than 8"},
		"too much":                 {make([]byte, MaxChainBytes+1), NVIDIARoot(), now(), "at most"},
		"no firmware":              {newGPU(t, 1, nil).chain, sound.root, now(), ""},
		"a short digest":           {newGPU(t, 1, tcbInfo(t, digest[:40])).chain, sound.root, now(), ""},
	} {
		if c.want == "" { // its own root, which only it knows
			g := newGPU(t, 1, nil)
			if name == "a short digest" {
				g = newGPU(t, 1, tcbInfo(t, digest[:40]))
			}
			c.chain, c.root, c.want = g.chain, g.root, "FWID"
		}
		if _, err := VerifyChain(c.chain, []Fingerprint{c.root}, c.at); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestAReportOfAnotherGPUIsRefused(t *testing.T) {
	t.Parallel()
	g := newGPU(t, 1, tcbInfo(t, make([]byte, DigestSize)))
	c, err := VerifyChain(g.chain, []Fingerprint{g.root}, now())
	if err != nil {
		t.Fatal(err)
	}
	r, err := Parse(sample(t, "hopper-report.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Verify(c); err == nil || !strings.Contains(err.Error(), "signature") {
		t.Error(err)
	}
	// Its own signature, over a report that names other firmware.
	c.FWID = *r.Opaque.FWID
	if r.signature, err = sign(g.key, r.signed); err != nil {
		t.Fatal(err)
	}
	if err := r.Verify(c); err != nil {
		t.Errorf("its own report: %v", err)
	}
	c.FWID[0]++
	if err := r.Verify(c); err == nil || !strings.Contains(err.Error(), "FWID") {
		t.Error(err)
	}
}

func TestOpaqueFieldsThatDoNotFitAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"cut in a head":  {[]byte{3, 0, 1}, "ends within a field"},
		"cut in a value": {[]byte{3, 0, 2, 0, 'x'}, "ends within a field"},
		"twice":          {[]byte{15, 0, 0, 0, 15, 0, 0, 0}, "twice"},
		"driver":         {[]byte{3, 0, 2, 0, 'x', '\n'}, "is no name"},
		"VBIOS":          {[]byte{6, 0, 1, 0, 1}, "want 8"},
		"NVDEC0":         {[]byte{11, 0, 1, 0, 0}, "neither"},
		"FWID":           {[]byte{20, 0, 1, 0, 0}, "want 48"},
		"PPCIe":          {[]byte{21, 0, 2, 0, 0xaa, 0xaa}, "want 1"},
		"switches":       {[]byte{22, 0, 1, 0, 0}, "no list"},
		"mode":           {[]byte{36, 0, 2, 0, 3, 0}, "not known"},
		"mode's size":    {[]byte{36, 0, 1, 0, 0}, "want 2"},
	} {
		if _, err := parseOpaque(c.data); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	o, err := parseOpaque([]byte{21, 0, 1, 0, 0xaa, 36, 0, 2, 0, 2, 0, 22, 0, 16, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 99, 0, 0, 0})
	if err != nil || !o.ProtectedPCIe || *o.Feature != ProtectedPCIe || len(o.Switches) != 1 || o.Switches[0] != 1 || len(o.Unknown) != 1 {
		t.Errorf("%+v, %v", o, err)
	}
}

func sign(key *ecdsa.PrivateKey, data []byte) ([]byte, error) {
	digest := sha512.Sum384(data)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	return append(r.FillBytes(make([]byte, SignatureSize/2)), s.FillBytes(make([]byte, SignatureSize/2))...), nil
}

func FuzzParse(f *testing.F) {
	f.Add(sample(f, "hopper-report.bin"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Parse(data)
		if err == nil && len(r.signed)+len(r.signature) != len(data) {
			t.Error("bytes that nothing covers")
		}
	})
}

func FuzzChain(f *testing.F) {
	f.Add(sample(f, "hopper-chain.pem"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := VerifyChain(data, nvidia(), now())
		if err == nil && c.Leaf == nil {
			t.Error("a chain without leaf")
		}
	})
}

func FuzzParsePDI(f *testing.F) {
	f.Add("0x431d480fe5e87274")
	f.Add("431D480FE5E87274")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePDI(text)
		if err != nil {
			return
		}
		if again, err := ParsePDI(p.String()); err != nil || again != p || !strings.HasSuffix(p.String(), strings.TrimPrefix(strings.ToLower(text), "0x")) {
			t.Errorf("%q is read as %s, that as %s (%v)", text, p, again, err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	chain, report := sample(b, "hopper-chain.pem"), sample(b, "hopper-report.bin")
	for b.Loop() {
		if err := judge(report, chain); err != nil {
			b.Fatal(err)
		}
	}
}
