//go:build emulated

package rig_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
)

// The tests here run a rig inside this one: what the inner one leaves behind
// shows in the outer, where nobody else makes links, processes or files.

const scenarioEnv = "NODEAGENT_TEST_SCENARIO"

// runScenario is what the inner rig's program does.
func runScenario(name string) int {
	switch name {
	case "exit":
		return 7
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

// inner returns a command that runs this binary with an empty, private /tmp
// and lists what is left in it at the end. It does not know of our rig.
func inner(t *testing.T, scenario string) *exec.Cmd {
	t.Helper()
	if !rig.Capable() {
		skip.Missing(t, "root")
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "inner") // /tmp, where it lies, is covered
	if err := os.WriteFile(binary, self, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "bash", "-c",
		`mount -t tmpfs tmpfs /tmp && { "$0" & pid=$!; trap 'kill -TERM $pid' TERM; echo "inner $pid"; wait $pid; wait $pid; code=$?; ls -A /tmp; exit $code; }`, binary)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "NODEAGENT_RIG_") || strings.HasPrefix(e, "TMPDIR=")
	}), scenarioEnv+"="+scenario)
	cmd.Stderr = os.Stderr
	return cmd
}

// world lists everything a run could leave behind.
func world(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "bash", "-c", `set -e
ip -o link | sed 's/^[0-9]*: //'
nft list ruleset
find /run -path `+rig.ScratchDir+` -prune -o -print | sort
ls -A `+rig.ScratchDir+` | grep -v ^Test || true
find /etc /var/lib /var/cache /var/log -maxdepth 2 \( -name '*nodeagent*' -o -name '*libvirt*' -o -name left \) | sort
find /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt | sort
cut -d' ' -f2- /proc/self/mounts`).Output()
	if err != nil {
		t.Fatalf("listing: %v", err)
	}
	return string(out)
}

// processes are the commands of all others in our process namespace.
func processes(t *testing.T) []string {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, dir := range dirs {
		if text, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil && len(text) > 0 {
			all = append(all, strings.ReplaceAll(string(text), "\x00", " "))
		}
	}
	slices.Sort(all)
	return all
}

// nothingLeft waits for the last processes to end, and compares.
func nothingLeft(t *testing.T, before string, running []string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(10 * time.Second)
	for !slices.Equal(processes(t), running) {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("processes were\n%q\nand are\n%q", running, processes(t))
		}
	}
	if after := world(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestTheExitCodeIsPassedOn(t *testing.T) {
	out, err := inner(t, "exit").Output()
	if code := exitStatus(err); code != 7 {
		t.Errorf("exit code %d: %v\n%s", code, err, out)
	}
}

func exitStatus(err error) int {
	if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // of this very package
		return exit.ExitCode()
	}
	return 0
}

func TestNothingIsLeftBehind(t *testing.T) {
	cmd := inner(t, "mess")
	before, running := world(t), processes(t)
	out, err := cmd.Output()
	if code := exitStatus(err); code != 9 {
		t.Fatalf("exit code %d: %v\n%s", code, err, out)
	}
	if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); len(lines) != 1 {
		t.Errorf("left in /tmp: %q", lines[1:])
	}
	nothingLeft(t, before, running)
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
			before, running := world(t), processes(t)
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
			nothingLeft(t, before, running)
		})
	}
}
