package tee

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// The certificate table of an extended report (GHCB specification 2.03,
// 4.1.8.1): entries of GUID, offset and length, ended by one of zeros, then
// the certificates. GUIDs stand in the order they are written in.
const (
	guidVCEK = "63da758d-e664-4564-adc5-f4b93be8accd"
	guidVLEK = "a8074bc2-a25a-483e-aae6-39c045a0b8a1"
	guidASK  = "4ab7b379-bbac-4fe4-a02f-05aef327c782"
	guidARK  = "c0b406a4-a803-4952-9743-3fb6014cd0ae"
	guidCRL  = "92f81bc3-5811-4d3d-97ff-d19f88dc67ea"

	entrySize   = 24
	entryOffset = 16
	entryLength = 20
)

// MaxTableBytes bounds a table: the kernel takes no larger one from a host
// (Linux SEV_FW_BLOB_MAX_SIZE).
const MaxTableBytes = 16 << 10

// Table is a certificate table, DER. Nothing in it is verified.
type Table struct {
	VCEK, VLEK, ASK, ARK, CRL []byte
}

// ParseTable decodes what came beside a report. An empty table is one without
// certificates; entries that are in no chain up to AMD are left out, because
// hosts put things of their own there. go-sev-guest's parser is not used: its
// sum of offset and length wraps.
func ParseTable(data []byte) (Table, error) {
	var t Table
	if len(data) > MaxTableBytes {
		return Table{}, fmt.Errorf("parsing certificate table: %d bytes, at most %d are read", len(data), MaxTableBytes)
	}
	slots := map[string]*[]byte{guidVCEK: &t.VCEK, guidVLEK: &t.VLEK, guidASK: &t.ASK, guidARK: &t.ARK, guidCRL: &t.CRL}
	end := 0
	for rest := data; ; rest = rest[entrySize:] {
		if len(data) == 0 {
			return t, nil
		}
		if len(rest) < entrySize {
			return Table{}, errors.New("parsing certificate table: no entry ends it")
		}
		end += entrySize
		if len(bytes.Trim(rest[:entrySize], "\x00")) == 0 {
			break
		}
	}
	for at := 0; at < end-entrySize; at += entrySize {
		entry := data[at : at+entrySize]
		guid := uuid.UUID(entry[:entryOffset]).String()
		from := uint64(binary.LittleEndian.Uint32(entry[entryOffset:]))
		size := uint64(binary.LittleEndian.Uint32(entry[entryLength:]))
		if from < uint64(end) || size == 0 || from+size > uint64(len(data)) {
			return Table{}, fmt.Errorf("parsing certificate table: entry %s has %d bytes at %d, outside the %d bytes after the header", guid, size, from, len(data)-end)
		}
		slot := slots[guid]
		if slot == nil {
			continue
		}
		if *slot != nil {
			return Table{}, fmt.Errorf("parsing certificate table: entry %s is there twice", guid)
		}
		*slot = bytes.Clone(data[from : from+size])
	}
	return t, nil
}
