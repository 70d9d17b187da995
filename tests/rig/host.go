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
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const indexEnv = "NODEAGENT_RIG_HOST_INDEX"

// privateFolders are a provider host's own.
func privateFolders() []string {
	return []string{
		"/run", "/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt",
		"/var/lib/nodeagent", "/var/cache/nodeagent", "/etc/nodeagent",
	}
}

// qemuConf: no security driver and no cgroups exist in the namespaces;
// everything else is as on a real host, above all the unprivileged user.
const qemuConf = `security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
user = "libvirt-qemu"
group = "kvm"
`

// Host is one provider host.
type Host struct {
	// Addr is its address on the outside's network.
	Addr     netip.Addr
	holder   *exec.Cmd
	stdin    io.Closer
	libvirtd *exec.Cmd
	log      io.Writer
}

// NewHost makes the n-th host's namespaces (n from 0) and starts its
// libvirtd. Output of the daemons goes to log.
func NewHost(ctx context.Context, n int, log io.Writer) (*Host, error) {
	cmd := reexec(stageHost, unix.CLONE_NEWNS|unix.CLONE_NEWNET)
	cmd.Env = append(cmd.Env, indexEnv+"="+strconv.Itoa(n))
	cmd.Stdout = nil
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("making a host's namespaces: %w", err)
	}
	h := &Host{Addr: hostAddr(n), holder: cmd, stdin: stdin, log: log}
	if err := h.await(stdout, "ready", func() error { return plug(cmd.Process.Pid, n) }, func() error {
		_, err := io.WriteString(stdin, "plugged\n")
		return err
	}); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	if err := h.StartLibvirtd(ctx); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// await reads the word, runs the steps, and reads the word again.
func (h *Host) await(r io.Reader, word string, steps ...func() error) error {
	lines := bufio.NewScanner(r)
	expect := func() error {
		if !lines.Scan() || lines.Text() != word {
			return fmt.Errorf("host's namespace says %q, want %q", lines.Text(), word)
		}
		return nil
	}
	if err := expect(); err != nil {
		return err
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return expect()
}

// holdHost is the stage inside a host's namespaces.
func holdHost() error {
	if err := prepareMounts(privateFolders()...); err != nil {
		return err
	}
	// A fresh sysfs shows the links of this namespace, not the machine's.
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /sys: %w", err)
	}
	if err := os.WriteFile("/etc/libvirt/qemu.conf", []byte(qemuConf), 0o600); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	os.Stdout.WriteString("ready\n") //nolint:errcheck // the other end notices
	stdin := bufio.NewReader(os.Stdin)
	if _, err := stdin.ReadString('\n'); err != nil {
		return err
	}
	index, err := strconv.Atoi(os.Getenv(indexEnv))
	if err != nil {
		return err
	}
	uplink, err := netlink.LinkByName("uplink")
	if err != nil {
		return fmt.Errorf("finding uplink: %w", err)
	}
	if err := address(uplink, hostAddr(index).String()+"/24"); err != nil {
		return err
	}
	os.Stdout.WriteString("ready\n") //nolint:errcheck // the other end notices
	_, _ = io.Copy(io.Discard, stdin)
	return nil
}

// Command returns a command that runs inside the host's namespaces.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	in := []string{"--target", strconv.Itoa(h.holder.Process.Pid), "--mount", "--net", "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(in, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", stageEnv+"=", "TMPDIR="+ScratchDir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
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

// StartLibvirtd starts the host's libvirtd and waits until it answers.
func (h *Host) StartLibvirtd(ctx context.Context) error {
	h.libvirtd = h.Command(context.WithoutCancel(ctx), "libvirtd")
	h.libvirtd.Stdout, h.libvirtd.Stderr = h.log, h.log
	if err := h.libvirtd.Start(); err != nil {
		return fmt.Errorf("starting libvirtd: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if _, err := h.Output(ctx, "virsh", "-q", "-c", "qemu:///system", "list"); err == nil {
			return nil
		} else if ctx.Err() != nil {
			return fmt.Errorf("waiting for libvirtd: %w", err)
		}
	}
}

// KillLibvirtd ends the host's libvirtd at once; its guests live on.
func (h *Host) KillLibvirtd() error {
	if err := h.libvirtd.Process.Kill(); err != nil {
		return err
	}
	_, err := exitCode(h.libvirtd.Wait())
	return err
}

// Close ends the host: every process in its namespaces, and the namespaces.
func (h *Host) Close() error {
	inode, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.holder.Process.Pid))
	if err == nil {
		err = killNamespace(inode, h.holder.Process.Pid)
	}
	_ = h.stdin.Close()
	_, waitErr := exitCode(h.holder.Wait())
	if h.libvirtd != nil && h.libvirtd.Process != nil {
		_, _ = exitCode(h.libvirtd.Wait())
	}
	return errors.Join(err, waitErr)
}

// killNamespace kills every process whose network namespace it is.
func killNamespace(inode string, except int) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == except {
			continue
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && ns == inode {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return nil
}
