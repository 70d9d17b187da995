package rig

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	indexEnv = "NODEAGENT_RIG_HOST_INDEX"
	// wordReady is what the holder says: once when its mounts are made, once
	// when its address is set.
	wordReady = "ready"
	// hostTemp is a host's TMPDIR: its own, so that leftovers can be looked for.
	hostTemp = "/run/tmp"
	// killTimeout bounds the end of one killed process, in milliseconds.
	killTimeout = 30_000
)

// qemuConf: no security driver and no cgroups exist in the namespaces;
// everything else is as on a real host, above all the unprivileged user.
const qemuConf = `security_driver = "none"
cgroup_controllers = []
user = "libvirt-qemu"
group = "kvm"
`

// libvirtFolders are a host's own and start empty.
func libvirtFolders() []string {
	return []string{"/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt"}
}

func hostNamespaces() syscall.SysProcAttr {
	return syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS}
}

// holdHost is the stage that holds a host's namespaces open until its
// standard input ends.
func holdHost() error {
	index, err := strconv.Atoi(os.Getenv(indexEnv))
	if err != nil {
		return fmt.Errorf("reading the host's index: %w", err)
	}
	if err := prepareHost(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(hostName(index))); err != nil {
		return fmt.Errorf("setting host name: %w", err)
	}
	if _, err := os.Stdout.WriteString(wordReady + "\n"); err != nil {
		return fmt.Errorf("saying %s: %w", wordReady, err)
	}
	stdin := bufio.NewReader(os.Stdin)
	if _, err := stdin.ReadString('\n'); err != nil {
		return fmt.Errorf("waiting for the uplink: %w", err)
	}
	uplink, err := netlink.LinkByName(Uplink)
	if err != nil {
		return fmt.Errorf("finding uplink: %w", err)
	}
	if err := address(uplink, hostAddr(index).String()+"/24"); err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString(wordReady + "\n"); err != nil {
		return fmt.Errorf("saying %s: %w", wordReady, err)
	}
	_, err = io.Copy(io.Discard, stdin)
	return err
}

// prepareHost gives the host its own /run, /etc, /var and /sys. Only the
// scratch folder stays shared with the outside.
func prepareHost() error {
	if err := privateMounts(); err != nil {
		return err
	}
	scratch, err := os.Open(ScratchDir)
	if err != nil {
		return fmt.Errorf("opening scratch folder: %w", err)
	}
	defer scratch.Close() //nolint:errcheck // a folder opened for reading
	if err := mountTmpfs("/run"); err != nil {
		return err
	}
	if err := os.Mkdir(ScratchDir, 0o711); err != nil { //nolint:gosec // a mount point
		return fmt.Errorf("making scratch folder: %w", err)
	}
	if err := bind(fmt.Sprintf("/proc/self/fd/%d", scratch.Fd()), ScratchDir); err != nil {
		return err
	}
	if err := os.Mkdir(hostTemp, 0o1777); err != nil { //nolint:gosec // as /tmp is
		return fmt.Errorf("making folder for temporary files: %w", err)
	}
	for _, dir := range []string{"/etc", "/var"} {
		if err := mountOverlay(dir, filepath.Join("/run/.overlay", dir)); err != nil {
			return err
		}
	}
	if err := bind(filepath.Join(ScratchDir, "hosts"), "/etc/hosts"); err != nil {
		return err
	}
	for _, dir := range libvirtFolders() {
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // as the package makes it
			return fmt.Errorf("preparing %s: %w", dir, err)
		}
		if err := mountTmpfs(dir); err != nil {
			return err
		}
	}
	// A fresh sysfs shows the links of this namespace, not the machine's.
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /sys: %w", err)
	}
	if err := os.WriteFile("/etc/libvirt/qemu.conf", []byte(qemuConf), 0o600); err != nil {
		return fmt.Errorf("configuring libvirt: %w", err)
	}
	return loopbackUp()
}

// killNamespace kills every process whose network namespace it is, and waits
// for each one's end, until none is left.
func killNamespace(inode string, except int) error {
	for {
		pids, err := members(inode, except)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := killAndWait(pid); err != nil {
				return err
			}
		}
	}
}

// members are the live processes of a network namespace, never this one. A
// zombie has none.
func members(inode string, except int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == except || pid == os.Getpid() {
			continue
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && ns == inode {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func killAndWait(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening process %d: %w", pid, err)
	}
	defer unix.Close(fd) //nolint:errcheck // a descriptor without data
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing process %d: %w", pid, err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, killTimeout)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return errors.Join(fmt.Errorf("process %d does not end", pid), err)
		}
		return nil
	}
}
