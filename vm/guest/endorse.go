package main

import (
	"bytes"
	"crypto/x509"
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/vm/guest/tee"
)

// endorse chooses between the host's hints and the table that came beside a
// report. Both are the host's word. The table's certificates, filled up with
// the hints, are taken when they lead from this very report to one of AMD's
// roots (or of those given); otherwise the hints stay as they are.
func endorse(a tee.Attestation, hints contract.Endorsements, emulated []*x509.Certificate) (contract.Endorsements, error) {
	if len(bytes.Trim(a.Table, "\x00")) == 0 {
		return hints, nil
	}
	t, err := tee.ParseTable(a.Table)
	if err != nil {
		return hints, err
	}
	e, err := overlay(a.Report, t, hints)
	if err == nil {
		err = snp.CheckSigned(a.Report, e, emulated)
	}
	if err != nil {
		return hints, fmt.Errorf("choosing endorsements: %w", err)
	}
	if e.CRL, err = laterCRL(t.CRL, hints.CRL, e.ARK); err != nil {
		return hints, fmt.Errorf("choosing endorsements: %w", err)
	}
	return e, nil
}

// overlay puts the table over the hints; of its leaves it takes the one that
// is for the key the report names.
func overlay(report []byte, t tee.Table, hints contract.Endorsements) (contract.Endorsements, error) {
	leaf := t.VCEK
	if len(t.VLEK) > 0 {
		r, err := snp.ParseReport(report)
		if err != nil {
			return hints, err
		}
		if r.SigningKey() == snp.SignerVLEK {
			leaf = t.VLEK
		}
	}
	for _, part := range []struct {
		to   *[]byte
		from []byte
	}{{&hints.VCEK, leaf}, {&hints.ASK, t.ASK}, {&hints.ARK, t.ARK}} {
		if len(part.from) > 0 {
			*part.to = part.from
		}
	}
	return hints, nil
}

// laterCRL is the table's list when the root signed it after the hint's, else
// the hint.
func laterCRL(table, hint, ark []byte) ([]byte, error) {
	root, err := x509.ParseCertificate(ark)
	if err != nil {
		return nil, fmt.Errorf("parsing ARK: %w", err)
	}
	ours, err := snp.ParseCRL(table, root)
	if err != nil {
		return hint, nil //nolint:nilerr // none, or none of the root's
	}
	if hinted, err := snp.ParseCRL(hint, root); err == nil && !ours.ThisUpdate.After(hinted.ThisUpdate) {
		return hint, nil
	}
	return table, nil
}
