package snp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-sev-guest/verify/trust"

	"github.com/confidential-node/agent/firmware/contract"
)

// EmulatedMark must stand in the subject of every emulated root, and stands
// in no AMD certificate.
const EmulatedMark = "EMULATED"

// oidAMD prefixes the extensions of VCEK and VLEK (AMD 57230).
func oidAMD(suffix ...int) asn1.ObjectIdentifier {
	return append(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, suffix...)
}

// leaf is what a VCEK or VLEK says about the processor.
type leaf struct {
	cert *x509.Certificate
	// product is the name up to the first dash ("Milan-B0" is "Milan").
	product string
	tcb     contract.TCB
	// hasFMC says that tcb.FMC was stated and not merely left out.
	hasFMC bool
	// hwid is nil in a VLEK.
	hwid []byte
	// csp is the cloud provider that holds a VLEK, "" in a VCEK.
	csp string
}

// key is the kind of key that the certificate is for.
func (l *leaf) key() string {
	if l.csp != "" {
		return keyVLEK
	}
	return keyVCEK
}

// Kinds of endorsement keys.
const (
	keyVCEK = "VCEK"
	keyVLEK = "VLEK"
)

// asvkPrefix starts the subject of the intermediate that issues VLEKs, and of
// no other (AMD 57230).
const asvkPrefix = "SEV-VLEK-"

// OID suffixes of the security patch levels below .3.
const (
	splBootLoader = 1
	splTEE        = 2
	splSNP        = 3
	splMicrocode  = 8
	splFMC        = 9
)

func parseLeaf(der []byte) (*leaf, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parsing certificate: %w", err)
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() {
		return nil, errors.New("parsing certificate: key is not ECDSA P-384")
	}
	l := &leaf{cert: cert}
	stated := map[int]bool{}
	for _, ext := range cert.Extensions {
		switch id := ext.Id; {
		case id.Equal(oidAMD(2)):
			name, err := ia5("product name", ext.Value)
			if err != nil {
				return nil, err
			}
			l.product, _, _ = strings.Cut(name, "-")
		case id.Equal(oidAMD(4)):
			l.hwid = ext.Value
		case id.Equal(oidAMD(5)):
			if l.csp, err = ia5("CSP id", ext.Value); err != nil {
				return nil, err
			}
		default:
			suffix, component := l.component(id)
			if component == nil {
				continue
			}
			stated[suffix] = true
			if *component, err = spl(ext.Value); err != nil {
				return nil, err
			}
		}
	}
	// A level that is left out would read as zero and match a report's zero.
	for _, suffix := range []int{splBootLoader, splTEE, splSNP, splMicrocode} {
		if !stated[suffix] {
			return nil, fmt.Errorf("parsing certificate: no extension %v", oidAMD(3, suffix))
		}
	}
	l.hasFMC = stated[splFMC]
	if l.product == "" {
		return nil, errors.New("parsing certificate: no product name extension")
	}
	if (l.hwid == nil) == (l.csp == "") {
		return nil, errors.New("parsing certificate: it must either name a chip (VCEK) or a cloud provider (VLEK)")
	}
	return l, nil
}

func (l *leaf) component(id asn1.ObjectIdentifier) (int, *uint8) {
	for suffix, field := range map[int]*uint8{
		splBootLoader: &l.tcb.BootLoader, splTEE: &l.tcb.TEE, splSNP: &l.tcb.SNP, splMicrocode: &l.tcb.Microcode, splFMC: &l.tcb.FMC,
	} {
		if id.Equal(oidAMD(3, suffix)) {
			return suffix, field
		}
	}
	return 0, nil
}

func ia5(what string, der []byte) (string, error) {
	var s string
	rest, err := asn1.UnmarshalWithParams(der, &s, "ia5")
	if err != nil || len(rest) > 0 || der[0] != asn1.TagIA5String { // the package takes other string types too
		return "", fmt.Errorf("parsing certificate: %s is not an IA5String", what)
	}
	return s, nil
}

func spl(der []byte) (uint8, error) {
	var v int
	rest, err := asn1.Unmarshal(der, &v)
	if err != nil || len(rest) > 0 || v < 0 || v > 255 {
		return 0, errors.New("parsing certificate: SPL is not an INTEGER of 0..255")
	}
	return uint8(v), nil
}

// amdRoots returns the pinned ARK of every product line, from go-sev-guest.
func amdRoots() ([]*x509.Certificate, error) {
	var roots []*x509.Certificate
	for _, line := range []string{ProductMilan, ProductGenoa, ProductTurin} {
		pinned, err := trust.GetDefaultRootCerts(line)
		if err != nil {
			return nil, fmt.Errorf("reading pinned AMD roots: %w", err)
		}
		if pinned.ProductCerts == nil || pinned.ProductCerts.Ark == nil {
			return nil, fmt.Errorf("reading pinned AMD roots: no ARK of %s", line)
		}
		roots = append(roots, pinned.ProductCerts.Ark)
	}
	return roots, nil
}

// ParseEmulatedRoot reads the certificate of an emulated root, PEM or DER. Any
// other certificate is refused: Expect.EmulatedRoots would not count it.
func ParseEmulatedRoot(data []byte) (*x509.Certificate, error) {
	if block, _ := pem.Decode(data); block != nil {
		data = block.Bytes
	}
	root, err := x509.ParseCertificate(data)
	if err != nil {
		return nil, fmt.Errorf("parsing emulated root: %w", err)
	}
	if !strings.Contains(root.Subject.CommonName, EmulatedMark) {
		return nil, fmt.Errorf("parsing emulated root: %q does not say %s; AMD's roots are built in, and no other may be added", root.Subject.CommonName, EmulatedMark)
	}
	return root, nil
}

// findRoot returns the pinned or allowed root that the supplied ARK is, byte
// for byte; emulated tells which kind it was.
func findRoot(ark []byte, extra []*x509.Certificate) (root *x509.Certificate, emulated bool, err error) {
	if len(ark) == 0 {
		return nil, false, errors.New("there is no root certificate (ARK) with the report; take that of the processor's product line from AMD's key service")
	}
	pinned, err := amdRoots()
	if err != nil {
		return nil, false, err
	}
	for _, r := range pinned {
		if bytes.Equal(r.Raw, ark) {
			return r, false, nil
		}
	}
	for _, r := range extra {
		if bytes.Equal(r.Raw, ark) && strings.Contains(r.Subject.CommonName, EmulatedMark) {
			return r, true, nil
		}
	}
	if cert, err := x509.ParseCertificate(ark); err == nil && strings.Contains(cert.Subject.CommonName, EmulatedMark) {
		return nil, true, errors.New("the root is an EMULATED one that was not allowed: no silicon stands behind this evidence; allow the root by name for a trial, never for secrets")
	}
	return nil, false, errors.New("the supplied root is not one of AMD's pinned ARKs; take the ARK of the processor's product line from AMD's key service, byte for byte")
}

// verifyChain checks leaf ← ASK (or ASVK) ← root at a time.
func verifyChain(l *leaf, ask []byte, root *x509.Certificate, now time.Time) error {
	middle, err := x509.ParseCertificate(ask)
	if err != nil {
		return fmt.Errorf("parsing ASK: %w", err)
	}
	if strings.HasPrefix(middle.Subject.CommonName, asvkPrefix) != (l.key() == keyVLEK) {
		return fmt.Errorf("%s does not issue a %s", middle.Subject.CommonName, l.key())
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	intermediates.AddCert(middle)
	_, err = l.cert.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return err
}
