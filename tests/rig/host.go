package rig

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Host is one provider host.
type Host struct {
	// Addr is its address on the outside's network.
	Addr     netip.Addr
	index    int
	holder   *exec.Cmd
	stdin    io.Closer
	virtlogd *exec.Cmd
	libvirtd *exec.Cmd
	log      io.Writer
}

const (
	// startTimeout bounds the start of a daemon; libvirtd's first start asks
	// QEMU for its capabilities, which takes seconds on a busy machine.
	startTimeout = time.Minute
	// pollInterval is how often a starting daemon is asked.
	pollInterval = 20 * time.Millisecond
)

// NewHost makes the n-th host's namespaces (n from 0) and starts its virtlogd
// and libvirtd. Output of the daemons goes to log.
func NewHost(ctx context.Context, n int, log io.Writer) (*Host, error) {
	if n < 0 || n >= maxHosts {
		return nil, fmt.Errorf("making host %d: numbers go from 0 to %d", n, maxHosts-1)
	}
	cmd := reexec(stageHost, hostNamespaces())
	cmd.Env = append(cmd.Env, indexEnv+"="+strconv.Itoa(n))
	cmd.Stdout = nil
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("making a host's namespaces: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("making a host's namespaces: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("making a host's namespaces: %w", err)
	}
	h := &Host{Addr: hostAddr(n), index: n, holder: cmd, stdin: stdin, log: log}
	if err := h.setUp(ctx, stdin, stdout); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// setUp plugs the namespaces in between the holder's two words, and starts
// the daemons.
func (h *Host) setUp(ctx context.Context, in io.Writer, out io.Reader) error {
	lines := bufio.NewScanner(out)
	expect := func() error {
		if !lines.Scan() || lines.Text() != wordReady {
			return fmt.Errorf("host's namespaces say %q, want %q", lines.Text(), wordReady)
		}
		return nil
	}
	if err := expect(); err != nil {
		return err
	}
	if err := plug(h.holder.Process.Pid, h.index); err != nil {
		return err
	}
	if _, err := io.WriteString(in, "plugged\n"); err != nil {
		return fmt.Errorf("telling the host's namespaces: %w", err)
	}
	if err := expect(); err != nil {
		return err
	}
	if err := h.recallCapabilities(); err != nil {
		return err
	}
	if err := h.startVirtlogd(ctx); err != nil {
		return err
	}
	return h.StartLibvirtd(ctx)
}

// Command returns a command that runs inside the host's namespaces, as root,
// in the root folder: give it absolute paths. Its temporary files are the
// host's own. nsenter would end up in the root folder of the machine's mount
// namespace; when the whole run is in a chroot, that is not the host's.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	in := []string{"--target", strconv.Itoa(h.holder.Process.Pid), "--mount", "--root", "--wdns=/", "--net", "--uts", "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(in, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", stageEnv+"=", "TMPDIR="+hostTemp)
	// A daemon's children may hold its output open after its end.
	cmd.WaitDelay = time.Second
	return cmd
}

// Output runs a command inside and returns what it prints.
func (h *Host) Output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := h.Command(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("running %s on the host: %w: %s", name, err, stderr.String())
	}
	return string(out), nil
}

// Path is a file of the host as seen from outside its namespaces.
func (h *Host) Path(name string) string {
	return filepath.Join("/proc", strconv.Itoa(h.holder.Process.Pid), "root", name)
}

// LibvirtURI reaches the host's libvirtd from inside its namespaces.
const LibvirtURI = "qemu:///system"

// LibvirtURI reaches the host's libvirtd from the outside.
func (h *Host) LibvirtURI() string {
	return "qemu+unix:///system?socket=" + h.Path("/run/libvirt/libvirt-sock")
}

func (h *Host) startVirtlogd(ctx context.Context) error {
	cmd, err := h.startDaemon(ctx, "virtlogd", func() error {
		_, err := os.Stat(h.Path("/run/libvirt/virtlogd-sock"))
		return err
	})
	h.virtlogd = cmd
	return err
}

// StartLibvirtd starts the host's libvirtd and waits until it answers.
func (h *Host) StartLibvirtd(ctx context.Context) error {
	cmd, err := h.startDaemon(ctx, "libvirtd", func() error {
		if _, err := os.Stat(h.Path("/run/libvirt/libvirt-sock")); err != nil {
			return err
		}
		_, err := h.Output(ctx, "virsh", "-q", "-c", LibvirtURI, "list")
		return err
	})
	h.libvirtd = cmd
	return err
}

// startDaemon starts a program of the host and waits until answers does.
func (h *Host) startDaemon(ctx context.Context, name string, answers func() error) (*exec.Cmd, error) {
	cmd := h.Command(context.WithoutCancel(ctx), name)
	cmd.Stdout, cmd.Stderr = h.log, h.log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := answers()
		if err == nil {
			return cmd, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return cmd, fmt.Errorf("waiting for %s: %w", name, err)
		}
	}
}

// KillLibvirtd ends the host's libvirtd at once; its guests live on.
func (h *Host) KillLibvirtd() error {
	if err := h.libvirtd.Process.Kill(); err != nil {
		return fmt.Errorf("killing libvirtd: %w", err)
	}
	return reap(h.libvirtd)
}

// Close ends the host: every process in its namespaces, its link, and the
// namespaces themselves.
func (h *Host) Close() error {
	err := h.keepCapabilities()
	inode, nsErr := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.holder.Process.Pid))
	if nsErr == nil {
		nsErr = killNamespace(inode, h.holder.Process.Pid)
	}
	for _, daemon := range []*exec.Cmd{h.libvirtd, h.virtlogd} {
		if daemon != nil && daemon.ProcessState == nil {
			err = errors.Join(err, reap(daemon))
		}
	}
	_ = h.stdin.Close()
	return errors.Join(err, nsErr, unplug(h.index), reap(h.holder))
}

// reap waits for a process that was told to end; how it ended is no error.
func reap(cmd *exec.Cmd) error {
	err := cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	_, err = exitCode(err)
	return err
}
