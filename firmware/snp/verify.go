package snp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Verify judges a report with its endorsements. It never stops at the first
// failure unless nothing after it could be said.
func Verify(report []byte, e contract.Endorsements, x Expect) Result {
	r, err := ParseReport(report)
	if err != nil {
		var res Result
		res.Add("report", false, "", "", "", err.Error()+"; this is not evidence, or it was changed on the way")
		return res
	}
	return judge(r, report, endorse(e, &x.AppraisalPolicy), &x)
}

// endorser is the key that may have signed a report, and what its certificates
// are worth.
type endorser struct {
	// leaf is nil when there is no root to start from or no usable leaf.
	leaf     *leaf
	root     *x509.Certificate
	emulated bool
	// chain tells that leaf ← ASK ← root holds.
	chain bool
	Result
}

// endorse judges the certificates on their own: root, chain, revocation.
func endorse(e contract.Endorsements, a *AppraisalPolicy) *endorser {
	var s endorser
	var err error
	if s.root, s.emulated, err = findRoot(e.ARK, a.EmulatedRoots); err != nil {
		s.Add("root", false, "", "", "", err.Error())
		return &s
	}
	kind := "AMD's pinned root " + s.root.Subject.CommonName
	if s.emulated {
		kind = "an EMULATED root, allowed by you: no silicon stands behind this"
		s.warn("root", kind)
	}
	s.Add("root", true, "", s.root.Subject.CommonName, kind, "")
	l, err := parseLeaf(e.VCEK)
	if err != nil {
		s.Add("chain", false, "", "", "", fmt.Sprintf("the certificate of the signing key cannot be used: %v; fetch the VCEK of this chip from AMD's key service", err))
		return &s
	}
	s.leaf = l
	err = verifyChain(l, e.ASK, s.root, a.Now)
	s.chain = err == nil
	s.Add("chain", s.chain, "", l.cert.Subject.CommonName, "certificate chain from the signing key to the root holds",
		fmt.Sprintf("the certificate chain does not hold: %v; fetch VCEK and ASK anew, and compare this machine's clock", err))
	crl := a.CRL
	if crl == nil {
		crl = e.CRL
	}
	s.revoked(crl, e.ASK, s.root, a)
	return &s
}

// judge puts a report to its endorser and to a relying party's demands.
func judge(r *Report, raw []byte, s *endorser, x *Expect) Result {
	var res Result
	res.Add("report", true, "", fmt.Sprint(r.Version), fmt.Sprintf("an attestation report of version %d", r.Version), "")
	res.signingKey(r, s.leaf, x)
	res.Checks = append(res.Checks, s.Checks...)
	res.Warnings = append(res.Warnings, s.Warnings...)
	if s.leaf != nil {
		res.endorsed(r, raw, s, x)
	}
	res.guest(r, x)
	return res
}

// signingKey checks which kind of key the report says it was signed by.
func (res *Result) signingKey(r *Report, l *leaf, x *Expect) {
	want, key := keyVCEK, ""
	switch r.SigningKey() {
	case SignerVCEK:
		key = keyVCEK
	case SignerVLEK:
		key = keyVLEK
	}
	if x.AllowVLEK {
		want += " or " + keyVLEK
	}
	holds := r.SigAlgo == signatureAlgorithm && !r.ChipKeyMasked() && r.SignerInfo&^signerInfoKnown == 0 &&
		(key == keyVCEK || key == keyVLEK && x.AllowVLEK) && (l == nil || l.key() == key)
	res.Add("signing-key", holds, want+", ECDSA P-384", strings.TrimSpace(fmt.Sprintf("%s signer info %#x, algorithm %d", key, r.SignerInfo, r.SigAlgo)),
		"signed by a "+key, "the report is not signed by the chip's own key, or its certificate is for the other kind; the provider must neither mask the key (MASK_CHIP_KEY) nor force a VLEK that you do not allow")
	if holds && key == keyVLEK {
		res.warn("signing-key", "signed by a cloud provider's VLEK, which names no chip: any processor the provider has could have signed")
	}
}

