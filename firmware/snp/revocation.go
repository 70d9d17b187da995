package snp

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// ParseCRL decodes a revocation list that the root signed. Whether it is
// current is the caller's to judge.
func ParseCRL(der []byte, root *x509.Certificate) (*x509.RevocationList, error) {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("parsing CRL: %w", err)
	}
	if len(crl.Raw) != len(der) { // the package stops reading after the list
		return nil, errors.New("parsing CRL: something follows it")
	}
	if crl.NextUpdate.IsZero() || !crl.NextUpdate.After(crl.ThisUpdate) {
		return nil, errors.New("parsing CRL: it does not say until when it is current")
	}
	if err := crl.CheckSignatureFrom(root); err != nil {
		return nil, fmt.Errorf("the root %s did not sign this CRL: %w", root.Subject.CommonName, err)
	}
	return crl, nil
}

// revoked judges what the root issued, by its own list: itself and the ASK or
// ASVK. AMD revokes no single chip that way; those stand under the ASK.
func (res *Result) revoked(crl []byte, ask []byte, root *x509.Certificate, a *AppraisalPolicy) {
	const name = "revocation"
	if len(crl) == 0 {
		if a.RequireCRL {
			res.Add(name, false, "", "", "", "there is no revocation list; fetch the CRL of the product line from AMD's key service")
			return
		}
		const why = "NOT checked: no revocation list was given, so a revoked ASK would not be noticed"
		res.Skip(name, why)
		res.warn(name, why)
		return
	}
	list, err := ParseCRL(crl, root)
	if err != nil {
		res.Add(name, false, "", "", "", fmt.Sprintf("the revocation list cannot be used: %v; fetch the CRL of the product line from AMD's key service", err))
		return
	}
	if a.Now.Before(list.ThisUpdate) || a.Now.After(list.NextUpdate) {
		res.Add(name, false, a.Now.UTC().Format(time.RFC3339), list.ThisUpdate.Format(time.RFC3339)+" to "+list.NextUpdate.Format(time.RFC3339), "",
			"the revocation list is not current; fetch it anew, and compare this machine's clock")
		return
	}
	listed := func(cert *x509.Certificate) bool {
		return slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(cert.SerialNumber) == 0 })
	}
	middle, err := x509.ParseCertificate(ask)
	holds := err == nil && !listed(middle) && !listed(root)
	res.Add(name, holds, "", "list of "+list.ThisUpdate.Format(time.RFC3339), "the root's list, current until "+list.NextUpdate.Format(time.DateOnly)+", revokes neither root nor intermediate",
		"AMD has revoked the root or the intermediate behind this report; do not use this host")
}
