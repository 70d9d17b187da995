package snptest

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// Authority plays the part of AMD: a root with an intermediate for VCEKs and
// one for VLEKs, all valid from an hour before their making for a year.
type Authority struct {
	ARK, ASK, ASVK *x509.Certificate

	arkKey, askKey, asvkKey *ecdsa.PrivateKey
	now                     time.Time
}

// NewAuthority issues ARK-EMULATED, SEV-EMULATED and SEV-VLEK-EMULATED.
func NewAuthority(now time.Time) (*Authority, error) {
	a := &Authority{now: now}
	var err error
	if a.ARK, a.arkKey, err = issue("ARK-"+snp.EmulatedMark, nil, nil, nil, now); err != nil {
		return nil, err
	}
	if a.ASK, a.askKey, err = issue("SEV-"+snp.EmulatedMark, nil, a.ARK, a.arkKey, now); err != nil {
		return nil, err
	}
	if a.ASVK, a.asvkKey, err = issue("SEV-VLEK-"+snp.EmulatedMark, nil, a.ARK, a.arkKey, now); err != nil {
		return nil, err
	}
	return a, nil
}

// VCEK issues the certificate of a chip (64 bytes of hwid, or 8 for Turin's
// layout) at a TCB.
func (a *Authority) VCEK(product string, tcb contract.TCB, hwid []byte) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	extensions, err := leafExtensions(product, tcb, len(hwid) == turinHWIDSize, pkix.Extension{Id: oid(4), Value: hwid})
	if err != nil {
		return nil, nil, err
	}
	return issue("SEV-VCEK-"+snp.EmulatedMark, extensions, a.ASK, a.askKey, a.now)
}

// VLEK issues a cloud provider's certificate at a TCB.
func (a *Authority) VLEK(product, csp string, tcb contract.TCB) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	name, err := asn1.MarshalWithParams(csp, "ia5")
	if err != nil {
		return nil, nil, fmt.Errorf("encoding CSP id: %w", err)
	}
	extensions, err := leafExtensions(product, tcb, product == snp.ProductTurin, pkix.Extension{Id: oid(5), Value: name})
	if err != nil {
		return nil, nil, err
	}
	return issue("SEV-VLEK-LEAF-"+snp.EmulatedMark, extensions, a.ASVK, a.asvkKey, a.now)
}

// CRL signs a revocation list of the root, current from one time to the other.
func (a *Authority) CRL(this, next time.Time, revoked ...*x509.Certificate) ([]byte, error) {
	list := &x509.RevocationList{Number: big.NewInt(this.Unix()), ThisUpdate: this, NextUpdate: next}
	for _, cert := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: this})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.ARK, a.arkKey)
	if err != nil {
		return nil, fmt.Errorf("signing CRL: %w", err)
	}
	return der, nil
}
