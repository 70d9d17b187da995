package workload

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Enter is the stage: it runs as the first process of the workload's
// namespaces, as root of its user namespace, and ends by becoming the
// workload. It returns only when that failed, after telling the init why.
func Enter() error {
	// Credentials are a thread's. Everything from here to exec is on one.
	runtime.LockOSThread()
	reply := os.NewFile(fdError, "reply")
	err := become(os.NewFile(fdSpec, "spec"))
	// The init reads this; the workload's own output is not read by anybody.
	_, writeErr := reply.WriteString(err.Error())
	return errors.Join(err, writeErr)
}

func become(in *os.File) error {
	const maxSpec = 16 << 20
	text, err := io.ReadAll(io.LimitReader(in, maxSpec))
	if err != nil {
		return fmt.Errorf("reading specification: %w", err)
	}
	var s Spec
	if err := json.Unmarshal(text, &s); err != nil {
		return fmt.Errorf("reading specification: %w", err)
	}
	for _, step := range []struct {
		what string
		do   func(Spec) error
	}{
		{"naming the host", func(Spec) error { return unix.Sethostname([]byte("workload")) }},
		{"bringing loopback up", func(Spec) error { return loopbackUp() }},
		{"mounting", mounts},
		{"changing root", pivot},
		{"closing descriptors", func(Spec) error { return unix.CloseRange(fdSpec, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) }},
		{"giving privileges up", giveUp},
	} {
		if err := step.do(s); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	if err := os.Chdir(s.Dir); err != nil {
		return fmt.Errorf("entering the working folder: %w", err)
	}
	program, err := lookPath(s.Args[0], s.Env)
	if err != nil {
		return fmt.Errorf("looking for the program: %w", err)
	}
	return fmt.Errorf("executing: %w", syscall.Exec(program, s.Args, s.Env))
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // a socket only used for the ioctl
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// mount is one line of the workload's file system. Targets are below root.
type mount struct {
	source, target, kind string
	flags                uintptr
	options              string
}

const (
	noExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	bindRO = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY
)

func mounts(s Spec) error {
	// Nothing mounted here may appear anywhere else.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("/: %w", err)
	}
	list := []mount{
		{s.Root, "", "", unix.MS_BIND | unix.MS_REC, ""},
		{"proc", "proc", "proc", noExec, ""},
		{"tmpfs", "dev", "tmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=755,size=64k"},
		{"devpts", "dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"},
		{"tmpfs", "dev/shm", "tmpfs", noExec, "mode=1777,size=25%"},
		{s.Inputs, "inputs", "", unix.MS_BIND, ""},
		{"", "inputs", "", bindRO | noExec, ""},
		{s.Results, "results", "", unix.MS_BIND, ""},
		{"", "results", "", unix.MS_BIND | unix.MS_REMOUNT | noExec, ""},
	}
	for _, m := range list {
		target := filepath.Join(s.Root, m.target)
		if m.target != "" {
			if err := folder(s.Root, m.target); err != nil {
				return fmt.Errorf("%s: %w", m.target, err)
			}
		}
		if err := unix.Mount(m.source, target, m.kind, m.flags, m.options); err != nil {
			return fmt.Errorf("/%s: %w", m.target, err)
		}
	}
	if err := devices(s); err != nil {
		return err
	}
	if err := driver(s); err != nil {
		return err
	}
	if err := coverProc(s.Root); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(s.Root, "tmp"), 0o700); err == nil {
		return os.Chmod(filepath.Join(s.Root, "tmp"), 0o777|os.ModeSticky)
	}
	return nil
}

// folder makes a mount point. An image that has a link or a file there is
// refused: following it would lead outside.
func folder(root, name string) error {
	path := filepath.Join(root, name)
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return errors.New("the image has something else than a folder there")
	}
	return nil
}

// driverFolder is where images for NVIDIA's container tools look for the
// driver's libraries.
const driverFolder = "usr/local/nvidia"

// driver shows the workload the libraries of the guest's GPU driver.
func driver(s Spec) error {
	if s.Driver == "" {
		return nil
	}
	for name := range prefixes(driverFolder) {
		if err := folder(s.Root, name); err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
	}
	target := filepath.Join(s.Root, driverFolder)
	if err := unix.Mount(s.Driver, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("/%s: %w", driverFolder, err)
	}
	return unix.Mount("", target, "", bindRO|unix.MS_NOSUID|unix.MS_NODEV, "")
}

