//go:build emulated

package rig_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/rig/rigtest"
)

const scenarioEnv = "NODEAGENT_TEST_SCENARIO"

// runScenario is what the inner rig's program does.
func runScenario(name string) int {
	switch name {
	case "exit":
		return 7
	case "host":
		h, err := rig.NewHost(context.Background(), 0, os.Stderr)
		if err != nil {
			fmt.Println("host:", err)
			return 1
		}
		if err := h.Close(); err != nil {
			fmt.Println("host:", err)
			return 1
		}
		return 0
	case "mess":
		if err := makeMess(); err != nil {
			fmt.Println("mess:", err)
			return 1
		}
		return 9
	case "wait":
		if err := makeMess(); err != nil {
			fmt.Println("wait:", err)
			return 1
		}
		fmt.Println("waiting")
		select {}
	}
	return 2
}

// makeMess leaves everything a run can leave: a host with its daemons, a
// domain, a tap, rules, a daemon that left its session, files.
func makeMess() error {
	ctx := context.Background()
	h, err := rig.NewHost(ctx, 0, nil)
	if err != nil {
		return err
	}
	const domain = `<domain type="qemu"><name>left</name><memory unit="MiB">64</memory><os><type arch="x86_64" machine="q35">hvm</type></os></domain>`
	for _, script := range []string{
		"ip tuntap add left0 mode tap",
		"nft add table inet left",
		"echo '" + domain + "' >/run/left.xml && virsh -q -c " + rig.LibvirtURI + " create /run/left.xml >/dev/null",
		"mkdir -p /var/lib/nodeagent /etc/nodeagent /run/nodeagent && touch /var/lib/nodeagent/left /etc/left /var/log/libvirt/left $(mktemp)",
		"setsid sleep 1000 </dev/null >/dev/null 2>&1 & disown",
	} {
		if out, err := h.Command(ctx, "bash", "-c", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
	}
	for _, script := range []string{"ip link add left1 type bridge", "nft add table inet left", "touch /run/left $(mktemp)", "setsid sleep 1000 </dev/null >/dev/null 2>&1 & disown"} {
		if out, err := exec.CommandContext(ctx, "bash", "-c", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
	}
	return nil
}

// inner runs this binary's scenario in a rig of its own.
func inner(t *testing.T, scenario string) *exec.Cmd {
	t.Helper()
	return rigtest.Inner(t, "/proc/self/exe", scenarioEnv+"="+scenario)
}

func TestTheExitCodeIsPassedOn(t *testing.T) {
	out, err := inner(t, "exit").Output()
	if code := exitStatus(err); code != 7 {
		t.Errorf("exit code %d: %v\n%s", code, err, out)
	}
}

// The host's daemons must not end up in the folder tree around the chroot.
func TestARunInAChrootStaysInIt(t *testing.T) {
	cmd := inner(t, "host")
	binary := cmd.Args[len(cmd.Args)-1]
	cmd.Args = []string{"unshare", "--mount", "bash", "-c", `mount --rbind / "$0" && exec chroot "$0" "$1"`, t.TempDir(), binary}
	before := rigtest.Look(t)
	if out, err := cmd.Output(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	before.NothingLeft()
}

func exitStatus(err error) int {
	if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // of this very package
		return exit.ExitCode()
	}
	return 0
}

func TestNothingIsLeftBehind(t *testing.T) {
	cmd := inner(t, "mess")
	before := rigtest.Look(t)
	out, err := cmd.Output()
	if code := exitStatus(err); code != 9 {
		t.Fatalf("exit code %d: %v\n%s", code, err, out)
	}
	if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); len(lines) != 1 {
		t.Errorf("left in /tmp: %q", lines[1:])
	}
	before.NothingLeft()
}

func TestNothingIsLeftBehindHoweverItEnds(t *testing.T) {
	for name, c := range map[string]struct {
		signal syscall.Signal
		inner  bool // to the program's first stage, not to its starter
		code   int
	}{
		"asked to end": {syscall.SIGTERM, false, 128 + int(syscall.SIGTERM)},
		"killed":       {syscall.SIGKILL, true, 128 + int(syscall.SIGKILL)},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := inner(t, "wait")
			before := rigtest.Look(t)
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines, pid := bufio.NewScanner(stdout), 0
			for lines.Scan() && lines.Text() != "waiting" {
				if _, err := fmt.Sscanf(lines.Text(), "inner %d", &pid); err != nil {
					t.Fatalf("it says %q", lines.Text())
				}
			}
			if !c.inner {
				pid = cmd.Process.Pid
			}
			if err := syscall.Kill(pid, c.signal); err != nil {
				t.Fatal(err)
			}
			for lines.Scan() {
				t.Errorf("left in /tmp: %s", lines.Text())
			}
			if code := exitStatus(cmd.Wait()); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			before.NothingLeft()
		})
	}
}
