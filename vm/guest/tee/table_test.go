package tee

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/uuid"
)

type row struct {
	guid      string
	from, len uint32
}

func table(body string, rows ...row) []byte {
	var out []byte
	for _, r := range rows {
		guid := uuid.MustParse(r.guid)
		out = append(out, guid[:]...)
		out = binary.LittleEndian.AppendUint32(out, r.from)
		out = binary.LittleEndian.AppendUint32(out, r.len)
	}
	return append(append(out, make([]byte, entrySize)...), body...)
}

const guidOther = "ecae0c0f-9502-43b1-afa2-0ae2e0d565b6"

func TestTheTableIsReadByItsGUIDs(t *testing.T) {
	t.Parallel()
	const header = 4 * entrySize
	got, err := ParseTable(table("vcekarkx", row{guidVCEK, header, 4}, row{guidARK, header + 4, 3}, row{guidOther, header + 7, 1}))
	if err != nil || string(got.VCEK) != "vcek" || string(got.ARK) != "ark" || got.ASK != nil || got.VLEK != nil || got.CRL != nil {
		t.Errorf("%+v %v", got, err)
	}
	// As go-sev-guest, which wrote tables first, writes one.
	written := (&abi.CertTable{Entries: []abi.CertTableEntry{
		{GUID: uuid.MustParse(guidVLEK), RawCert: []byte("vlek")}, {GUID: uuid.MustParse(guidASK), RawCert: []byte("asvk")}, {GUID: uuid.MustParse(guidCRL), RawCert: []byte("crl")},
	}}).Marshal()
	if got, err = ParseTable(written); err != nil || string(got.VLEK) != "vlek" || string(got.ASK) != "asvk" || string(got.CRL) != "crl" {
		t.Errorf("%+v %v", got, err)
	}
	for _, empty := range [][]byte{nil, make([]byte, entrySize), make([]byte, MaxTableBytes)} {
		if got, err := ParseTable(empty); err != nil || got.VCEK != nil {
			t.Errorf("%d zeros: %+v %v", len(empty), got, err)
		}
	}
}

func TestATableThatPointsOutsideItselfIsRefused(t *testing.T) {
	t.Parallel()
	const header = 2 * entrySize
	for name, bad := range map[string][]byte{
		"no end":          table("", row{guidVCEK, header, 1})[:entrySize],
		"half an entry":   make([]byte, entrySize-1),
		"into the header": table("v", row{guidVCEK, header - 1, 1}),
		"past the end":    table("v", row{guidVCEK, header, 2}),
		"wraps around":    table("v", row{guidVCEK, 0xffffffff, 2}),
		"nothing":         table("v", row{guidVCEK, header, 0}),
		"twice":           table("vv", row{guidVCEK, header + entrySize, 1}, row{guidVCEK, header + entrySize + 1, 1}),
		"too large":       make([]byte, MaxTableBytes+1),
	} {
		if got, err := ParseTable(bad); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func FuzzParseTable(f *testing.F) {
	f.Add(table("vcekark", row{guidVCEK, 3 * entrySize, 4}, row{guidARK, 3*entrySize + 4, 3}))
	f.Add(table("v", row{guidVCEK, 0xffffffff, 2}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := ParseTable(data)
		for _, part := range [][]byte{got.VCEK, got.VLEK, got.ASK, got.ARK, got.CRL} {
			if part != nil && (err != nil || !bytes.Contains(data, part)) {
				t.Errorf("%d bytes that the table does not hold (%v)", len(part), err)
			}
		}
	})
}
