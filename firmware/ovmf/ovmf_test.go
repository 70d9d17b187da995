package ovmf_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/confidential-node/agent/firmware/ovmf"
	"github.com/confidential-node/agent/tests/skip"
)

func realFirmware(t *testing.T) []byte {
	t.Helper()
	image, err := os.ReadFile(filepath.Join("..", "..", "..", "shared", "data", "firmware", "OVMF.amdsev.fd"))
	if err != nil {
		skip.Missing(t, "a real AmdSev OVMF in ../shared/data")
	}
	return image
}

func TestARealAmdSevImageIsRecognised(t *testing.T) {
	t.Parallel()
	f, err := ovmf.Parse(realFirmware(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.SupportsKernelHashes(); err != nil {
		t.Error(err)
	}
	if f.HashTable.Base != 0x810c00 || f.ResetEIP != 0x80b004 || f.GPA() != 0xFFC00000 || len(f.Sections) < 6 {
		t.Errorf("parsed %+v", f)
	}
}

// Every length and offset of the tables, broken one at a time, is refused or
// at least never read outside the image.
func TestBrokenTablesAreRefused(t *testing.T) {
	t.Parallel()
	image := realFirmware(t)
	image = image[len(image)-64<<10:] // the tables are at the end
	if _, err := ovmf.Parse(image); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		size   int
		change func([]byte)
	}{
		"no bytes":        {0, nil},
		"odd size":        {len(image) - 1, nil},
		"zeros":           {len(image), func(b []byte) { clear(b) }},
		"no footer":       {len(image), func(b []byte) { b[len(b)-40] ^= 1 }},
		"table too long":  {len(image), func(b []byte) { b[len(b)-49] = 0xff }},
		"table too short": {len(image), func(b []byte) { b[len(b)-50], b[len(b)-49] = 1, 0 }},
		"metadata moved":  {len(image), func(b []byte) { i := bytes.Index(b, []byte("ASEV")); b[i] = 'X' }},
		"version":         {len(image), func(b []byte) { i := bytes.Index(b, []byte("ASEV")); b[i+8] = 2 }},
		"length":          {len(image), func(b []byte) { i := bytes.Index(b, []byte("ASEV")); b[i+4]++ }},
		"count":           {len(image), func(b []byte) { i := bytes.Index(b, []byte("ASEV")); b[i+14] = 0xff }},
		"unaligned":       {len(image), func(b []byte) { i := bytes.Index(b, []byte("ASEV")); b[i+16] = 1 }},
		"unknown type":    {len(image), func(b []byte) { i := bytes.Index(b, []byte("ASEV")); b[i+24] = 0x77 }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			broken := slices.Clone(image)[:c.size]
			if c.change != nil {
				c.change(broken)
			}
			if f, err := ovmf.Parse(broken); err == nil {
				t.Errorf("accepted as %+v", f)
			}
		})
	}
	if _, err := ovmf.Parse(make([]byte, 4096)); !errors.Is(err, ovmf.ErrNotSEV) {
		t.Errorf("no remedy for an image without SEV: %v", err)
	}
}
