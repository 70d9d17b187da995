package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestABuildHasOneWayToReports builds the init with and without the tag: the
// emulated channel is in one, the hardware's interface in the other.
func TestABuildHasOneWayToReports(t *testing.T) {
	t.Parallel()
	const port, device = "org.confidential-node.psp", "/dev/sev-guest"
	for tags, c := range map[string]struct{ has, lacks string }{
		"":         {device, port},
		"emulated": {port, device},
	} {
		t.Run("tags="+tags, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "init")
			goBuild(t, file, tags, ".")
			program, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Contains(program, []byte(c.has)) || bytes.Contains(program, []byte(c.lacks)) {
				t.Errorf("has %s: %v, has %s: %v", c.has, bytes.Contains(program, []byte(c.has)), c.lacks, bytes.Contains(program, []byte(c.lacks)))
			}
			again := filepath.Join(t.TempDir(), "init")
			goBuild(t, again, tags, ".")
			if second, err := os.ReadFile(again); err != nil || !bytes.Equal(program, second) {
				t.Errorf("two builds differ: %v", err)
			}
		})
	}
}
