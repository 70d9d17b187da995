// Package boot is what only the first process of a machine does: mounts,
// modules, the network interface, the power button, the end. It belongs to the
// init; running it anywhere else would take that machine down. Not safe for
// concurrent use, except PowerOff.
package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Folders of the init, all in memory. Only those of the workload can be
// entered by others.
const (
	Folder  = "/run/guest"
	Private = Folder + "/private" // sealed inputs
	Inputs  = Folder + "/inputs"
	Results = Folder + "/results"
	Root    = Folder + "/root"
)

// What the image builder puts into the initrd.
const (
	modulesFolder = "/modules"
	modulesList   = modulesFolder + "/list"
	gpuModules    = modulesFolder + "/gpu" // only in an image for GPUs
)

// GPUs' part of the image, where it has one: the helper and NVIDIA's user
// space. The helper is dynamically linked, and its loader and libraries are in
// the library folder; the kernel finds the driver's firmware by its command line.
const (
	GPUFolder  = "/gpu"
	GPUHelper  = GPUFolder + "/helper"
	GPULibrary = GPUFolder + "/lib"
)

// paramVariant is the kernel parameter with the image's variant.
const paramVariant = "nodeagent.variant"

const secure = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

type mount struct {
	kind, target string
	flags        uintptr
	options      string
}

// Mounts makes the init's file system. The initrd's own root cannot be left
// by pivot_root, which the workload's isolation needs, so a memory file system
// is moved over it first.
func Mounts() error {
	if err := root(); err != nil {
		return err
	}
	// Shares of memory; together they may exceed it, each alone may not.
	for _, m := range []mount{
		{"proc", "/proc", secure, ""},
		{"sysfs", "/sys", secure, ""},
		{"devtmpfs", "/dev", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755"},
		{"tmpfs", Private, secure, "mode=0700,size=60%"},
		{"tmpfs", Inputs, secure, "mode=0755,size=60%"},
		{"tmpfs", Results, secure, "mode=0755,size=40%"},
		{"tmpfs", Root, unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=60%"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("making mount point: %w", err)
		}
		if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.options); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	return nil
}

// root moves to a root that is a mount of its own. The initrd's modules and
// the GPUs' part go along; its init lives on as the running program.
func root() error {
	const fresh = "/newroot"
	if err := os.Mkdir(fresh, 0o755); err != nil {
		return fmt.Errorf("making root: %w", err)
	}
	if err := unix.Mount("tmpfs", fresh, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mounting root: %w", err)
	}
	for _, folder := range []string{modulesFolder, GPUFolder} {
		if _, err := os.Stat(folder); folder == GPUFolder && errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := os.CopyFS(fresh+folder, os.DirFS(folder)); err != nil {
			return fmt.Errorf("moving %s: %w", folder, err)
		}
		if err := os.RemoveAll(folder); err != nil {
			return fmt.Errorf("moving %s: %w", folder, err)
		}
	}
	// Where the helper's loader is looked for.
	if err := os.Symlink(strings.TrimPrefix(GPULibrary, "/"), fresh+"/lib64"); err != nil {
		return fmt.Errorf("making root: %w", err)
	}
	if err := os.Mkdir(fresh+"/etc", 0o755); err != nil {
		return fmt.Errorf("making /etc: %w", err)
	}
	if err := os.Chdir(fresh); err != nil {
		return fmt.Errorf("changing root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("changing root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("changing root: %w", err)
	}
	return os.Chdir("/")
}

// Modules loads the image's kernel modules in its order, then the GPUs'
// driver, then forbids loading any more, until the guest ends. driver is why
// that one did not load: it does not without a GPU, so only a guest that has
// GPUs to use need mind.
func Modules() (driver, err error) {
	if err := loadList(modulesList); err != nil {
		return nil, err
	}
	if driver = loadList(gpuModules); errors.Is(driver, errNoList) {
		driver = nil
	}
	if err := os.RemoveAll(modulesFolder); err != nil {
		return driver, fmt.Errorf("removing modules: %w", err)
	}
	if err := os.WriteFile("/proc/sys/kernel/modules_disabled", []byte("1"), 0); err != nil {
		return driver, fmt.Errorf("forbidding more modules: %w", err)
	}
	return driver, nil
}

var errNoList = errors.New("the image has no such list")

func loadList(path string) error {
	list, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reading %s: %w", path, errNoList)
	}
	if err != nil {
		return fmt.Errorf("reading module list: %w", err)
	}
	for name := range strings.FieldsSeq(string(list)) {
		if err := load(filepath.Join(modulesFolder, filepath.Base(name))); err != nil {
			return fmt.Errorf("loading module %s: %w", name, err)
		}
	}
	return nil
}

func load(file string) (err error) {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	// sev-guest's driver says so where there is no such device. Whoever needs
	// it notices.
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// ReportFS mounts configfs, where the kernel gives reports.
func ReportFS() error {
	const target = "/sys/kernel/config"
	err := unix.Mount("configfs", target, "configfs", secure, "")
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("mounting %s: %w", target, err)
	}
	return nil
}

// Limits raises what the workload inherits.
func Limits() error {
	const files = 1 << 20
	limit := unix.Rlimit{Cur: files, Max: files}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raising file limit: %w", err)
	}
	return nil
}

// Variant is the image's, from the measured command line; "" when it says
// none.
func Variant() (string, error) {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return "", fmt.Errorf("reading command line: %w", err)
	}
	return variant(string(text)), nil
}

func variant(cmdline string) string {
	words := strings.Fields(cmdline)
	i := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, paramVariant+"=") })
	if i < 0 {
		return ""
	}
	return strings.TrimPrefix(words[i], paramVariant+"=")
}

// Memory returns the machine's memory in bytes.
func Memory() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("asking for memory: %w", err)
	}
	return info.Totalram * uint64(info.Unit), nil
}

// PowerOff ends the machine. It returns only where it may not.
func PowerOff() error {
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		return fmt.Errorf("powering off: %w", err)
	}
	return nil
}