// prefixes are a path's folders, from the outermost on: "a", "a/b".
func prefixes(path string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for i, c := range path + "/" {
			if c == '/' && !yield(path[:i]) {
				return
			}
		}
	}
}

// devices gives the workload the harmless devices, those of its GPUs, and
// nothing else. Nodes are bound from the init's /dev: a user namespace cannot
// make any.
func devices(s Spec) error {
	root := s.Root
	sources := s.Devices
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		sources = append(sources, "/dev/"+name)
	}
	for _, source := range sources {
		target := filepath.Join(root, "dev", filepath.Base(source))
		if err := os.WriteFile(target, nil, 0o600); err != nil {
			return err
		}
		if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("%s: %w", source, err)
		}
	}
	for name, to := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(to, filepath.Join(root, "dev", name)); err != nil {
			return err
		}
	}
	return nil
}

// coverProc forbids further user namespaces, in which the workload would have
// capabilities over the kernel again, and covers what of /proc is not about
// its own processes.
func coverProc(root string) error {
	proc := filepath.Join(root, "proc")
	if err := os.WriteFile(filepath.Join(proc, "sys/user/max_user_namespaces"), []byte("0"), 0); err != nil {
		return fmt.Errorf("forbidding user namespaces: %w", err)
	}
	for _, name := range []string{"kcore", "keys", "timer_list", "sysrq-trigger", "kallsyms", "cmdline", "kmsg"} {
		err := unix.Mount("/dev/null", filepath.Join(proc, name), "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("/proc/%s: %w", name, err)
		}
	}
	for _, name := range []string{"sys", "bus", "fs", "irq", "acpi"} {
		target := filepath.Join(proc, name)
		err := unix.Mount(target, target, "", unix.MS_BIND|unix.MS_REC, "")
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			err = unix.Mount("", target, "", bindRO|noExec, "")
		}
		if err != nil {
			return fmt.Errorf("/proc/%s: %w", name, err)
		}
	}
	return nil
}

// pivot makes the image the root and lets go of the old one.
func pivot(s Spec) error {
	if err := os.Chdir(s.Root); err != nil {
		return err
	}
	// Old root over new root: the old one is then on top and can be let go of
	// without a folder for it (pivot_root(2), "pivot_root(".", ".")").
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	return os.Chdir("/")
}

// giveUp drops every capability for good and takes the workload's user. Raw
// system calls change this thread only, which is the one that executes.
func giveUp(s Spec) error {
	for c := range uintptr(unix.CAP_LAST_CAP + 1) {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("dropping capability %d: %w", c, err)
		}
	}
	// Bits and their locks (capabilities(7), "The securebits flags"): root is
	// a user like any other, and stays one.
	const noRoot, noRootLocked, keepCapsLocked, noAmbient, noAmbientLocked = 1 << 0, 1 << 1, 1 << 5, 1 << 6, 1 << 7
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, noRoot|noRootLocked|keepCapsLocked|noAmbient|noAmbientLocked, 0, 0, 0); err != nil {
		return fmt.Errorf("locking secure bits: %w", err)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("leaving groups: %w", errno)
	}
	gid, uid := uintptr(s.GID), uintptr(s.UID)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return fmt.Errorf("taking group %d: %w", s.GID, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return fmt.Errorf("taking user %d: %w", s.UID, errno)
	}
	none := [2]unix.CapUserData{}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		return fmt.Errorf("clearing capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbidding new privileges: %w", err)
	}
	return nil
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// lookPath finds a program as the workload's own PATH says.
func lookPath(program string, env []string) (string, error) {
	if strings.Contains(program, "/") {
		return program, nil
	}
	search := defaultPath
	for _, e := range env {
		if value, ok := strings.CutPrefix(e, "PATH="); ok {
			search = value
		}
	}
	for _, dir := range filepath.SplitList(search) {
		file := filepath.Join("/", dir, program)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%q: %w", program, exec.ErrNotFound)
}
