// Package rim reads NVIDIA's reference integrity manifests (SWID tags of the
// TCG RIM information model, signed by XML signature) and compares the
// measurements of a GPU's report with them.
//
// Pure; manifests come from files. Which exist is NVIDIA's service to say.
package rim

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"

	"github.com/beevik/etree"
	dsig "github.com/russellhaering/goxmldsig"
	"github.com/russellhaering/goxmldsig/etreeutils"

	"github.com/confidential-node/agent/gpu/spdm"
)

// Bounds of a manifest.
const (
	MaxBytes = 1 << 20
	maxIndex = 256
	maxChain = 8
)

// The one form of signature that NVIDIA uses, and that is read.
const (
	c14n11      = "http://www.w3.org/2006/12/xml-c14n11"
	enveloped   = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
	ecdsaSHA384 = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
	sha384      = "http://www.w3.org/2001/04/xmldsig-more#sha384"
)

// NVIDIARoot is the SHA-256 of the DER of "NVIDIA CoRIM signing Root CA".
func NVIDIARoot() spdm.Fingerprint {
	raw, err := hex.DecodeString("12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1")
	if err != nil {
		panic(err) // a constant
	}
	return spdm.Fingerprint(raw)
}

// Manifest is one that NVIDIA signed.
type Manifest struct {
	// Product is the chip, "GH100"; Version that of the driver or the VBIOS
	// it is about, as reports state it.
	Product, Version string
	// Signer is the subject of the signing certificate.
	Signer string
	// Golden are the digests any one of which a measurement has to have, by
	// index from 0. Measurements that are not here may be anything.
	Golden map[int][]spdm.Digest
}

// Parse reads a manifest and verifies its signature up to one of the
// pinned roots, at the given time. What stands outside the signature does not
// exist: it covers the whole document.
func Parse(data []byte, roots []spdm.Fingerprint, now time.Time) (*Manifest, error) {
	if len(data) > MaxBytes {
		return nil, fmt.Errorf("reference manifest: %d bytes, at most %d are read", len(data), MaxBytes)
	}
	doc := etree.NewDocument()
	doc.ReadSettings.Permissive = false
	if err := doc.ReadFromBytes(data); err != nil {
		return nil, fmt.Errorf("reference manifest: %w", err)
	}
	top := doc.Root()
	if top == nil || top.Tag != "SoftwareIdentity" {
		return nil, errors.New("reference manifest: it is no SWID tag")
	}
	signer, err := verify(top, roots, now)
	if err != nil {
		return nil, fmt.Errorf("reference manifest: %w", err)
	}
	m, err := read(top)
	if err != nil {
		return nil, fmt.Errorf("reference manifest: %w", err)
	}
	m.Signer = signer
	return m, nil
}

// only returns the one child of that name.
func only(parent *etree.Element, tag string) (*etree.Element, error) {
	found := parent.SelectElements(tag)
	if len(found) != 1 {
		return nil, fmt.Errorf("%d elements %s in %s, want one", len(found), tag, parent.Tag)
	}
	return found[0], nil
}

// algorithm refuses any other than the one that is known.
func algorithm(parent *etree.Element, tag, want string) error {
	e, err := only(parent, tag)
	if err != nil {
		return err
	}
	if got := e.SelectAttrValue("Algorithm", ""); got != want {
		return fmt.Errorf("%s is %q, want %q", tag, got, want)
	}
	return nil
}

// verify follows W3C XML Signature 1.1 for the one form above: a reference to
// the whole document, without the signature itself.
func verify(top *etree.Element, roots []spdm.Fingerprint, now time.Time) (signer string, err error) {
	signature, err := only(top, "Signature")
	if err != nil {
		return "", err
	}
	info, err := only(signature, "SignedInfo")
	if err != nil {
		return "", err
	}
	reference, err := only(info, "Reference")
	if err != nil {
		return "", err
	}
	if err := form(info, reference); err != nil {
		return "", err
	}
	want, err := text(reference, "DigestValue")
	if err != nil {
		return "", err
	}
	content := top.Copy()
	for _, s := range content.SelectElements("Signature") {
		content.RemoveChild(s)
	}
	canonical := dsig.MakeC14N11Canonicalizer()
	body, err := canonical.Canonicalize(content)
	if err != nil {
		return "", fmt.Errorf("canonical form: %w", err)
	}
	if digest := sha512.Sum384(body); subtle.ConstantTimeCompare(digest[:], want) != 1 {
		return "", errors.New("its content is not what was signed")
	}
	detached, err := detach(top, signature, info)
	if err != nil {
		return "", err
	}
	signed, err := canonical.Canonicalize(detached)
	if err != nil {
		return "", fmt.Errorf("canonical form: %w", err)
	}
	value, err := text(signature, "SignatureValue")
	if err != nil {
		return "", err
	}
	return check(signature, signed, value, roots, now)
}

