// Package imagetest makes the inputs of a guest image for tests, a kernel
// package's folder with modules that name their dependencies as real ones do,
// and takes initrds apart; or a whole image that can be measured. It keeps no
// state.
package imagetest

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image"
)

// Inputs are the inputs of a production image; OutDir is left empty.
func Inputs(t *testing.T) image.Options {
	t.Helper()
	dir := t.TempDir()
	put := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	o := image.Options{
		Init: put("init", "the init"), Kernel: put("vmlinuz", "the kernel"), KernelSource: "kernel 1",
		Firmware: put("fd", "the firmware"), FirmwareSource: "firmware 1", Variant: contract.VariantProduction, Name: "test",
		ModulesDir: filepath.Join(dir, "modules"),
	}
	put("modules/modules.builtin", "kernel/lib/crc.ko\nkernel/crypto/ecdsa_generic.ko\n")
	for name, needs := range map[string]string{
		"net/virtio_net": "net_failover", "net/net_failover": "failover,crc", "net/failover": "", "block/virtio_blk": "",
		"acpi/button": "", "fs/configfs": "", "virt/tsm": "configfs", "virt/sev-guest": "tsm",
		"crypto/ecdh_generic": "", "crypto/gcm": "", "crypto/ghash-generic": "", "gpu/drm": "",
	} {
		Module(t, o.ModulesDir, name, needs)
	}
	return o
}

// Module writes drivers/NAME.ko.xz with the dependencies of a comma-separated
// list.
func Module(t *testing.T, modulesDir, name, needs string) {
	t.Helper()
	var out bytes.Buffer
	w, err := xz.WriterConfig{DictCap: lzma.MinDictCap}.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(Object(filepath.Base(name), needs)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(modulesDir, "kernel/drivers", name+".ko.xz")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Object is an unpacked module with the dependencies of a comma-separated list.
// No kernel loads it.
func Object(name, needs string) []byte {
	return object("license=GPL\x00depends=" + needs + "\x00name=" + name + "\x00")
}

// object is a relocatable ELF file with one .modinfo section (ELF-64, chapters
// "File header" and "Sections").
func object(info string) []byte {
	const header, section = 64, 64
	const names = "\x00.modinfo\x00.shstrtab\x00"
	infoAt := header
	namesAt := infoAt + len(info)
	table := (namesAt + len(names) + 7) &^ 7
	out := make([]byte, table+3*section)
	le := binary.LittleEndian
	copy(out, "\x7fELF\x02\x01\x01")
	le.PutUint16(out[16:], 1)  // ET_REL
	le.PutUint16(out[18:], 62) // EM_X86_64
	le.PutUint32(out[20:], 1)
	le.PutUint64(out[40:], uint64(table))
	le.PutUint16(out[52:], header)
	le.PutUint16(out[58:], section)
	le.PutUint16(out[60:], 3)
	le.PutUint16(out[62:], 2)
	copy(out[infoAt:], info)
	copy(out[namesAt:], names)
	for i, s := range []struct {
		name, kind uint32
		at, size   int
	}{{1, 1, infoAt, len(info)}, {10, 3, namesAt, len(names)}} {
		h := out[table+(i+1)*section:]
		le.PutUint32(h, s.name)
		le.PutUint32(h[4:], s.kind)
		le.PutUint64(h[24:], uint64(s.at))
		le.PutUint64(h[32:], uint64(s.size))
		le.PutUint64(h[48:], 1)
	}
	return out
}

// Unpack takes a newc archive apart.
func Unpack(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	const header = 110
	out := map[string][]byte{}
	align := func(n int) int { return (n + 3) &^ 3 }
	for at := 0; ; {
		if len(archive) < at+header || string(archive[at:at+6]) != "070701" {
			t.Fatalf("no entry at %d", at)
		}
		field := func(i int) int {
			v, err := strconv.ParseUint(string(archive[at+6+8*i:at+14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return int(v)
		}
		size, nameSize := field(6), field(11)
		name := string(archive[at+header : at+header+nameSize-1])
		data := align(at + header + nameSize)
		if name == "TRAILER!!!" {
			return out
		}
		out[name] = archive[data : data+size]
		at = align(data + size)
	}
}
