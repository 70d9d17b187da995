package imagetest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/confidential-node/agent/firmware/contract"
)

// Folder writes a whole guest image that can be measured, and that nothing
// could boot, and returns its folder.
func Folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	put := func(name string, data []byte) contract.ImageFile {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(data)
		return contract.ImageFile{File: name, SHA256: hex.EncodeToString(sum[:]), Size: int64(len(data))}
	}
	raw, err := json.Marshal(contract.ImageDescription{
		Version: contract.ImageVersion, Name: "test", Variant: contract.VariantProduction, Emulated: true, Cmdline: "quiet",
		Firmware: put("fw", Firmware()), Kernel: put("kernel", []byte("kernel")), Initrd: put("initrd", []byte("initrd")),
	})
	if err != nil {
		t.Fatal(err)
	}
	put(contract.ImageDescriptionName, raw)
	return dir
}

// Firmware is 4 KiB with the footer table and the SEV metadata of AmdSev.
func Firmware() []byte {
	const size = 4096
	image := make([]byte, size)
	put := func(at int, words ...uint32) {
		for i, word := range words {
			binary.LittleEndian.PutUint32(image[at+4*i:], word)
		}
	}
	sections := []uint32{0x800000, 0x9000, 1, 0x80d000, 0x1000, 2, 0x80e000, 0x1000, 3, 0x810000, 0x1000, 0x10}
	meta := size - 1024
	copy(image[meta:], "ASEV")
	put(meta+4, uint32(16+4*len(sections)), 1, uint32(len(sections)/3))
	put(meta+16, sections...)
	var table []byte
	guid := func(text string) {
		g := uuid.MustParse(text)
		table = append(table, g[3], g[2], g[1], g[0], g[5], g[4], g[7], g[6])
		table = append(table, g[8:]...)
	}
	entry := func(id string, words ...uint32) {
		for _, word := range words {
			table = binary.LittleEndian.AppendUint32(table, word)
		}
		table = binary.LittleEndian.AppendUint16(table, uint16(4*len(words)+18))
		guid(id)
	}
	entry("dc886566-984a-4798-a75e-5585a7bf67cc", 1024)
	entry("7255371f-3a3b-4b04-927b-1da6efa8d454", 0x810c00, 0x400)
	entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", 0x80b004)
	table = binary.LittleEndian.AppendUint16(table, uint16(len(table)+18))
	guid("96b582de-1fb2-45f7-baea-a366c55a082d")
	copy(image[size-32-len(table):], table)
	return image
}
