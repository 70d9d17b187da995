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
	"slices"
	"sync"
	"time"

	"github.com/confidential-node/agent/gpu/spdm"
)

// emulated stands in the name of the root: no verifier can be told to accept
// another.
const emulated = "EMULATED"

// Authority plays the part of NVIDIA: a root, and below it what certifies the
// GPUs of each chip. Everything is valid from an hour before its making for a
// year.
type Authority struct {
	// Root is the one a verifier has to be told to accept.
	Root *x509.Certificate

	key *ecdsa.PrivateKey
	now time.Time

	mu sync.Mutex
	// lines are the certificates of chips between root and identity, lowest
	// first.
	lines map[string][]certificate
}

// NewAuthority issues "EMULATED NVIDIA Device Identity CA".
func NewAuthority(now time.Time) (*Authority, error) {
	a := &Authority{now: now, lines: map[string][]certificate{}}
	root, err := a.issue(emulated+" NVIDIA Device Identity CA", nil, nil, certificate{})
	if err != nil {
		return nil, err
	}
	a.Root, a.key = root.cert, root.key
	return a, nil
}

// RootPEM is the root as a file for `--allow-emulated-root`.
func (a *Authority) RootPEM() []byte { return encode(a.Root) }

// certificate is one with its key.
type certificate struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// issue makes a certificate under parent, a root where there is none. One
// with an extension may sign reports, every other one certificates.
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

// Signer certifies a key for something else than a GPU, manifests for
// instance.
func (a *Authority) Signer(name string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	c, err := a.issue(name, nil, nil, certificate{a.Root, a.key})
	return c.cert, c.key, err
}

// line is what stands between the root and the GPUs of a chip.
func (a *Authority) line(chip string) ([]certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if line, made := a.lines[chip]; made {
		return line, nil
	}
	model, err := a.issue("NVIDIA "+chip+" Identity", nil, nil, certificate{a.Root, a.key})
	if err != nil {
		return nil, err
	}
	provisioner, err := a.issue("NVIDIA "+chip+" Provisioner ICA 1", nil, nil, model)
	if err != nil {
		return nil, err
	}
	a.lines[chip] = []certificate{provisioner, model}
	return a.lines[chip], nil
}

// chain certifies a GPU as NVIDIA does: root, model, provisioner, identity
// (whose serial number is 0x41 and the PDI), and the firmware that signs.
func (a *Authority) chain(chip string, pdi spdm.PDI, fwid *pkix.Extension) (pemFile []byte, key *ecdsa.PrivateKey, err error) {
	line, err := a.line(chip)
	if err != nil {
		return nil, nil, err
	}
	serial := new(big.Int).Lsh(big.NewInt(0x41), 64)
	identity, err := a.issue(chip+" A01 GSP BROM", serial.Or(serial, new(big.Int).SetUint64(uint64(pdi))), nil, line[0])
	if err != nil {
		return nil, nil, err
	}
	leaf, err := a.issue(chip+" A01 GSP FMC LF", nil, fwid, identity)
	if err != nil {
		return nil, nil, err
	}
	var certs []*x509.Certificate
	for _, c := range slices.Concat([]certificate{leaf, identity}, line) {
		certs = append(certs, c.cert)
	}
	return encode(append(certs, a.Root)...), leaf.key, nil
}

func encode(certs ...*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range certs {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return out.Bytes()
}
