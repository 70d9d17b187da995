package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The child says what the kernel holds of it; this process stays as it is.
func TestNobodyGetsTheAgentsMemoryFromACrash(t *testing.T) {
	const child = "NODEAGENT_TEST_CORES"
	if os.Getenv(child) != "" {
		if err := leaveNoCore(); err != nil {
			t.Fatal(err)
		}
		var limit unix.Rlimit
		dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if limitErr := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil || limitErr != nil {
			t.Fatal(err, limitErr)
		}
		fmt.Printf("dumpable %d, core %d/%d\n", dumpable, limit.Cur, limit.Max)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), child+"=1")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "dumpable 0, core 0/0") {
		t.Errorf("%v: %s", err, out)
	}
}
