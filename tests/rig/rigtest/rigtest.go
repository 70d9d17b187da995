// Package rigtest sees whether a run inside a run left anything behind: what
// the inner one leaves shows in the outer, where nobody else makes links,
// processes or files. It keeps no state.
package rigtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
)

// Inner returns a command that runs a program with an empty, private /tmp and
// prints what is left in it at the end. The program does not know that it runs
// inside a rig. The first line printed is "inner PID".
func Inner(t *testing.T, program string, env ...string) *exec.Cmd {
	t.Helper()
	if !rig.Capable() {
		skip.Missing(t, "root")
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "inner") // /tmp, where it may lie, is covered
	if err := os.WriteFile(binary, text, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "bash", "-c", cover+
		`{ "$1" & pid=$!; trap 'kill -TERM $pid' TERM; echo "inner $pid"; wait $pid; wait $pid; code=$?; `+uncover+`ls -A /tmp; exit $code; }`, belowTmp(t), binary)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "NODEAGENT_RIG_") || strings.HasPrefix(e, "TMPDIR=")
	}), env...)
	cmd.Stderr = os.Stderr
	return cmd
}

// cover puts an empty /tmp over the real one, and the repository back into it
// when it lies there; uncover takes that out again.
const (
	cover = `set -e; [ -z "$0" ] || exec 3<"$0"; mount -t tmpfs tmpfs /tmp
[ -z "$0" ] || { mkdir -p "$0"; mount --no-canonicalize --bind /proc/self/fd/3 "$0"; exec 3<&-; cd "$PWD"; }; set +e
`
	uncover = `[ -z "$0" ] || { cd /; umount "$0"; rmdir --ignore-fail-on-non-empty -p "$0" 2>/dev/null; }; `
)

// belowTmp is the repository's folder if it is below /tmp, otherwise empty.
func belowTmp(t *testing.T) string {
	t.Helper()
	mod, err := exec.CommandContext(t.Context(), "go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	if root := filepath.Dir(strings.TrimSpace(string(mod))); strings.HasPrefix(root, "/tmp/") {
		return root
	}
	return ""
}

// Before is the world before a run.
type Before struct {
	t         *testing.T
	world     string
	processes []string
}

// Look remembers the world.
func Look(t *testing.T) Before {
	t.Helper()
	return Before{t, world(t), processes(t)}
}

// NothingLeft waits for the last processes to end, and compares.
func (b Before) NothingLeft() {
	b.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(10 * time.Second)
	for !slices.Equal(processes(b.t), b.processes) {
		select {
		case <-tick.C:
		case <-limit:
			b.t.Fatalf("processes were\n%q\nand are\n%q", b.processes, processes(b.t))
		}
	}
	if after := world(b.t); after != b.world {
		b.t.Errorf("before:\n%s\nafter:\n%s", b.world, after)
	}
}

// world lists everything a run could leave behind. /run/mount is the work of
// Inner's own mount; whether a link has a carrier is its neighbours' affair.
func world(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "bash", "-c", `set -e
ip -o link | sed 's/^[0-9]*: //; s/[:@].*//'
nft list ruleset
find /run \( -path `+rig.ScratchDir+` -o -path /run/mount \) -prune -o -print | sort
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
