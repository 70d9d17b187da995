package libvirt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

const victim = "01234567-89ab-4def-8123-456789abcdef"

// process starts one that carries a guest's id as QEMU does, and notes its
// number as libvirt does.
func process(t *testing.T, dir, guestID string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", "read never; exit 0", "qemu", "-uuid", guestID, "-S")
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	note(t, dir, fmt.Sprintln(cmd.Process.Pid))
	for { // its arguments are seen a moment after it has begun
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(args), guestID) {
			return cmd
		}
	}
}

func note(t *testing.T, dir, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, vm.NamePrefix+victim+".pid"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// signal is what ended the process, 0 while it runs.
func signal(t *testing.T, cmd *exec.Cmd) syscall.Signal {
	t.Helper()
	exit, ok := errors.AsType[*exec.ExitError](cmd.Wait())
	if !ok {
		return 0
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	if !ok {
		t.Fatal("no wait status")
	}
	return status.Signal()
}

func TestAGuestThatLibvirtDoesNotEndIsKilledAndTheRemedyTold(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cmd := process(t, dir, victim)
	cause := errors.New("cannot acquire state change lock")
	err := stuck(t.Context(), dir, victim, cause)
	if r := contract.AsRefusal(err); r.Code != "vm.hypervisor-stuck" || !strings.Contains(r.Message, "was killed") || !strings.Contains(r.Remedy, "restart libvirtd") || !errors.Is(err, cause) {
		t.Error(err)
	}
	if got := signal(t, cmd); got != syscall.SIGKILL {
		t.Errorf("ended by signal %d", got)
	}
	// The same again: it is gone, and that is what is said.
	if r := contract.AsRefusal(stuck(t.Context(), dir, victim, cause)); r.Code != "vm.hypervisor-stuck" || !strings.Contains(r.Message, "gone already") {
		t.Error(r)
	}
}

// libvirt reconnects to no domain without a process, and so never lets go of it.
func TestADomainThatNeverHadAProcessNeedsMoreThanARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	state := filepath.Join(dir, vm.NamePrefix+victim+".xml")
	if err := os.WriteFile(state, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := contract.AsRefusal(stuck(t.Context(), dir, victim, errors.New("cannot acquire state change lock")))
	if r.Code != "vm.hypervisor-stuck" || !strings.Contains(r.Message, "never had a process") || !strings.Contains(r.Remedy, "remove "+state+",") {
		t.Error(r)
	}
}

func TestAProcessThatIsNotTheGuestsIsLeftAlone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cmd := process(t, dir, "another"+victim)
	if killed, err := kill(t.Context(), dir, victim); killed || err != nil {
		t.Errorf("killed %v, %v", killed, err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := signal(t, cmd); got != syscall.SIGTERM {
		t.Errorf("ended by signal %d", got)
	}
}

func TestANoteThatNamesNoProcessKillsNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if killed, err := kill(t.Context(), dir, victim); killed || err != nil {
		t.Errorf("without a note: %v, %v", killed, err)
	}
	for _, text := range []string{"", "x", "0", "1", "-1", "-5\n"} {
		note(t, dir, text)
		if killed, err := kill(t.Context(), dir, victim); killed || err == nil {
			t.Errorf("%q: killed %v, %v", text, killed, err)
		}
	}
}
