// Package rig gives demo and tests a world of their own: one set of
// namespaces for "the outside" (control plane, broker, stores, tenants) and,
// inside it, one for each "provider host" with its own /run, /etc/libvirt and
// libvirtd. Host and outside are joined by a veth with documentation addresses
// and nothing else: no route leaves the machine, nobody else's domains, links
// or rules are touched, and cleaning up is the end of the namespaces.
//
// It re-executes the running binary to get into the namespaces, so Enter must
// be the first thing main or TestMain does. Linux, root only.
package rig

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageEnv tells a re-executed binary which stage it is.
const stageEnv = "NODEAGENT_RIG_STAGE"

const (
	stageInit   = "init"   // PID 1 of the namespaces: mounts, then reaps
	stageInside = "inside" // the real program
	stageHost   = "host"   // holds a provider host's namespaces
)

// ScratchDir is the private tmpfs that temporary files of the run live on.
const ScratchDir = "/run/rig"

// Capable reports whether this process may make namespaces.
func Capable() bool { return os.Geteuid() == 0 }

// Enter returns only inside the namespaces, once: the calling process is
// replaced by its re-executed self and never returns from here. The exit code
// is passed on, and everything that was started inside is killed with it.
func Enter() {
	var code int
	var err error
	switch os.Getenv(stageEnv) {
	case stageInside:
		return
	case stageInit:
		code, err = runInit()
	case stageHost:
		err = holdHost()
	default:
		code, err = launch()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "rig: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

// reexec returns a command that runs this binary as a stage.
func reexec(stage string, cloneFlags uintptr) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...) //nolint:forbidigo,noctx,gosec // a stage lives as long as this process
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: cloneFlags, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// launch starts PID 1 of the namespaces and waits for it.
func launch() (int, error) {
	cmd := reexec(stageInit, unix.CLONE_NEWPID|unix.CLONE_NEWNS|unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS)
	cmd.Stdin = os.Stdin
	// Signals go to the whole foreground group; this stage only waits.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("making namespaces (are you root?): %w", err)
	}
	return exitCode(cmd.Wait())
}

func exitCode(err error) (int, error) {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

// runInit prepares the outside's namespace, starts the program, and reaps
// whatever is orphaned until the program ends. Then the kernel kills the rest.
func runInit() (int, error) {
	if err := prepareMounts("/run"); err != nil {
		return 0, err
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return 0, fmt.Errorf("mounting /proc: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return 0, err
	}
	cmd := reexec(stageInside, 0)
	cmd.Stdin = os.Stdin
	cmd.Env = append(cmd.Env, "TMPDIR="+ScratchDir)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("starting the program: %w", err)
	}
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, fmt.Errorf("reaping: %w", err)
		case pid == cmd.Process.Pid && ws.Exited():
			return ws.ExitStatus(), nil
		case pid == cmd.Process.Pid && ws.Signaled():
			return 128 + int(ws.Signal()), nil
		}
	}
}

// prepareMounts cuts mount propagation and lays private tmpfs over folders.
func prepareMounts(folders ...string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	for _, dir := range folders {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("preparing %s: %w", dir, err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
			return fmt.Errorf("mounting tmpfs on %s: %w", dir, err)
		}
	}
	if err := os.MkdirAll(ScratchDir, 0o711); err != nil {
		return err
	}
	hosts := filepath.Join(ScratchDir, "hosts")
	if err := os.WriteFile(hosts, []byte(hostsFile()), 0o644); err != nil { //nolint:gosec // a hosts file is public
		return err
	}
	if err := unix.Mount(hosts, "/etc/hosts", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding /etc/hosts: %w", err)
	}
	return nil
}
