//go:build emulated

package fault_test

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/tests/trial"
)

// ownDisk puts the agent's state on an ext4 file system of its own, with few
// inodes, that can be filled, frozen and aborted.
func (w *world) ownDisk(t *testing.T) {
	t.Helper()
	if err := w.Host.Agent().Stop(); err != nil {
		t.Fatal(err)
	}
	script := `truncate -s 256M /run/state.img
mkfs.ext4 -q -N 1024 -O ^has_journal /run/state.img
tune2fs -O has_journal /run/state.img >/dev/null
mkdir /run/state
mount -o loop /run/state.img /run/state && cp -a ` + trial.StateDir + `/. /run/state/ && umount /run/state
mount -o loop /run/state.img ` + trial.StateDir
	if out, err := w.Host.Command(t.Context(), "bash", "-ec", script).CombinedOutput(); err != nil {
		skip.Missing(t, "a loop device with ext4 ("+strings.TrimSpace(string(out))+")")
	}
	if err := w.StartAgent(w.t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The disks and limits of a host fail while a guest runs. Admission closes
// with the cause and opens by itself, status and heartbeats go on, the guest
// and the agent are the same afterwards, and what was asked meanwhile takes
// effect once.
func TestTheHostsDisksAndLimitsFailUnderARunningGuest(t *testing.T) {
	w := newWorld(t)
	w.ownDisk(t)
	guest := w.runs(t)
	agent, qemu := w.Host.Agent().PID(), w.qemu(t, guest)
	w.signal(t, qemu, syscall.SIGSTOP) // or it gives up its broker after some minutes
	files := fmt.Sprintf("prlimit --pid %d --nofile=", agent)
	hard := w.sh(t, "prlimit --pid %d --nofile --output HARD --noheadings", agent)
	for _, c := range []struct {
		name, code     string
		break_, repair string
	}{
		{
			"no space", "host.disk-full",
			"fallocate -l $(($(stat -f -c '%a*%S' " + trial.StateDir + ") - 20000000)) " + trial.StateDir + "/big",
			"rm " + trial.StateDir + "/big",
		},
		{
			"not a byte", "host.disk-full",
			"dd if=/dev/zero of=" + trial.StateDir + "/big bs=1M 2>/dev/null || true",
			"rm " + trial.StateDir + "/big",
		},
		{
			"no inodes", "host.inodes-exhausted",
			"mkdir " + trial.StateDir + "/many; for i in $(seq $(($(stat -f -c %d " + trial.StateDir + ") - 50))); do : >" + trial.StateDir + "/many/$i; done",
			"rm -r " + trial.StateDir + "/many",
		},
		{
			"remounted read-only", "host.disk-read-only",
			"mount --bind " + trial.StateDir + " " + trial.StateDir + "; mount -o remount,bind,ro " + trial.StateDir,
			"umount " + trial.StateDir,
		},
		{
			"few descriptors", "host.descriptors",
			files + "$(($(ls /proc/" + strconv.Itoa(agent) + "/fd | wc -l) + 40)):", files + hard + ":",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.sh(t, "%s", c.break_)
			w.short(t, c.code)
			if c.name != "not a byte" { // nothing can be stored there, not even a refusal
				w.endsAs(t, w.send(t, nil), 0, c.code)
			}
			w.heard(t)
			w.same(t, agent, guest, qemu)
			w.sh(t, "%s", c.repair)
			w.short(t)
		})
	}
	t.Run("no descriptor", func(t *testing.T) { w.noDescriptor(t, files+"5:", files+hard+":") })
	t.Run("errs", func(t *testing.T) { w.errs(t) })
	t.Run("hangs", func(t *testing.T) { w.hangs(t) })
	w.same(t, agent, guest, qemu)
	t.Run("aborted", func(t *testing.T) { w.aborted(t, guest, qemu) })
}

// noDescriptor leaves the agent none: it cannot even be asked, and goes on when
// it can open files again.
func (w *world) noDescriptor(t *testing.T, take, giveBack string) {
	t.Helper()
	w.sh(t, "%s", take)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := w.Host.Status(ctx); err == nil {
		t.Error("status was answered without a descriptor")
	}
	w.heard(t) // over the connection it has
	w.endsAs(t, w.send(t, nil), 0, "host.descriptors")
	w.toldShort(t, "host.descriptors")
	w.sh(t, "%s", giveBack)
	w.short(t)
}

// errs makes every sync of the agent fail as on a broken disk.
func (w *world) errs(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		skip.Missing(t, "strace")
	}
	tracer := exec.CommandContext(w.t.Context(), "strace", "-f", "-p", strconv.Itoa(w.Host.Agent().PID()), "-o", "/dev/null",
		"-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO")
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- tracer.Wait() }()
	w.traced(t)
	w.short(t, "host.disk-failing", "host.disk-failing", "host.disk-failing")
	o := w.send(t, nil) // cannot be stored, and comes again
	w.heard(t)
	_ = tracer.Process.Signal(syscall.SIGTERM)
	_ = untraced(tracer, ended)
	w.short(t)
	w.started(t, o)
	w.stops(t, o)
	if err := w.Once(t.Context(), o.GetGuestId()); err != nil {
		t.Error(err)
	}
}