// endorsed checks who signed: signature, product, leaf binding, platform.
func (res *Result) endorsed(r *Report, raw []byte, s *endorser, x *Expect) {
	signed := signatureHolds(r, raw, s.leaf)
	res.Add("signature", signed, "", "", "the report is signed by that key", "the signature does not match: the report was changed or another chip made it; do not use this host until it shows a report and a VCEK that match")
	product, err := productOf(r, s)
	if err != nil {
		res.Add("product", false, "", s.leaf.product, "", err.Error()+"; use a host of the Genoa or Turin line")
		return
	}
	why := x.excluded(product)
	res.Add("product", why == "", "", product.Name, "processor line "+product.Name, why+"; use a host of another line, or allow this one knowingly")
	if risk := defaultExclusion(product); risk != "" && why == "" {
		res.warn("product", "allowed by you although "+risk)
	}
	if s.chain && signed {
		res.Signer = signerOf(r, s, product)
	}
	res.bound(r, s.leaf, product)
	res.platform(r, product, x)
}

func signerOf(r *Report, s *endorser, p Product) *Signer {
	signer := &Signer{
		Product: p.Name, Key: s.leaf.key(), CSP: s.leaf.csp, ChipID: hex.EncodeToString(s.leaf.hwid),
		TCB: p.TCB(r.ReportedTCB), Firmware: r.CurrentVersion.String(), Emulated: s.emulated,
	}
	if processor, err := ProcessorByCPUID(r.Family, r.Model); err == nil && r.Version >= version3 {
		signer.Processor, signer.Generation = processor.Name, processor.Generation
	}
	return signer
}

// productOf takes the processor from the report (version 3 and later) and
// demands that the certificate agrees; before, only the certificate knows.
func productOf(r *Report, s *endorser) (Product, error) {
	l := s.leaf
	p, err := ProductByName(l.product)
	if r.Version >= version3 {
		if p, err = productByCPUID(r.Family, r.Model); err == nil && l.product != p.Name && (!s.emulated || l.product != "Emulated") {
			err = fmt.Errorf("the report is from a %s, its certificate for a %s", p.Name, l.product)
		}
	}
	if err == nil && !s.emulated && s.root.Subject.CommonName != "ARK-"+p.Name {
		err = fmt.Errorf("the certificate is for a %s, its root %s of another line", p.Name, s.root.Subject.CommonName)
	}
	return p, err
}

// signatureHolds checks ECDSA over the signed part; R and S are little endian.
func signatureHolds(r *Report, raw []byte, l *leaf) bool {
	key, ok := l.cert.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return false
	}
	sum := sha512.Sum384(raw[:signedSize])
	component := func(b []byte) *big.Int {
		b = slices.Clone(b)
		slices.Reverse(b)
		return new(big.Int).SetBytes(b)
	}
	return ecdsa.Verify(key, sum[:], component(r.Signature[:componentSize]), component(r.Signature[componentSize:]))
}

// bound checks that the certificate was made for this chip at this TCB.
func (res *Result) bound(r *Report, l *leaf, p Product) {
	if l.key() == keyVLEK {
		res.Skip("chip-id", "a VLEK names no chip; it is "+l.csp+"'s")
	} else {
		id, rest := r.ChipID[:p.hwidSize], r.ChipID[p.hwidSize:]
		res.Add("chip-id", bytes.Equal(l.hwid, id) && len(bytes.Trim(rest, "\x00")) == 0 && len(bytes.Trim(id, "\x00")) > 0,
			hex.EncodeToString(l.hwid), hex.EncodeToString(r.ChipID[:]), "the certificate is this chip's",
			"the certificate is for another chip, or the host masks its chip id (MASK_CHIP_ID)")
	}
	reported := p.TCB(r.ReportedTCB)
	res.Add("tcb-binding", reported == l.tcb && p.hasFMC == l.hasFMC, l.tcb.String(), reported.String(), "the certificate is for the reported TCB",
		"the certificate is for another TCB; the host must fetch the one for the TCB it reports")
}
