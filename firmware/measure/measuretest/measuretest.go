// Package measuretest builds firmware images that no firmware is, by a recipe
// whose launch digests were cross-checked with an independent implementation.
// It is pure.
package measuretest

import (
	"encoding/binary"

	"github.com/google/uuid"
)

func put32(image []byte, at int, words ...uint32) {
	for i, w := range words {
		binary.LittleEndian.PutUint32(image[at+4*i:], w)
	}
}

// Firmware builds an image of n bytes, with or without an area for kernel
// hashes.
func Firmware(n int, hashes bool) []byte {
	image := make([]byte, n)
	for i := range image {
		image[i] = byte(7*i + i/256)
	}
	sections := []uint32{0x800000, 0x9000, 1, 0x80a000, 0x3000, 1, 0x80d000, 0x1000, 2, 0x80e000, 0x1000, 3, 0x80f000, 0x1000, 4}
	if hashes {
		sections = append(sections, 0x811000, 0xf000, 1, 0x810000, 0x1000, 0x10)
	} else {
		sections = append(sections, 0x810000, 0x10000, 1)
	}
	meta := n - 1024
	copy(image[meta:], "ASEV")
	put32(image, meta+4, uint32(16+4*len(sections)), 1, uint32(len(sections)/3))
	put32(image, meta+16, sections...)
	var table []byte
	entry := func(guid string, words ...uint32) {
		for _, w := range words {
			table = binary.LittleEndian.AppendUint32(table, w)
		}
		table = binary.LittleEndian.AppendUint16(table, uint16(4*len(words)+18))
		table = append(table, mixedEndian(guid)...)
	}
	entry("dc886566-984a-4798-a75e-5585a7bf67cc", 1024)
	if hashes {
		entry("7255371f-3a3b-4b04-927b-1da6efa8d454", 0x810c00, 0x400)
	}
	entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", 0x80b004)
	table = binary.LittleEndian.AppendUint16(table, uint16(len(table)+18))
	table = append(table, mixedEndian("96b582de-1fb2-45f7-baea-a366c55a082d")...)
	copy(image[n-32-len(table):], table)
	return image
}

// mixedEndian is how firmware stores a GUID (UEFI 2.10, appendix A).
func mixedEndian(guid string) []byte {
	b := uuid.MustParse(guid)
	return append([]byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]}, b[8:]...)
}
