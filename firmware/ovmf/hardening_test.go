package ovmf_test

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/confidential-node/agent/firmware/ovmf"
)

const (
	footer    = "96b582de-1fb2-45f7-baea-a366c55a082d"
	reset     = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
	hashTable = "7255371f-3a3b-4b04-927b-1da6efa8d454"
	metadata  = "dc886566-984a-4798-a75e-5585a7bf67cc"
	unknown   = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"
)

// entry is one footer entry; length is the stated one.
type entry struct {
	guid   string
	data   []byte
	length int
}

func words(guid string, w ...uint32) entry {
	var data []byte
	for _, v := range w {
		data = binary.LittleEndian.AppendUint32(data, v)
	}
	return entry{guid, data, len(data) + 18}
}

// layout builds an image; its zero value plus wellFormed is a small AmdSev.
type layout struct {
	size     int
	sections []ovmf.Section
	entries  []entry // ascending
	// stated values, the true ones unless set
	total, length, count, version int
	magic                         string
}

func wellFormed() *layout {
	return &layout{
		size: 4096, magic: "ASEV", version: 1,
		sections: []ovmf.Section{
			{GPA: 0x800000, Size: 0x9000, Type: ovmf.SectionSNPMemory},
			{GPA: 0x80d000, Size: 0x1000, Type: ovmf.SectionSecrets},
			{GPA: 0x80e000, Size: 0x1000, Type: ovmf.SectionCPUID},
			{GPA: 0x80f000, Size: 0x1000, Type: ovmf.SectionSVSMCAA},
			{GPA: 0x810000, Size: 0x1000, Type: ovmf.SectionKernelHashes},
		},
		entries: []entry{words(metadata, 2048), words(hashTable, 0x810c00, 0x400), words(reset, 0x80b004)},
		total:   -1, length: -1, count: -1,
	}
}

func (l *layout) set(guid string, e entry) {
	l.entries = slices.Clone(l.entries)
	for i := range l.entries {
		if l.entries[i].guid == guid {
			l.entries[i] = e
		}
	}
}

func (l *layout) drop(guid string) {
	l.entries = slices.DeleteFunc(slices.Clone(l.entries), func(e entry) bool { return e.guid == guid })
}

func (l *layout) image() []byte {
	image := make([]byte, l.size)
	pick := func(stated, actual int) uint32 {
		if stated >= 0 {
			return uint32(stated)
		}
		return uint32(actual)
	}
	meta := append([]byte(nil), l.magic...)
	for _, v := range []uint32{pick(l.length, 16+12*len(l.sections)), uint32(l.version), pick(l.count, len(l.sections))} {
		meta = binary.LittleEndian.AppendUint32(meta, v)
	}
	for _, s := range l.sections {
		for _, v := range []uint32{s.GPA, s.Size, uint32(s.Type)} {
			meta = binary.LittleEndian.AppendUint32(meta, v)
		}
	}
	if l.size >= 2048 {
		copy(image[l.size-2048:], meta)
	}
	var table []byte
	for _, e := range l.entries {
		table = append(table, e.data...)
		table = binary.LittleEndian.AppendUint16(table, uint16(e.length))
		table = append(table, mixed(e.guid)...)
	}
	table = binary.LittleEndian.AppendUint16(table, uint16(pick(l.total, len(table)+18)))
	table = append(table, mixed(footer)...)
	if at := l.size - 32 - len(table); at >= 0 {
		copy(image[at:], table)
	}
	return image
}

func mixed(guid string) []byte {
	b := uuid.MustParse(guid)
	return append([]byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]}, b[8:]...)
}

func TestSectionsKeepTheirOrderInTheFile(t *testing.T) {
	t.Parallel()
	l := wellFormed()
	slices.Reverse(l.sections)
	f, err := ovmf.Parse(l.image())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(f.Sections, l.sections) || f.ResetEIP != 0x80b004 || *f.HashTable != (ovmf.Area{Base: 0x810c00, Size: 0x400}) {
		t.Errorf("parsed %+v", f)
	}
}

