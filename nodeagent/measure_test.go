package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/tests/skip"
)

func TestMeasurePrintsTheDigestOfTheFilesItIsGiven(t *testing.T) {
	t.Parallel()
	firmware := filepath.Join("..", "..", "shared", "data", "firmware", "OVMF.amdsev.fd")
	image, err := os.ReadFile(firmware)
	if err != nil {
		skip.Missing(t, "a real AmdSev OVMF in ../shared/data")
	}
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{"measure", "--firmware", firmware, "--kernel", file("kernel"), "--initrd", file("initrd"), "--cmdline", "quiet", "--vcpus", "4"}
	want, err := measure.Digest(measure.Input{
		Firmware: image, Kernel: &measure.KernelDigests{Kernel: sha256.Sum256([]byte("kernel")), Initrd: sha256.Sum256([]byte("initrd")), Cmdline: "quiet"},
		VCPUs: 4, CPUModel: "EPYC-v4", GuestFeatures: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	code, out, stderr := run(t, append(args, "-o", "json")...)
	if code != exitOK {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	matchesSchema(t, out)
	var doc launchDigest
	if err := json.Unmarshal([]byte(out), &doc); err != nil || doc.LaunchDigest != hex.EncodeToString(want[:]) {
		t.Errorf("printed %s, want %x (%v)", doc.LaunchDigest, want, err)
	}
	for format, text := range map[string]string{"table": hex.EncodeToString(want[:]) + "\n", "yaml": "launch_digest: " + hex.EncodeToString(want[:])} {
		if code, out, _ := run(t, append(args, "-o", format)...); code != exitOK || !strings.Contains(out, text) {
			t.Errorf("%s: exit %d\n%s", format, code, out)
		}
	}
}
