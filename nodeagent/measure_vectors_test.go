package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/confidential-node/agent/firmware/measure/measuretest"
)

func TestMeasurePrintsTheLaunchDigestOfTheFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	firmware := file("fw", measuretest.Firmware(65536, true))
	kernel := []string{"--kernel", file("k", []byte("kernel-bytes")), "--initrd", file("i", []byte("initrd-bytes")), "--cmdline", "console=ttyS0 ro"}
	for want, args := range map[string][]string{
		"75bc4ca55c0aca30c1226f9103b4c5eb40d76cadbd5e002fb43350ac54a402c43ece803885d5e5c71cdbca0b75073cb3": append([]string{"--vcpus", "4"}, kernel...),
		"264e7e4b470d09fcd26619ef02548544fe046355270b4a4efdcdaea60d658d2b4ec537b83fc9ce1e024f00c114b82209": append([]string{"--vcpus", "2", "--cpu-model", "EPYC-Genoa"}, kernel...),
		"d8702cc3357cc6c020959e03e0ddf60f5e16f1941d6cdd286a6c001bb1aee61aacac83ba15f1bdc8e71fdd299551d715": append([]string{"--vcpus", "2", "--guest-features", "0x201"}, kernel...),
		"3f404611b168ff73f1d28f56e246478ceb64881029b33ed3255c25df7bd2887eb752526182497d8b7b34adb4715b13b6": {"--vcpus", "4"},
	} {
		args = append([]string{"measure", "--firmware", firmware}, args...)
		if code, out, errOut := run(t, args...); code != exitOK || out != want+"\n" {
			t.Errorf("%q: exit %d, %q, %s", args, code, out, errOut)
		}
		code, out, errOut := run(t, append(args, "-o", "json")...)
		var doc struct {
			LaunchDigest string `json:"launch_digest"`
		}
		if err := json.Unmarshal([]byte(out), &doc); code != exitOK || err != nil || doc.LaunchDigest != want {
			t.Errorf("%q as JSON: exit %d, %s, %s, %v", args, code, out, errOut, err)
		}
		matchesSchema(t, out)
	}
}
