package snp

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Identity is what AMD derives a chip's endorsement key from.
type Identity struct {
	Product Product
	// HWID is the part of CHIP_ID that means something: 64 bytes, 8 on Turin.
	HWID []byte
	// TCB is the one the platform reports.
	TCB contract.TCB
}

// NewIdentity checks that a chip of the product may have this id, whole
// (CHIP_ID, 64 bytes) or only its meaning part, and this TCB.
func NewIdentity(product string, chipID []byte, tcb contract.TCB) (Identity, error) {
	p, err := ProductByName(product)
	if err != nil {
		return Identity{}, err
	}
	hwid := chipID
	if len(chipID) == len(Report{}.ChipID) {
		var rest []byte
		if hwid, rest = chipID[:p.hwidSize], chipID[p.hwidSize:]; len(bytes.Trim(rest, "\x00")) > 0 {
			return Identity{}, fmt.Errorf("a chip id of %s has %d bytes and then zeros, this one goes on", p.Name, p.hwidSize)
		}
	}
	if len(hwid) != p.hwidSize {
		return Identity{}, fmt.Errorf("a chip id of %s has %d bytes, this one has %d", p.Name, p.hwidSize, len(chipID))
	}
	if len(bytes.Trim(hwid, "\x00")) == 0 {
		return Identity{}, errors.New("the chip id is zero: the host masks it (MASK_CHIP_ID)")
	}
	if !p.hasFMC && tcb.FMC != 0 {
		return Identity{}, fmt.Errorf("a TCB of %s has no FMC component", p.Name)
	}
	return Identity{Product: p, HWID: bytes.Clone(hwid), TCB: tcb}, nil
}

// HasFMC reports whether the line's TCB has an FMC component.
func (p Product) HasFMC() bool { return p.hasFMC }

// PinnedRoots returns AMD's ARKs by product line.
func PinnedRoots() (map[string]*x509.Certificate, error) {
	pinned, err := amdRoots()
	if err != nil {
		return nil, err
	}
	roots := map[string]*x509.Certificate{}
	for _, ark := range pinned {
		roots[strings.TrimPrefix(ark.Subject.CommonName, "ARK-")] = ark
	}
	return roots, nil
}

// CheckIntermediate says why der is not an ASK (or, for VLEKs, an ASVK) that
// the root issued and that is valid at a time.
func CheckIntermediate(der []byte, vlek bool, root *x509.Certificate, now time.Time) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("parsing certificate: %w", err)
	}
	if strings.HasPrefix(cert.Subject.CommonName, asvkPrefix) != vlek {
		return fmt.Errorf("%s is the intermediate for the other kind of key", cert.Subject.CommonName)
	}
	if !cert.IsCA || bytes.Equal(cert.Raw, root.Raw) {
		return fmt.Errorf("%s is not an intermediate", cert.Subject.CommonName)
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	_, err = cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

// CheckVCEK says why der is not the certificate of this chip at this TCB,
// issued under ask and the root and valid at a time.
func CheckVCEK(der, ask []byte, root *x509.Certificate, id Identity, now time.Time) error {
	l, err := parseLeaf(der)
	if err != nil {
		return err
	}
	if !bytes.Equal(l.hwid, id.HWID) {
		return fmt.Errorf("it is for chip %x, not %x", l.hwid, id.HWID)
	}
	if err := l.fits(id.Product, id.TCB); err != nil {
		return err
	}
	return verifyChain(l, ask, root, now)
}

// CheckVLEK says why der is not a VLEK of this product at this TCB, issued
// under asvk and the root and valid at a time.
func CheckVLEK(der, asvk []byte, root *x509.Certificate, p Product, tcb contract.TCB, now time.Time) error {
	l, err := parseLeaf(der)
	if err != nil {
		return err
	}
	if l.hwid != nil {
		return errors.New("it names a chip: it is a VCEK, not a VLEK")
	}
	if err := l.fits(p, tcb); err != nil {
		return err
	}
	return verifyChain(l, asvk, root, now)
}

// ReadLeaf returns for which product and TCB a VCEK or VLEK was made, as it
// says itself: nothing is verified.
func ReadLeaf(der []byte) (Product, contract.TCB, error) {
	l, err := parseLeaf(der)
	if err != nil {
		return Product{}, contract.TCB{}, err
	}
	p, err := ProductByName(l.product)
	if err == nil && p.hasFMC != l.hasFMC {
		err = fmt.Errorf("it does not state its TCB in the layout of %s", p.Name)
	}
	return p, l.tcb, err
}

// CheckSigned says why e are not the certificates behind a report: their leaf
// signed it, and stands under one of AMD's roots or of those given. It is for
// whoever has to choose among certificates without a clock to trust, and looks
// at no date but the leaf's first; what they are worth is for Verify to say.
func CheckSigned(report []byte, e contract.Endorsements, emulated []*x509.Certificate) error {
	r, err := ParseReport(report)
	if err != nil {
		return err
	}
	root, _, err := findRoot(e.ARK, emulated)
	if err != nil {
		return err
	}
	l, err := parseLeaf(e.VCEK)
	if err != nil {
		return err
	}
	if !signatureHolds(r, report, l) {
		return fmt.Errorf("the key of %s did not sign the report", l.cert.Subject.CommonName)
	}
	return verifyChain(l, e.ASK, root, l.cert.NotBefore)
}

func (l *leaf) fits(p Product, tcb contract.TCB) error {
	if l.product != p.Name {
		return fmt.Errorf("it is for a %s, not a %s", l.product, p.Name)
	}
	if l.tcb != tcb || l.hasFMC != p.hasFMC {
		return fmt.Errorf("it is for TCB %s, not %s", l.tcb, tcb)
	}
	return nil
}