func TestEntriesNobodyNeedsAreSkipped(t *testing.T) {
	t.Parallel()
	l := wellFormed()
	l.entries = append([]entry{words(unknown), words("4c2eb361-7d9b-4cc3-8081-127c90d3d294", 1, 2)}, l.entries...)
	if _, err := ovmf.Parse(l.image()); err != nil {
		t.Error(err)
	}
}

// One row per rule; the reason must name what is wrong.
func TestEachHardeningRuleRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, reason string
		change       func(*layout)
	}{
		{"empty image", "size 0", func(l *layout) { l.size = 0 }},
		{"part of a page", "size 4100", func(l *layout) { l.size = 4100 }},
		{"over 16 MiB", "size 16781312", func(l *layout) { l.size = 16<<20 + 4096 }},
		{"table longer than the image", "table length", func(l *layout) { l.total = 4095 }},
		{"table shorter than its footer", "table length", func(l *layout) { l.total = 17 }},
		{"table ends inside an entry", "inside an entry", func(l *layout) { l.total = 18 + 17 }},
		{"entry shorter than its header", "entry length 17", func(l *layout) { l.set(reset, entry{reset, nil, 17}) }},
		{"entry longer than the table", "entry length", func(l *layout) { l.set(metadata, entry{metadata, make([]byte, 4), 0xffff}) }},
		{"entry twice", "twice", func(l *layout) { l.entries = append(l.entries, words(reset, 1)) }},
		{"no reset block", "reset block", func(l *layout) { l.drop(reset) }},
		{"reset block of another size", "reset block", func(l *layout) { l.set(reset, words(reset, 1, 2)) }},
		{"reset address zero", "reset address", func(l *layout) { l.set(reset, words(reset, 0)) }},
		{"no metadata", "SEV metadata", func(l *layout) { l.drop(metadata) }},
		{"metadata entry of another size", "SEV metadata", func(l *layout) { l.set(metadata, words(metadata, 2048, 0)) }},
		{"metadata before the image", "offset", func(l *layout) { l.set(metadata, words(metadata, 4097)) }},
		{"metadata far before the image", "offset", func(l *layout) { l.set(metadata, words(metadata, 0xffffffff)) }},
		{"metadata header past the end", "offset", func(l *layout) { l.set(metadata, words(metadata, 15)) }},
		{"metadata elsewhere", "signature", func(l *layout) { l.set(metadata, words(metadata, 4096)) }},
		{"another signature", "signature", func(l *layout) { l.magic = "ASEW" }},
		{"another version", "version 2", func(l *layout) { l.version = 2 }},
		{"length below the count's", "malformed", func(l *layout) { l.length = 16 + 12*4 }},
		{"length above the count's", "malformed", func(l *layout) { l.length = 16 + 12*6 }},
		{"65 sections", "malformed", func(l *layout) { l.sections = slices.Repeat(l.sections[:1], 65) }},
		{"count that wraps", "malformed", func(l *layout) { l.count, l.length = 0x15555556, 24 }},
		{"sections past the end", "malformed", func(l *layout) {
			l.magic, l.length, l.count = "", -1, -1
			l.set(metadata, words(metadata, 16))
		}},
		{"section address inside a page", "aligned", func(l *layout) { l.sections[0].GPA++ }},
		{"section size inside a page", "aligned", func(l *layout) { l.sections[0].Size++ }},
		{"section of no size", "aligned", func(l *layout) { l.sections[0].Size = 0 }},
		{"section that wraps at 4 GiB", "aligned", func(l *layout) { l.sections[0].GPA, l.sections[0].Size = 0xfffff000, 0x2000 }},
		{"unknown section type", "unknown type", func(l *layout) { l.sections[0].Type = 5 }},
		{"section type zero", "unknown type", func(l *layout) { l.sections[0].Type = 0 }},
		{"two pages of kernel hashes", "kernel hashes", func(l *layout) { l.sections[4].Size = 0x2000 }},
		{"two sections of kernel hashes", "kernel hashes", func(l *layout) { l.sections = append(l.sections, l.sections[4]) }},
		{"hash area of another entry size", "hash table entry", func(l *layout) { l.set(hashTable, words(hashTable, 0x810c00)) }},
		{"hash area too small", "too small", func(l *layout) { l.set(hashTable, words(hashTable, 0x810c00, 175)) }},
		{"hash area across two pages", "too small", func(l *layout) { l.set(hashTable, words(hashTable, 0x810f51, 0x400)) }},
		{"hash area outside its page", "outside", func(l *layout) { l.set(hashTable, words(hashTable, 0x811c00, 0x400)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := wellFormed()
			c.change(l)
			image := l.image()
			if c.name == "sections past the end" {
				image = atTheEnd(image)
			}
			f, err := ovmf.Parse(image)
			if err == nil || f != nil || !strings.Contains(err.Error(), c.reason) {
				t.Errorf("parsed %+v, reason %v, want one with %q", f, err, c.reason)
			}
		})
	}
}

