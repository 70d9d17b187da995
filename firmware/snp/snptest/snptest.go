// Package snptest makes certificate chains and signs reports in AMD's format,
// for tests and for the process that plays the PSP. No product code may
// import it: whoever holds such a key can mint evidence, so its roots always
// carry EMULATED in their names and no verifier accepts them unless told.
package snptest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// turinHWIDSize tells Turin's layout of a certificate from the older one.
const turinHWIDSize = 8

// Offsets of a report (AMD 56860) that signing needs.
const (
	signedSize    = 0x2A0
	componentSize = 72
)

// ProductEmulated stands in the leaf instead of a processor line.
const ProductEmulated = "Emulated"

// Chain is a root, an intermediate and a chip's key with its certificate.
type Chain struct {
	// Endorsements hold VCEK, ASK and ARK.
	contract.Endorsements
	// Root is the parsed ARK.
	Root *x509.Certificate
	// Key signs reports.
	Key *ecdsa.PrivateKey
}

// NewChain issues ARK-EMULATED, SEV-EMULATED and a VCEK for a chip (64 bytes
// of hwid, or 8 for Turin's layout) at a TCB. All are valid from an hour
// before now for a year.
func NewChain(product string, tcb contract.TCB, hwid []byte, now time.Time) (*Chain, error) {
	a, err := NewAuthority(now)
	if err != nil {
		return nil, err
	}
	vcek, key, err := a.VCEK(product, tcb, hwid)
	if err != nil {
		return nil, err
	}
	return &Chain{Endorsements: contract.Endorsements{VCEK: vcek.Raw, ASK: a.ASK.Raw, ARK: a.ARK.Raw}, Root: a.ARK, Key: key}, nil
}

func issue(name string, leaf []pkix.Extension, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, now time.Time) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generating key of %s: %w", name, err)
	}
	serial := new(big.Int) // AMD's leaves all have the serial number 0
	if leaf == nil {
		if serial, err = rand.Int(rand.Reader, big.NewInt(1<<32)); err != nil {
			return nil, nil, fmt.Errorf("choosing serial number of %s: %w", name, err)
		}
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: []string{"nodeagent tests, no silicon"}},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
		BasicConstraintsValid: true, IsCA: leaf == nil, ExtraExtensions: leaf,
	}
	if leaf == nil {
		template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		return nil, nil, fmt.Errorf("issuing %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}

func oid(suffix ...int) asn1.ObjectIdentifier {
	return append(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, suffix...)
}

// leafExtensions are those of AMD 57230, table "VCEK certificate"; owner is
// the hardware id of a VCEK or the CSP id of a VLEK.
func leafExtensions(product string, tcb contract.TCB, fmc bool, owner pkix.Extension) ([]pkix.Extension, error) {
	name, err := asn1.MarshalWithParams(product, "ia5")
	if err != nil {
		return nil, fmt.Errorf("encoding product: %w", err)
	}
	out := []pkix.Extension{{Id: oid(2), Value: name}, owner}
	for _, c := range []struct {
		suffix int
		value  uint8
	}{{1, tcb.BootLoader}, {2, tcb.TEE}, {3, tcb.SNP}, {8, tcb.Microcode}, {9, tcb.FMC}} {
		if c.suffix == 9 && !fmc {
			continue
		}
		value, err := asn1.Marshal(int(c.value))
		if err != nil {
			return nil, fmt.Errorf("encoding SPL: %w", err)
		}
		out = append(out, pkix.Extension{Id: oid(3, c.suffix), Value: value})
	}
	return out, nil
}

// Sign returns the report with its signature, R and S little endian.
func Sign(report []byte, key *ecdsa.PrivateKey) ([]byte, error) {
	if len(report) != snp.ReportSize {
		return nil, fmt.Errorf("signing report: %d bytes, want %d", len(report), snp.ReportSize)
	}
	sum := sha512.Sum384(report[:signedSize])
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		return nil, fmt.Errorf("signing report: %w", err)
	}
	out := slices.Clone(report)
	for i, v := range []*big.Int{r, s} {
		component := v.FillBytes(make([]byte, componentSize))
		slices.Reverse(component)
		copy(out[signedSize+i*componentSize:], component)
	}
	return out, nil
}
