package spdm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"
)

// MaxChainBytes bounds a chain in PEM, maxChain its certificates.
const (
	MaxChainBytes = 64 << 10
	maxChain      = 8
)

// Fingerprint is the SHA-256 of a certificate's DER, by which roots are
// pinned.
type Fingerprint [sha256.Size]byte

// FingerprintOf is that of a certificate.
func FingerprintOf(c *x509.Certificate) Fingerprint { return sha256.Sum256(c.Raw) }

// NVIDIARoot is that of "NVIDIA Device Identity CA", the root of all GPUs
// since Hopper.
func NVIDIARoot() Fingerprint {
	return fingerprint("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48")
}

func fingerprint(text string) Fingerprint {
	raw, err := hex.DecodeString(text)
	if err != nil {
		panic(err) // a constant of this package
	}
	return Fingerprint(raw)
}

// Chain is a GPU's certificates, leaf first, that lead to a pinned root.
type Chain struct {
	Leaf *x509.Certificate
	// key is the leaf's, ECDSA P-384.
	key *ecdsa.PublicKey
	// Product is the chip as its certificates name it, "GH100" or "GB100".
	Product string
	// PDI is that of the GPU, from its identity certificate.
	PDI PDI
	// FWID is the identity of the firmware that the leaf was issued to.
	FWID Digest
	// Root is the pinned one that the chain leads to.
	Root Fingerprint
}

// oidFWID is TCG DICE's multi-version FWID extension as Hopper has it, oidTCB
// the TcbInfo below it of Blackwell. Either ends in a digest (TCG DICE
// Attestation Architecture 1.1, section 6.1).
func oidFWID() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1} }
func oidTCB() asn1.ObjectIdentifier  { return asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1, 1} }

// VerifyChain reads certificates in PEM, leaf first, and follows them up to
// one of the pinned roots. The root is never taken from the chain: a
// certificate that is not pinned roots nothing. Revocation is not asked for:
// that needs NVIDIA's OCSP service.
func VerifyChain(data []byte, roots []Fingerprint, now time.Time) (*Chain, error) {
	certs, err := parseChain(data)
	if err != nil {
		return nil, err
	}
	root, err := FollowToRoot(certs, roots, now)
	if err != nil {
		return nil, fmt.Errorf("GPU certificates: %w", err)
	}
	c, err := describe(certs)
	if err != nil {
		return nil, err
	}
	c.Root = root
	return c, nil
}

// FollowToRoot verifies the first certificate by the others, up to one among
// them that is pinned, and returns which.
func FollowToRoot(certs []*x509.Certificate, pinned []Fingerprint, now time.Time) (Fingerprint, error) {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	var root Fingerprint
	for _, c := range certs[1:] {
		switch sum := FingerprintOf(c); {
		case !slices.Contains(pinned, sum):
			between.AddCert(c)
		case root == Fingerprint{} || root == sum:
			root = sum
			roots.AddCert(c)
		default:
			return root, errors.New("they hold two roots")
		}
	}
	if root == (Fingerprint{}) {
		return root, fmt.Errorf("they lead to %q, not to the pinned root", certs[len(certs)-1].Subject.CommonName)
	}
	_, err := certs[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return root, err
}

func parseChain(data []byte) ([]*x509.Certificate, error) {
	if len(data) > MaxChainBytes {
		return nil, fmt.Errorf("GPU certificates: %d bytes, at most %d are read", len(data), MaxChainBytes)
	}
	var certs []*x509.Certificate
	for len(bytes.TrimSpace(data)) > 0 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("GPU certificates: not a PEM file of certificates")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("GPU certificates: %w", err)
		}
		if certs = append(certs, c); len(certs) > maxChain {
			return nil, fmt.Errorf("GPU certificates: more than %d", maxChain)
		}
	}
	if len(certs) < 2 {
		return nil, fmt.Errorf("GPU certificates: %d, want the leaf and those up to NVIDIA's root", len(certs))
	}
	return certs, nil
}