// form refuses every other kind of signature.
func form(info, reference *etree.Element) error {
	uri := reference.SelectAttr("URI")
	transforms, err := only(reference, "Transforms")
	if err != nil {
		return err
	}
	var names []string
	for _, t := range transforms.ChildElements() {
		names = append(names, t.SelectAttrValue("Algorithm", ""))
	}
	switch {
	case uri == nil || uri.Value != "":
		return errors.New("the signature does not cover the whole document")
	case len(names) != 2 || names[0] != enveloped || names[1] != c14n11:
		return fmt.Errorf("transforms are %q", names)
	}
	return errors.Join(algorithm(info, "CanonicalizationMethod", c14n11), algorithm(info, "SignatureMethod", ecdsaSHA384),
		algorithm(reference, "DigestMethod", sha384))
}

// detach returns SignedInfo with the namespaces that are in force where it
// stands.
func detach(top, signature, info *etree.Element) (*etree.Element, error) {
	context, err := etreeutils.NewDefaultNSContext().SubContext(top)
	if err == nil {
		context, err = context.SubContext(signature)
	}
	if err != nil {
		return nil, fmt.Errorf("namespaces: %w", err)
	}
	return etreeutils.NSDetatch(context, info)
}

// text decodes an element's base64.
func text(parent *etree.Element, tag string) ([]byte, error) {
	e, err := only(parent, tag)
	if err != nil {
		return nil, err
	}
	raw, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(e.Text()), ""))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", tag, err)
	}
	return raw, nil
}

// check verifies the signature value and the certificates that come along.
func check(signature *etree.Element, signed, value []byte, roots []spdm.Fingerprint, now time.Time) (string, error) {
	certs, err := certificates(signature)
	if err != nil {
		return "", err
	}
	if _, err := spdm.FollowToRoot(certs, roots, now); err != nil {
		return "", fmt.Errorf("its certificates: %w", err)
	}
	key, ok := certs[0].PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() {
		return "", errors.New("the signer's key is not ECDSA P-384")
	}
	digest, half := sha512.Sum384(signed), spdm.SignatureSize/2
	// Raw r and s, not ASN.1 (XML Signature 1.1, section 6.4.3).
	if len(value) != spdm.SignatureSize || !ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(value[:half]), new(big.Int).SetBytes(value[half:])) {
		return "", errors.New("the signature does not hold")
	}
	return certs[0].Subject.String(), nil
}

func certificates(signature *etree.Element) ([]*x509.Certificate, error) {
	info, err := only(signature, "KeyInfo")
	if err != nil {
		return nil, err
	}
	data, err := only(info, "X509Data")
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for _, e := range data.SelectElements("X509Certificate") {
		der, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(e.Text()), ""))
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		if certs = append(certs, c); len(certs) > maxChain {
			return nil, fmt.Errorf("more than %d certificates", maxChain)
		}
	}
	if len(certs) < 2 {
		return nil, fmt.Errorf("%d certificates, want the signer's and those up to NVIDIA's root", len(certs))
	}
	return certs, nil
}

// read takes what is known out of a document whose signature holds.
func read(top *etree.Element) (*Manifest, error) {
	meta, err := only(top, "Meta")
	if err != nil {
		return nil, err
	}
	payload, err := only(top, "Payload")
	if err != nil {
		return nil, err
	}
	m := &Manifest{
		Product: meta.SelectAttrValue("product", ""), Version: meta.SelectAttrValue("colloquialVersion", ""),
		Golden: map[int][]spdm.Digest{},
	}
	if m.Product == "" || m.Version == "" {
		return nil, errors.New("it says not for which product and version it is")
	}
	seen := map[int]bool{}
	for _, r := range payload.ChildElements() {
		index, digests, err := resource(r)
		if err != nil {
			return nil, err
		}
		if seen[index] {
			return nil, fmt.Errorf("measurement %d is there twice", index)
		}
		seen[index] = true
		if len(digests) > 0 {
			m.Golden[index] = digests
		}
	}
	if len(m.Golden) == 0 {
		return nil, errors.New("it demands nothing of any measurement")
	}
	return m, nil
}

// resource is one measurement: nil digests where none is demanded.
func resource(r *etree.Element) (index int, digests []spdm.Digest, err error) {
	index, err = strconv.Atoi(r.SelectAttrValue("index", ""))
	count, countErr := strconv.Atoi(r.SelectAttrValue("alternatives", ""))
	active := r.SelectAttrValue("active", "")
	switch {
	case r.Tag != "Resource" || r.SelectAttrValue("type", "") != "Measurement":
		return 0, nil, fmt.Errorf("%s in its payload is no measurement", r.Tag)
	case err != nil || index < 0 || index >= maxIndex:
		return 0, nil, fmt.Errorf("index %q is none", r.SelectAttrValue("index", ""))
	case countErr != nil || count < 1 || count > maxIndex:
		return 0, nil, fmt.Errorf("measurement %d has %q alternatives", index, r.SelectAttrValue("alternatives", ""))
	case active != "True" && active != "False":
		return 0, nil, fmt.Errorf("measurement %d is active %q", index, active)
	case active == "False":
		return index, nil, nil
	}
	for i := range count {
		raw, err := hex.DecodeString(r.SelectAttrValue(fmt.Sprintf("Hash%d", i), ""))
		if err != nil || len(raw) != spdm.DigestSize {
			return 0, nil, fmt.Errorf("alternative %d of measurement %d is no SHA-384 digest", i, index)
		}
		digests = append(digests, spdm.Digest(raw))
	}
	return index, digests, nil
}
