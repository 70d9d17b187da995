package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/binary"
	"reflect"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/vm/guest/tee"
)

// GUIDs of a certificate table (GHCB specification).
const (
	guidVCEK = "63da758d-e664-4564-adc5-f4b93be8accd"
	guidVLEK = "a8074bc2-a25a-483e-aae6-39c045a0b8a1"
	guidASK  = "4ab7b379-bbac-4fe4-a02f-05aef327c782"
	guidARK  = "c0b406a4-a803-4952-9743-3fb6014cd0ae"
	guidCRL  = "92f81bc3-5811-4d3d-97ff-d19f88dc67ea"
)

// certTable is what a host puts beside a report.
func certTable(parts map[string][]byte) []byte {
	var header, body []byte
	end := (len(parts) + 1) * 24
	for name, part := range parts {
		guid := uuid.MustParse(name)
		header = append(header, guid[:]...)
		header = binary.LittleEndian.AppendUint32(header, uint32(end+len(body)))
		header = binary.LittleEndian.AppendUint32(header, uint32(len(part)))
		body = append(body, part...)
	}
	return append(append(header, make([]byte, 24)...), body...)
}

// hardware is one chip's authority with the keys of its two kinds.
type hardware struct {
	*snptest.Authority
	vcek, vlek       *x509.Certificate
	vcekKey, vlekKey *ecdsa.PrivateKey
	old, current     []byte // revocation lists
}

func newHardware(t *testing.T) *hardware {
	t.Helper()
	now, tcb := time.Now(), contract.TCB{SNP: 27}
	a, err := snptest.NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	h := &hardware{Authority: a}
	if h.vcek, h.vcekKey, err = a.VCEK(snptest.ProductEmulated, tcb, bytes.Repeat([]byte{7}, 64)); err != nil {
		t.Fatal(err)
	}
	if h.vlek, h.vlekKey, err = a.VLEK(snptest.ProductEmulated, "CN=cloud.example", tcb); err != nil {
		t.Fatal(err)
	}
	if h.old, err = a.CRL(now.Add(-2*time.Hour), now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if h.current, err = a.CRL(now.Add(-time.Hour), now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	return h
}

// sign makes a report; vlek tells by which key.
func (h *hardware) sign(t *testing.T, vlek bool) []byte {
	t.Helper()
	r, key := snp.Report{Version: 3, SigAlgo: 1, Family: 0x19, Model: 0x11}, h.vcekKey
	if vlek {
		r.SignerInfo, key = 1<<2, h.vlekKey
	}
	signed, err := snptest.Sign(r.Marshal(), key)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func TestTheTableBesideAReportIsTakenOnlyWhenItLeadsToARoot(t *testing.T) {
	t.Parallel()
	h, other := newHardware(t), newHardware(t)
	hints := contract.Endorsements{VCEK: other.vcek.Raw, ASK: h.ASK.Raw, ARK: h.ARK.Raw, CRL: h.old}
	with := func(change func(*contract.Endorsements)) contract.Endorsements {
		e := hints
		change(&e)
		return e
	}
	leaf := with(func(e *contract.Endorsements) { e.VCEK = h.vcek.Raw })
	for name, c := range map[string]struct {
		table []byte
		vlek  bool
		want  contract.Endorsements
		tells bool // why the table is not taken
	}{
		"none":                {nil, false, hints, false},
		"empty":               {make([]byte, 4096), false, hints, false},
		"leaf alone":          {certTable(map[string][]byte{guidVCEK: h.vcek.Raw}), false, leaf, false},
		"whole chain":         {certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidASK: h.ASK.Raw, guidARK: h.ARK.Raw}), false, leaf, false},
		"another chip's leaf": {certTable(map[string][]byte{guidVCEK: other.vcek.Raw, guidASK: other.ASK.Raw}), false, hints, true},
		"an unknown root":     {certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidARK: other.ARK.Raw}), false, hints, true},
		"another's ASK":       {certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidASK: other.ASK.Raw}), false, hints, true},
		"no certificate":      {certTable(map[string][]byte{guidVCEK: []byte("x")}), false, hints, true},
		"malformed":           {[]byte{1}, false, hints, true},
		"both leaves":         {certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidVLEK: h.vlek.Raw}), false, leaf, false},
		"signed by a VLEK": {
			certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidVLEK: h.vlek.Raw, guidASK: h.ASVK.Raw}), true,
			with(func(e *contract.Endorsements) { e.VCEK, e.ASK = h.vlek.Raw, h.ASVK.Raw }), false,
		},
		"a later list": {
			certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidCRL: h.current}), false,
			with(func(e *contract.Endorsements) { e.VCEK, e.CRL = h.vcek.Raw, h.current }), false,
		},
		"the same list again": {certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidCRL: h.old}), false, leaf, false},
		"another root's list": {certTable(map[string][]byte{guidVCEK: h.vcek.Raw, guidCRL: other.current}), false, leaf, false},
	} {
		got, err := endorse(tee.Attestation{Report: h.sign(t, c.vlek), Table: c.table}, hints, []*x509.Certificate{h.ARK})
		if !reflect.DeepEqual(got, c.want) || (err != nil) != c.tells {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Without being told so, a guest takes no root but AMD's.
	got, err := endorse(tee.Attestation{Report: h.sign(t, false), Table: certTable(map[string][]byte{guidVCEK: h.vcek.Raw})}, hints, nil)
	if err == nil || !reflect.DeepEqual(got, hints) {
		t.Errorf("an emulated root counts: %v", err)
	}
}