// describe reads what leaf and identity certificate tell.
func describe(certs []*x509.Certificate) (*Chain, error) {
	c := &Chain{Leaf: certs[0]}
	var isECDSA bool
	if c.key, isECDSA = c.Leaf.PublicKey.(*ecdsa.PublicKey); !isECDSA || c.key.Curve != elliptic.P384() {
		return nil, errors.New("GPU certificates: the leaf's key is not ECDSA P-384")
	}
	c.Product, _, _ = strings.Cut(c.Leaf.Subject.CommonName, " ")
	// The identity certificate's serial is the PDI behind one byte, 0x41 or
	// 0x40 depending on which root of trust returned the chain.
	serial := certs[1].SerialNumber.Bytes()
	if len(serial) != 9 || serial[0]&^1 != 0x40 {
		return nil, fmt.Errorf("GPU certificates: %q has the serial number %x, not one byte and a PDI", certs[1].Subject.CommonName, serial)
	}
	for _, b := range serial[1:] {
		c.PDI = c.PDI<<8 | PDI(b)
	}
	for _, ext := range c.Leaf.Extensions {
		if !ext.Id.Equal(oidFWID()) && !ext.Id.Equal(oidTCB()) {
			continue
		}
		if len(ext.Value) < DigestSize {
			return nil, fmt.Errorf("GPU certificates: the FWID extension has %d bytes", len(ext.Value))
		}
		var err error
		if c.FWID, err = firstFWID(ext.Value, ext.Id.Equal(oidTCB())); err != nil {
			return nil, err
		}
		return c, nil
	}
	return nil, errors.New("GPU certificates: the leaf names no firmware (FWID)")
}

// fwid is DICE's FWID: the hash algorithm and the digest.
type fwid struct {
	Algorithm asn1.ObjectIdentifier
	Digest    []byte
}

// firstFWID reads the digest out of the extension: Hopper's CompositeDeviceID
// holds it beside a key, Blackwell's TcbInfo in its list of FWIDs.
func firstFWID(der []byte, isTCB bool) (Digest, error) {
	var f fwid
	if isTCB {
		var info struct {
			Vendor  string        `asn1:"optional,utf8,tag:0"`
			Model   string        `asn1:"optional,utf8,tag:1"`
			Version string        `asn1:"optional,utf8,tag:2"`
			SVN     *big.Int      `asn1:"optional,tag:3"`
			Layer   *big.Int      `asn1:"optional,tag:4"`
			Index   *big.Int      `asn1:"optional,tag:5"`
			FWIDs   []fwid        `asn1:"optional,tag:6"`
			Rest    asn1.RawValue `asn1:"optional"`
		}
		if _, err := asn1.Unmarshal(der, &info); err != nil || len(info.FWIDs) == 0 {
			return Digest{}, fmt.Errorf("GPU certificates: the leaf's TcbInfo has no FWID: %w", err)
		}
		f = info.FWIDs[0]
	} else {
		var id struct {
			Version int
			Key     asn1.RawValue
			FWID    fwid
		}
		if _, err := asn1.Unmarshal(der, &id); err != nil {
			return Digest{}, fmt.Errorf("GPU certificates: the leaf's FWID: %w", err)
		}
		f = id.FWID
	}
	if sha384 := (asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}); !f.Algorithm.Equal(sha384) || len(f.Digest) != DigestSize {
		return Digest{}, fmt.Errorf("GPU certificates: the FWID is %d bytes of %v, not SHA-384", len(f.Digest), f.Algorithm)
	}
	return Digest(f.Digest), nil
}

// Verify says whether the GPU of the chain signed the report, and whether its
// firmware is the one its certificate was issued to. The caller compares the
// nonce.
func (r *Report) Verify(c *Chain) error {
	digest := sha512.Sum384(r.signed)
	half := SignatureSize / 2
	if !ecdsa.Verify(c.key, digest[:], new(big.Int).SetBytes(r.signature[:half]), new(big.Int).SetBytes(r.signature[half:])) {
		return errors.New("GPU report: the signature is not that of the GPU of these certificates")
	}
	if r.Opaque.FWID == nil || *r.Opaque.FWID != c.FWID {
		return errors.New("GPU report: its firmware (FWID) is not the one that the certificate was issued to")
	}
	return nil
}