// hangs freezes the disk of state_dir.
func (w *world) hangs(t *testing.T) {
	t.Helper()
	thaw := func() { w.sh(w.t, "fsfreeze -u %s 2>/dev/null || true", trial.StateDir) }
	t.Cleanup(thaw) // or nothing that writes there can ever be killed
	w.sh(t, "fsfreeze -f %s", trial.StateDir)
	o := w.send(t, nil)
	threads := w.threads(t)
	for range 2 {
		w.status(t)
	}
	w.short(t, "host.disk-silent")
	w.heard(t)
	if now := w.threads(t); now > threads+8 {
		t.Errorf("%d threads before, %d after status was asked again and again", threads, now)
	}
	thaw()
	w.short(t)
	w.started(t, o)
	w.stops(t, o)
	if err := w.Once(t.Context(), o.GetGuestId()); err != nil {
		t.Error(err)
	}
}

// aborted makes the file system read-only under the agent's open files, as the
// kernel does after an error. The agent outlives it with its guest; a stop that
// could not be stored comes again when an operator has repaired the disk.
func (w *world) aborted(t *testing.T, guest *fault.Order, qemu int) {
	t.Helper()
	agent := w.Host.Agent().PID()
	w.sh(t, "mount -o remount,abort %s || true", trial.StateDir)
	w.until(t, "the disk to be known as unusable", func(ctx context.Context) (bool, error) {
		s, err := w.Host.Status(ctx)
		return len(s.Shortages) == 1 && (strings.HasPrefix(s.Shortages[0], "host.disk-read-only") || strings.HasPrefix(s.Shortages[0], "host.disk-failing")), err
	})
	if _, err := w.API.Stop(t.Context(), guest.GetGuestId(), time.Second); err != nil {
		t.Fatal(err)
	}
	w.heard(t)
	w.same(t, agent, guest, qemu)
	if err := w.Host.Agent().Stop(); err != nil {
		t.Error(err)
	}
	// QEMU's mount namespace holds the old one until its end.
	w.signal(t, qemu, syscall.SIGCONT)
	w.sh(t, "umount %[1]s; cp /run/state.img /run/repaired.img; e2fsck -fy /run/repaired.img >/dev/null || [ $? = 1 ]; mount -o loop /run/repaired.img %[1]s", trial.StateDir)
	if out := w.sh(t, "kill -0 %d && echo lives", qemu); out != "lives" {
		t.Fatal("the guest did not outlive it")
	}
	if err := w.StartAgent(w.t.Context()); err != nil {
		t.Fatal(err)
	}
	w.endsAs(t, guest, api.GuestStatus_GUEST_STATUS_STOPPED, "")
	w.clean(t, guest)
}
