//go:build emulated

package fault_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/tests/trial"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/domain"
)

// libvirtd is the host's.
func (w *world) libvirtd(t *testing.T) int {
	t.Helper()
	pid, err := strconv.Atoi(w.sh(t, "cat /run/libvirtd.pid"))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// virsh runs a verb on the host.
func (w *world) virsh(t *testing.T, args string) string {
	t.Helper()
	return w.sh(t, "virsh -q -c %s %s", rig.LibvirtURI, args)
}

// Whatever happens to libvirtd, QEMU and domains behind the agent's back: it
// says so typed, its threads stay bounded, and what is not its own is left
// alone.
func TestTheHypervisorFailsAndOperatorsInterfere(t *testing.T) {
	w := newWorld(t)
	foreign := w.strangers(t)
	t.Run("a second agent", w.secondAgent)
	t.Run("libvirtd frozen", w.libvirtdFrozen)
	t.Run("QEMU hangs", w.qemuHangs)
	t.Run("QEMU hangs at its start", w.qemuHangsAtItsStart)
	t.Run("QEMU killed", func(t *testing.T) {
		o := w.runs(t)
		w.signal(t, w.qemu(t, o), syscall.SIGKILL)
		w.endsAs(t, o, api.GuestStatus_GUEST_STATUS_FAILED, "guest.crashed")
		w.cleanBut(t, foreign, o)
	})
	t.Run("QEMU out of memory", func(t *testing.T) {
		limit := memoryLimit(t, 16<<20)
		o := w.runs(t)
		limit(w.qemu(t, o))
		w.endsAs(t, o, api.GuestStatus_GUEST_STATUS_FAILED, "guest.crashed")
		w.cleanBut(t, foreign, o)
	})
	t.Run("agent out of memory", w.agentOutOfMemory)
	t.Run("virsh destroy", func(t *testing.T) {
		o := w.runs(t)
		w.virsh(t, "destroy "+vm.NamePrefix+o.GetGuestId())
		w.endsAs(t, o, api.GuestStatus_GUEST_STATUS_FAILED, "guest.destroyed")
		w.cleanBut(t, foreign, o)
	})
	t.Run("QEMU swapped", w.programsSwapped)
	t.Run("limits of libvirtd lowered", w.limitsLowered)
	for _, f := range foreign {
		if state := w.virsh(t, "domstate "+f); state != "running" {
			t.Errorf("%s, which is not the agent's, is %s", f, state)
		}
	}
}

// memoryLimit makes a memory cgroup in which the kernel kills what takes more
// than that, and returns what moves a process into it.
func memoryLimit(t *testing.T, size int) (add func(pid int)) {
	t.Helper()
	parent, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if enabled, err := os.ReadFile("/sys/fs/cgroup/cgroup.subtree_control"); err == nil && slices.Contains(strings.Fields(string(enabled)), "memory") {
		parent, file = "/sys/fs/cgroup", "memory.max"
	} else if _, err := os.Stat(filepath.Join(parent, file)); err != nil {
		skip.Missing(t, "a cgroup controller for memory")
	}
	// Unlike a folder for files, a cgroup lives where its kind is mounted.
	dir := filepath.Join(parent, fmt.Sprintf("fault-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name string, value int) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strconv.Itoa(value)), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	write(file, size)
	return func(pid int) { write("cgroup.procs", pid) }
}

// agentOutOfMemory has the kernel kill the agent for a limit of its own, while
// a guest runs and many ask.
func (w *world) agentOutOfMemory(t *testing.T) {
	o := w.runs(t)
	qemu := w.qemu(t, o)
	memoryLimit(t, 2<<20)(w.Host.Agent().PID())
	w.until(t, "the agent to be killed", func(ctx context.Context) (bool, error) {
		var asking sync.WaitGroup
		for range 40 {
			asking.Go(func() { _, _ = w.Host.Status(ctx) }) // they may fail, their memory counts
		}
		asking.Wait()
		return !w.Host.Agent().Running(), nil
	})
	if err := w.StartAgent(w.t.Context()); err != nil {
		t.Fatal(err)
	}
	w.same(t, w.Host.Agent().PID(), o, qemu)
	w.stops(t, o)
}

// secondAgent starts another agent on the same configuration.
func (w *world) secondAgent(t *testing.T) {
	out, err := w.Host.AgentCommand(t.Context(), "run", "--config", trial.AgentConfig).CombinedOutput()
	if first := fmt.Sprintf("(process %d)", w.Host.Agent().PID()); err == nil || !strings.Contains(string(out), "store.in-use") || !strings.Contains(string(out), first) {
		t.Errorf("a second agent ends with %v and does not name %s:\n%s", err, first, out)
	}
	w.heard(t)
	w.status(t) // the first one's socket is still its own
}

// strangers are a domain of the operator, and one with our name and mark that
// the agent knows nothing of: it is reported and left alone.
func (w *world) strangers(t *testing.T) []string {
	t.Helper()
	const id = "11111111-2222-4333-8444-555555555561"
	mark := fmt.Sprintf(`<metadata><guest xmlns='%s' id='%s' generation='1'/></metadata>`, domain.MetadataNamespace, id)
	names := []string{"operators-own", vm.NamePrefix + id}
	for i, metadata := range []string{"", mark} {
		xml := fmt.Sprintf(`<domain type='qemu'><name>%s</name><uuid>%s</uuid>%s<memory unit='MiB'>16</memory><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>`,
			names[i], strings.Replace(id, "1111", fmt.Sprintf("%d111", 2-i), 1), metadata)
		if err := os.WriteFile(w.Host.Path("/run/stranger.xml"), []byte(xml), 0o600); err != nil {
			t.Fatal(err)
		}
		w.virsh(t, "create /run/stranger.xml")
		w.signal(t, w.pidOf(t, names[i]), syscall.SIGSTOP) // its firmware would take a processor
	}
	w.until(t, "the domain without a record to be reported", func(ctx context.Context) (bool, error) {
		s, err := w.Host.Status(ctx)
		return strings.Contains(strings.Join(s.Warnings, "\n"), id), err
	})
	return names
}

func (w *world) pidOf(t *testing.T, name string) int {
	t.Helper()
	pid, err := strconv.Atoi(w.sh(t, "cat /run/libvirt/qemu/%s.pid", name))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// cleanBut is clean where strangers are.
func (w *world) cleanBut(t *testing.T, foreign []string, orders ...*fault.Order) {
	t.Helper()
	w.until(t, "nothing of the guests to be left", func(ctx context.Context) (bool, error) {
		left, err := w.Left(ctx)
		n := 0
		for _, l := range left {
			if !strings.HasPrefix(l, "process ") && l != "domain "+foreign[0] && l != "domain "+foreign[1] && l != "forwarding" {
				n++
			}
		}
		return n == 0, err
	})
	for _, o := range orders {
		if err := w.Once(t.Context(), o.GetGuestId()); err != nil {
			t.Error(err)
		}
	}
}

// libvirtdFrozen freezes libvirtd while a guest runs and many ask.
func (w *world) libvirtdFrozen(t *testing.T) {
	guest := w.runs(t)
	agent, qemu, libvirtd := w.Host.Agent().PID(), w.qemu(t, guest), w.libvirtd(t)
	before := w.threads(t)
	w.signal(t, libvirtd, syscall.SIGSTOP)
	t.Cleanup(func() { _ = syscall.Kill(libvirtd, syscall.SIGCONT) })
	launch := w.send(t, nil)
	var asking sync.WaitGroup
	for range 40 {
		asking.Go(func() { _, _ = w.Host.Status(t.Context()) }) // they may time out, the threads count
	}
	most, frozen := before, time.Now()
	for time.Since(frozen) < 25*time.Second {
		most = max(most, w.threads(t))
		w.heard(t)
	}
	asking.Wait()
	w.endsAs(t, launch, 0, "admit.hypervisor-silent")
	if s := w.status(t); s.Hypervisor != "not reachable" {
		t.Errorf("status says %q of a libvirtd that is frozen", s.Hypervisor)
	}
	w.same(t, agent, guest, qemu)
	// Sixteen calls may hang; Go keeps some threads of its own.
	if most > before+24 {
		t.Errorf("%d threads before, %d while libvirtd was frozen", before, most)
	}
	t.Logf("threads: %d before, %d at most in %.0f s with 40 callers", before, most, time.Since(frozen).Seconds())
	w.signal(t, libvirtd, syscall.SIGCONT)
	w.until(t, "libvirtd to be back", func(ctx context.Context) (bool, error) {
		s, err := w.Host.Status(ctx)
		return strings.HasPrefix(s.Hypervisor, "libvirt "), err
	})
	w.same(t, agent, guest, qemu)
	w.stops(t, guest)
	w.stops(t, w.runs(t))
}

// qemuHangs freezes guests' machines. One is found again by the next agent and
// stopped: its grace ends, and it is destroyed. The other is not: its own
// deadline ends it.
func (w *world) qemuHangs(t *testing.T) {
	o := w.runs(t)
	qemu := w.qemu(t, o)
	w.signal(t, qemu, syscall.SIGSTOP)
	w.Host.Agent().Kill()
	if err := w.StartAgent(w.t.Context()); err != nil {
		t.Fatal(err)
	}
	w.same(t, w.Host.Agent().PID(), o, qemu)
	begun := time.Now()
	w.stops(t, o)
	t.Logf("a guest whose QEMU hangs was gone %.1f s after its stop", time.Since(begun).Seconds())
	o = w.send(t, func(o *fault.Order) { o.StartTimeout = durationpb.New(20 * time.Second) })
	w.started(t, o)
	w.signal(t, w.qemu(t, o), syscall.SIGSTOP)
	w.endsAs(t, o, api.GuestStatus_GUEST_STATUS_FAILED, "guest.start-timeout")
}

// qemuHangsAtItsStart has guests' QEMU hang before it says a word to libvirt,
// which waits for it without an end. One guest's start has a deadline; another
// is stopped meanwhile.
func (w *world) qemuHangsAtItsStart(t *testing.T) {
	const program, kept, hanging = "$(command -v qemu-system-x86_64)", "/run/qemu-kept", "/run/qemu-hanging"
	script := "#!/bin/sh\ncase \"$*\" in *" + vm.NamePrefix + "*) kill -STOP $$ ;; esac\nexec " + kept + " \"$@\"\n"
	if err := os.WriteFile(w.Host.Path(hanging), []byte(script), 0o755); err != nil { //nolint:gosec // libvirt's user runs it
		t.Fatal(err)
	}
	w.sh(t, "touch %[2]s && mount --bind %[1]s %[2]s && mount --bind %[3]s %[1]s", program, kept, hanging)
	restore := sync.OnceFunc(func() { w.sh(t, "umount %s && umount %s", program, kept) })
	t.Cleanup(restore)
	timed := w.send(t, func(o *fault.Order) { o.StartTimeout = durationpb.New(20 * time.Second) })
	begun := time.Now()
	w.endsAs(t, timed, api.GuestStatus_GUEST_STATUS_FAILED, "guest.start-timeout")
	t.Logf("a guest whose QEMU hung at its start was given up after %.1f s", time.Since(begun).Seconds())
	o := w.send(t, nil)
	w.until(t, "its QEMU to hang", func(context.Context) (bool, error) {
		_, err := os.Stat(w.Host.Path("/run/libvirt/qemu/" + vm.NamePrefix + o.GetGuestId() + ".pid"))
		return err == nil, nil
	})
	begun = time.Now()
	w.stops(t, o)
	t.Logf("another was gone %.1f s after its stop", time.Since(begun).Seconds())
	restore()
	w.stops(t, w.runs(t))
}

// programsSwapped takes QEMU away as a broken upgrade does, and restarts
// libvirtd: who runs goes on, nobody else starts, and it is told.
func (w *world) programsSwapped(t *testing.T) {
	guest := w.runs(t)
	agent, qemu := w.Host.Agent().PID(), w.qemu(t, guest)
	restart := func() {
		if err := w.Host.KillLibvirtd(); err != nil {
			t.Fatal(err)
		}
		if err := w.Host.StartLibvirtd(w.t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	const program = "$(command -v qemu-system-x86_64)"
	w.sh(t, "mount --bind /bin/false %s", program)
	restart()
	w.same(t, agent, guest, qemu)
	w.stops(t, guest)
	status, code := w.ended(t, w.send(t, nil))
	if status != api.GuestStatus_GUEST_STATUS_FAILED || !strings.HasPrefix(code, "vm.") {
		t.Errorf("a guest without QEMU ends as %s %q", status, code)
	}
	w.sh(t, "umount %s", program)
	restart()
	w.until(t, "the agent to find libvirtd and QEMU again", func(ctx context.Context) (bool, error) {
		s, err := w.Host.Status(ctx)
		return strings.HasPrefix(s.Hypervisor, "libvirt "), err
	})
	w.stops(t, w.runs(t))
}

// limitsLowered takes QEMU the address space for a large guest.
func (w *world) limitsLowered(t *testing.T) {
	libvirtd := w.libvirtd(t)
	w.sh(t, "prlimit --pid %d --as=%d:", libvirtd, 4<<30)
	o := w.send(t, func(o *fault.Order) { o.Machine.MemoryMib = 6 << 10 })
	w.endsAs(t, o, api.GuestStatus_GUEST_STATUS_FAILED, "host.memory-low")
	w.sh(t, "prlimit --pid %d --as=unlimited:", libvirtd)
	w.stops(t, w.runs(t))
}
