// Package rimtest writes reference manifests as NVIDIA's service has them,
// signed under the root of an spdmtest.Authority. No product code may import
// it: its root says EMULATED, and no verifier accepts it unless told.
//
// It keeps no state.
package rimtest

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha512"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/beevik/etree"
	dsig "github.com/russellhaering/goxmldsig"

	"github.com/confidential-node/agent/gpu/spdm"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

// For writes the two manifests that a GPU with production firmware fits.
func For(a *spdmtest.Authority, g *spdmtest.GPU) (driver, vbios []byte, err error) {
	golden := map[int][]spdm.Digest{}
	other := map[int][]spdm.Digest{}
	for i, m := range spdmtest.Measurements(g.Chip) {
		switch {
		case i >= spdmtest.FirstVBIOS:
			other[i] = []spdm.Digest{m}
		case i >= spdmtest.FirstDriver:
			golden[i] = []spdm.Digest{m}
		}
	}
	if driver, err = Manifest(a, g.Chip, g.Driver, golden); err != nil {
		return nil, nil, err
	}
	vbios, err = Manifest(a, g.Chip, g.VBIOS, other)
	return driver, vbios, err
}

// Manifest writes one with the digests any one of which each measurement has
// to have.
func Manifest(a *spdmtest.Authority, product, version string, golden map[int][]spdm.Digest) ([]byte, error) {
	var resources strings.Builder
	for _, index := range slices.Sorted(maps.Keys(golden)) {
		var hashes strings.Builder
		for i, digest := range golden[index] {
			fmt.Fprintf(&hashes, ` ns2:Hash%d="%x"`, i, digest)
		}
		fmt.Fprintf(&resources, `<ns0:Resource active="True" alternatives="%d" index="%d" type="Measurement"%s/>`, len(golden[index]), index, hashes.String())
	}
	content := fmt.Sprintf(`<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" `+
		`xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384" name=%q>`+
		`<ns0:Meta colloquialVersion=%q product=%q/><ns0:Payload>%s</ns0:Payload></SoftwareIdentity>`, product, version, product, resources.String())
	digest, err := canonicalDigest(content)
	if err != nil {
		return nil, err
	}
	const algorithms = "http://www.w3.org/2001/04/xmldsig-more#"
	info := `<ds:SignedInfo xmlns:ds="http://www.w3.org/2000/09/xmldsig#">` +
		`<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"/><ds:SignatureMethod Algorithm="` + algorithms + `ecdsa-sha384"/>` +
		`<ds:Reference URI=""><ds:Transforms><ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"/>` +
		`<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"/></ds:Transforms><ds:DigestMethod Algorithm="` + algorithms + `sha384"/>` +
		`<ds:DigestValue>` + base64.StdEncoding.EncodeToString(digest) + `</ds:DigestValue></ds:Reference></ds:SignedInfo>`
	value, certificates, err := sign(a, inDocument(info))
	if err != nil {
		return nil, err
	}
	signature := `<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#">` + info + `<ds:SignatureValue>` + base64.StdEncoding.EncodeToString(value) +
		`</ds:SignatureValue><ds:KeyInfo><ds:X509Data>` + certificates + `</ds:X509Data></ds:KeyInfo></ds:Signature>`
	return []byte(strings.Replace(content, "</SoftwareIdentity>", signature+"</SoftwareIdentity>", 1)), nil
}

// inDocument gives an element the name spaces of the document it stands in,
// as its canonical form has them.
func inDocument(info string) string {
	return strings.Replace(info, `<ds:SignedInfo xmlns:ds="http://www.w3.org/2000/09/xmldsig#">`,
		`<ds:SignedInfo xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ds="http://www.w3.org/2000/09/xmldsig#" `+
			`xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384">`, 1)
}

// canonicalDigest is that of a text's C14N 1.1.
func canonicalDigest(text string) ([]byte, error) {
	doc := etree.NewDocument()
	if err := doc.ReadFromString(text); err != nil {
		return nil, fmt.Errorf("writing manifest: %w", err)
	}
	body, err := dsig.MakeC14N11Canonicalizer().Canonicalize(doc.Root())
	if err != nil {
		return nil, fmt.Errorf("writing manifest: %w", err)
	}
	digest := sha512.Sum384(body)
	return digest[:], nil
}

// sign returns the raw signature over an element, and the certificates of its
// signer.
func sign(a *spdmtest.Authority, text string) (value []byte, certificates string, err error) {
	digest, err := canonicalDigest(text)
	if err != nil {
		return nil, "", err
	}
	signer, key, err := a.Signer("EMULATED HCC RIM L4 Signer")
	if err != nil {
		return nil, "", err
	}
	r, s, err := ecdsa.Sign(rand.Reader, key, digest)
	if err != nil {
		return nil, "", fmt.Errorf("signing manifest: %w", err)
	}
	for _, der := range [][]byte{signer.Raw, a.Root.Raw} {
		certificates += "<ds:X509Certificate>" + base64.StdEncoding.EncodeToString(der) + "</ds:X509Certificate>"
	}
	half := spdm.SignatureSize / 2
	return append(r.FillBytes(make([]byte, half)), s.FillBytes(make([]byte, half))...), certificates, nil
}
