package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/tests/skip"
)

func TestFirmwareSaysWhatAnImageIs(t *testing.T) {
	t.Parallel()
	firmware := filepath.Join("..", "..", "shared", "data", "firmware", "OVMF.amdsev.fd")
	if _, err := os.Stat(firmware); err != nil {
		skip.Missing(t, "a real AmdSev OVMF in ../shared/data")
	}
	code, out, stderr := run(t, "firmware", "inspect", firmware, "-o", "json")
	if code != exitOK {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	matchesSchema(t, out)
	var doc firmwareDocument
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if !doc.Usable || doc.Build != "AmdSev" || doc.Base != "0xffc00000" || doc.ResetEIP != "0x80b004" || len(doc.Sections) != 7 ||
		*doc.HashTable != (memoryArea{"0x810c00", "0x400"}) || doc.Sections[6] != (firmwareSection{memoryArea{"0x810000", "0x1000"}, "SNP_KERNEL_HASHES"}) {
		t.Errorf("said %s", out)
	}
	_, table, _ := run(t, "firmware", "inspect", firmware)
	for _, want := range []string{"AmdSev", "reset EIP", "0x80b004", "0x810c00+0x400", "SNP_KERNEL_HASHES", doc.SHA256} {
		if !strings.Contains(table, want) {
			t.Errorf("the table lacks %s:\n%s", want, table)
		}
	}
	if _, out, _ := run(t, "firmware", "inspect", firmware, "-o", "yaml"); !strings.Contains(out, "reset_eip: ") {
		t.Errorf("yaml is %s", out)
	}
}

func TestFirmwareThatCannotBootGuestsIsExitFiveAndARemedy(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "bios.fd")
	if err := os.WriteFile(file, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"table", "json", "yaml"} {
		code, out, _ := run(t, "firmware", "inspect", file, "-o", format)
		if code != exitPrecondition || !strings.Contains(out, "ovmf-amdsev") {
			t.Errorf("%s: exit %d\n%s", format, code, out)
		}
		if format == "json" {
			matchesSchema(t, out)
		}
	}
	code, out, _ := run(t, "firmware", "list", filepath.Dir(file), "-o", "json")
	if code != exitOK || !strings.Contains(out, file) {
		t.Errorf("exit %d\n%s", code, out)
	}
	matchesSchema(t, out)
	if code, out, _ := run(t, "firmware", "list", filepath.Dir(file)); code != exitOK || !strings.Contains(out, "USABLE") || !strings.Contains(out, "no OVMF") {
		t.Errorf("exit %d\n%s", code, out)
	}
	if code, out, _ := run(t, "firmware", "list", t.TempDir(), "-o", "json"); code != exitOK || !strings.Contains(out, `"firmware": []`) {
		t.Errorf("an empty host: exit %d\n%s", code, out)
	}
	if code, _, _ := run(t, "firmware", "inspect", file+"x"); code != exitNotFound {
		t.Errorf("no file: exit %d", code)
	}
	if code, _, _ := run(t, "firmware", "inspect"); code != exitUsage {
		t.Errorf("no argument: exit %d", code)
	}
	if code, _, _ := run(t, "firmware", "paint"); code != exitUsage {
		t.Errorf("an unknown verb: exit %d", code)
	}
}