// atTheEnd writes a metadata header for one section into the last 16 bytes,
// so that its descriptor would lie behind the image.
func atTheEnd(image []byte) []byte {
	header := append([]byte("ASEV"), 28, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
	copy(image[len(image)-16:], header)
	return image
}

func TestOnlyABuildThatVerifiesKernelsIsSaidToDoSo(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change   func(*layout)
		supports bool
	}{
		"AmdSev":                  {func(*layout) {}, true},
		"no hash area":            {func(l *layout) { l.drop(hashTable) }, false},
		"hash area of OvmfX64":    {func(l *layout) { l.set(hashTable, words(hashTable, 0, 0)) }, false},
		"area without its page":   {func(l *layout) { l.sections = l.sections[:4] }, false},
		"page without its area":   {func(l *layout) { l.drop(hashTable) }, false},
		"no metadata sections":    {func(l *layout) { l.sections = nil }, false},
		"area at a page's last":   {func(l *layout) { l.set(hashTable, words(hashTable, 0x810f50, 176)) }, true},
		"area at a page's start":  {func(l *layout) { l.set(hashTable, words(hashTable, 0x810000, 0x1000)) }, true},
		"pages in another order":  {func(l *layout) { slices.Reverse(l.sections) }, true},
		"an image of 16 MiB":      {func(l *layout) { l.size = 16 << 20 }, true},
		"64 sections, one hashed": {func(l *layout) { l.sections = append(slices.Repeat(l.sections[:1], 63), l.sections[4]) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := wellFormed()
			c.change(l)
			f, err := ovmf.Parse(l.image())
			if err != nil {
				t.Fatal(err)
			}
			err = f.SupportsKernelHashes()
			if (err == nil) != c.supports {
				t.Errorf("supports kernel hashes: %v", err)
			}
			if err != nil && (!errors.Is(err, ovmf.ErrNoKernelHashes) || !strings.Contains(err.Error(), "ovmf-amdsev")) {
				t.Errorf("no remedy: %v", err)
			}
		})
	}
}

// Whatever is accepted keeps the promises that measuring relies on.
func FuzzParse(f *testing.F) {
	f.Add(make([]byte, 4096))
	f.Add(wellFormed().image())
	without := wellFormed()
	without.drop(hashTable)
	f.Add(without.image())
	reversed := wellFormed()
	slices.Reverse(reversed.sections)
	f.Add(reversed.image())
	f.Fuzz(func(t *testing.T, image []byte) {
		fw, err := ovmf.Parse(image)
		if err != nil {
			if fw != nil {
				t.Error("firmware and an error")
			}
			return
		}
		if fw.Size != len(image) || fw.Size > ovmf.MaxSize || len(fw.Sections) > 64 || fw.ResetEIP == 0 {
			t.Errorf("bounds are not kept: %+v", fw)
		}
		for _, s := range fw.Sections {
			if s.GPA%ovmf.PageSize != 0 || s.Size%ovmf.PageSize != 0 || uint64(s.GPA)+uint64(s.Size) > 1<<32 {
				t.Errorf("section %+v", s)
			}
		}
		if fw.SupportsKernelHashes() == nil && fw.HashTable.Base%ovmf.PageSize+ovmf.HashTableSize > ovmf.PageSize {
			t.Errorf("hash table leaves its page: %+v", fw.HashTable)
		}
	})
}
