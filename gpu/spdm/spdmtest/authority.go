package spdmtest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"

	"github.com/confidential-node/agent/gpu/spdm"
)

// Authority plays the part of NVIDIA: a root, and below it what certifies the
// GPUs of each chip. Everything is valid from an hour before its making for a
// year.
type Authority struct {
	// Root is the one a verifier has to be told to accept.
	Root *x509.Certificate

	key *ecdsa.PrivateKey
	now time.Time
}

// NewAuthority issues "EMULATED NVIDIA Device Identity CA".
func NewAuthority(now time.Time) (*Authority, error) {
	a := &Authority{now: now}
	root, err := a.issue(spdm.EmulatedMark+" NVIDIA Device Identity CA", nil, nil, certificate{})
	if err != nil {
		return nil, err
	}
	a.Root, a.key = root.cert, root.key
	return a, nil
}

// RootPEM is the root as a file for `--allow-emulated-gpu-root`.
func (a *Authority) RootPEM() []byte { return encode(a.Root) }

// certificate is one with its key.
type certificate struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// issue makes a certificate under parent, a root where there is none. One
// with an extension is a leaf.
func (a *Authority) issue(name string, serial *big.Int, extension *pkix.Extension, parent certificate) (out certificate, err error) {
	if out.key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader); err != nil {
		return out, fmt.Errorf("making the key of %s: %w", name, err)
	}
	if serial == nil {
		if serial, err = rand.Int(rand.Reader, big.NewInt(1<<32)); err != nil {
			return out, fmt.Errorf("choosing the serial number of %s: %w", name, err)
		}
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: []string{"nodeagent tests, no silicon"}},
		NotBefore: a.now.Add(-time.Hour), NotAfter: a.now.AddDate(1, 0, 0),
		BasicConstraintsValid: true, IsCA: extension == nil, KeyUsage: x509.KeyUsageCertSign,
	}
	if extension != nil {
		template.KeyUsage, template.ExtraExtensions = x509.KeyUsageDigitalSignature, []pkix.Extension{*extension}
	}
	if parent.cert == nil {
		parent = certificate{template, out.key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent.cert, &out.key.PublicKey, parent.key)
	if err != nil {
		return out, fmt.Errorf("issuing %s: %w", name, err)
	}
	out.cert, err = x509.ParseCertificate(der)
	return out, err
}

// chain certifies a GPU as NVIDIA does: root, model, provisioner, identity
// (whose serial number is 0x41 and the PDI), and the firmware that signs.
func (a *Authority) chain(chip string, pdi spdm.PDI, fwid *pkix.Extension) (pemFile []byte, key *ecdsa.PrivateKey, err error) {
	serial := new(big.Int).Lsh(big.NewInt(0x41), 64)
	serial.Or(serial, new(big.Int).SetUint64(uint64(pdi)))
	parent := certificate{a.Root, a.key}
	certs := []*x509.Certificate{a.Root}
	for _, link := range []struct {
		name      string
		serial    *big.Int
		extension *pkix.Extension
	}{
		{"NVIDIA " + chip + " Identity", nil, nil},
		{"NVIDIA " + chip + " Provisioner ICA 1", nil, nil},
		{chip + " A01 GSP BROM", serial, nil},
		{chip + " A01 GSP FMC LF", nil, fwid},
	} {
		if parent, err = a.issue(link.name, link.serial, link.extension, parent); err != nil {
			return nil, nil, err
		}
		certs = append([]*x509.Certificate{parent.cert}, certs...)
	}
	return encode(certs...), parent.key, nil
}

func encode(certs ...*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range certs {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return out.Bytes()
}
