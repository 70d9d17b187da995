package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

// pidDir is where libvirt's QEMU driver notes its processes' ids.
const pidDir = "/run/libvirt/qemu"

// killTimeout is what a killed process may take to be gone; giving back a
// large guest's memory takes a while.
const killTimeout = 2 * time.Minute

// stuck ends the process of a guest that libvirt does not end, because
// somebody holds the domain's job and never lets go: a libvirtd that died while
// it started the guest leaves that behind (seen with libvirt 11.3, once in 370
// to 830 launches of a soak). The domain itself stays in libvirt's list for as
// long as libvirtd runs: only the operator can restart that. When libvirtd died
// before there was a process, the next one does not look at the domain again
// either, and lets go of it only when its state file is taken away.
func stuck(ctx context.Context, dir, guestID string, cause error) error {
	killed, err := kill(ctx, dir, guestID)
	if err != nil {
		return errors.Join(cause, err)
	}
	what, remedy := "its process is gone already", "restart libvirtd (or virtqemud) on the host"
	state := filepath.Join(dir, vm.NamePrefix+guestID+".xml")
	switch {
	case killed:
		what = "its process was killed"
	case !exists(filepath.Join(dir, vm.NamePrefix+guestID+".pid")) && exists(state):
		what, remedy = "it never had a process", "stop libvirtd (or virtqemud) and its sockets on the host, remove "+state+", and start it again"
	}
	return contract.Refuse("vm.hypervisor-stuck", remedy+"; running guests are not touched by that",
		"libvirt holds on to guest %s and does not end it; %s", guestID, what).Because(cause)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// kill ends the QEMU process of a guest, if it is there and is the guest's, and
// returns when it is gone.
func kill(ctx context.Context, dir, guestID string) (killed bool, err error) {
	text, err := os.ReadFile(filepath.Join(dir, vm.NamePrefix+guestID+".pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking for the process of guest %s: %w", guestID, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid <= 1 {
		return false, fmt.Errorf("looking for the process of guest %s: %q is no process id", guestID, text)
	}
	// The descriptor stays that process's, whatever becomes of the number.
	process, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening process %d of guest %s: %w", pid, guestID, err)
	}
	defer unix.Close(process) //nolint:errcheck // nothing was written
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking at process %d of guest %s: %w", pid, guestID, err)
	}
	if !bytes.Contains(args, []byte("\x00-uuid\x00"+guestID+"\x00")) {
		return false, nil // another's, whose number was used again; or none that runs any more
	}
	if err := unix.PidfdSendSignal(process, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return false, fmt.Errorf("killing process %d of guest %s: %w", pid, guestID, err)
	}
	return true, gone(ctx, process, pid)
}

// gone waits for the end of a process.
func gone(ctx context.Context, process, pid int) error {
	deadline := time.Now().Add(killTimeout)
	for {
		// Readable once the process has ended (pidfd_open(2)). In slices, so
		// that the context counts.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, 100)
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("waiting for the end of process %d: %w", pid, err)
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(deadline):
			return fmt.Errorf("process %d was killed and is still there after %s; look at the kernel's log", pid, killTimeout)
		}
	}
}
