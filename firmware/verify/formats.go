package verify

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/proto/sevsnp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// Format is a form that evidence comes in.
type Format int

// Forms of evidence.
const (
	// FormatBundle is a contract.Evidence, JSON.
	FormatBundle Format = iota
	// FormatReport is the 1184 bytes of an attestation report.
	FormatReport
	// FormatAttestation is go-sev-guest's sevsnp.Attestation, protobuf.
	FormatAttestation
)

// MaxCertificatesBytes bounds the input of ParseCertificates and
// MaxCRLBytes that of DecodeCRL.
const (
	MaxCertificatesBytes = 64 << 10
	MaxCRLBytes          = 1 << 20
)

// Detect tells the forms apart: JSON starts with a brace, a report with its
// version and has a fixed size.
func Detect(data []byte) Format {
	switch {
	case bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")):
		return FormatBundle
	case len(data) == snp.ReportSize:
		return FormatReport
	}
	return FormatAttestation
}

// ParseAttestation decodes a sevsnp.Attestation of at most
// contract.MaxEvidenceBytes into the report that was signed and its
// certificates. Fields this version does not know are refused; certificates
// that are in no chain up to AMD (firmware, extras) are left out.
func ParseAttestation(data []byte) ([]byte, contract.Endorsements, error) {
	var e contract.Endorsements
	fail := func(err error) ([]byte, contract.Endorsements, error) {
		return nil, contract.Endorsements{}, fmt.Errorf("parsing attestation: %w", err)
	}
	if len(data) > contract.MaxEvidenceBytes {
		return fail(fmt.Errorf("%d bytes, at most %d are read", len(data), contract.MaxEvidenceBytes))
	}
	var a sevsnp.Attestation
	if err := proto.Unmarshal(data, &a); err != nil {
		return fail(err)
	}
	chain := a.GetCertificateChain()
	for _, m := range []protoreflect.ProtoMessage{&a, a.GetReport(), chain} {
		if unknown := m.ProtoReflect().GetUnknown(); len(unknown) > 0 {
			return fail(fmt.Errorf("%d bytes of fields that are not known", len(unknown)))
		}
	}
	if a.GetReport() == nil {
		return fail(errors.New("it holds no report"))
	}
	report, err := abi.ReportToAbiBytes(a.GetReport())
	if err != nil {
		return fail(err)
	}
	if len(chain.GetVcekCert()) > 0 && len(chain.GetVlekCert()) > 0 {
		return fail(errors.New("it holds a VCEK and a VLEK, of which only one can have signed"))
	}
	e.VCEK = chain.GetVcekCert()
	if len(e.VCEK) == 0 {
		e.VCEK = chain.GetVlekCert()
	}
	e.ASK, e.ARK = chain.GetAskCert(), chain.GetArkCert()
	return report, e, nil
}

// ParseCertificates sorts PEM certificates, in any order and over any number
// of files, into VCEK or VLEK, ASK or ASVK, and ARK. It verifies nothing.
func ParseCertificates(files ...[]byte) (contract.Endorsements, error) {
	var e contract.Endorsements
	for _, rest := range files {
		if len(rest) > MaxCertificatesBytes {
			return contract.Endorsements{}, fmt.Errorf("parsing certificates: %d bytes, at most %d are read", len(rest), MaxCertificatesBytes)
		}
		for len(bytes.TrimSpace(rest)) > 0 {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
				return contract.Endorsements{}, errors.New("parsing certificates: not a PEM file of certificates")
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return contract.Endorsements{}, fmt.Errorf("parsing certificates: %w", err)
			}
			slot, what := &e.ASK, "ASK"
			switch {
			case isLeaf(cert):
				slot, what = &e.VCEK, "VCEK or VLEK"
			case bytes.Equal(cert.RawSubject, cert.RawIssuer):
				slot, what = &e.ARK, "ARK"
			}
			if *slot != nil {
				return contract.Endorsements{}, fmt.Errorf("parsing certificates: %s is a second %s; give those of one chain", cert.Subject.CommonName, what)
			}
			*slot = block.Bytes
		}
	}
	return e, nil
}

// isLeaf tells a certificate with AMD's product name extension, which only
// those of signing keys have (AMD 57230).
func isLeaf(cert *x509.Certificate) bool {
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1, 2}) {
			return true
		}
	}
	return false
}

// DecodeCRL returns the DER of a revocation list given as PEM or DER; who
// signed it is checked where it is used.
func DecodeCRL(data []byte) ([]byte, error) {
	if block, _ := pem.Decode(data); block != nil {
		data = block.Bytes
	}
	if _, err := x509.ParseRevocationList(data); err != nil {
		return nil, fmt.Errorf("parsing CRL: %w", err)
	}
	return data, nil
}
