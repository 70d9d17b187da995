// Package rig gives demo and tests a world of their own: one set of
// namespaces for "the outside" (control plane, broker, stores, tenants) and,
// inside it, one for each "provider host" with its own /run, /etc/libvirt and
// libvirtd. Host and outside are joined by a veth with documentation addresses
// and nothing else: no route leaves the machine, nobody else's domains, links
// or rules are touched, and cleaning up is the end of the namespaces.
//
// It re-executes the running binary to get into the namespaces, so Enter must
// be the first thing main or TestMain does. The program then runs as a child
// of PID 1 of the run, which reaps and passes signals and the exit code on;
// when it ends, or whoever started it dies, the kernel ends everything else.
// A Host's methods are not safe for concurrent use, but for Command, Output
// and Path. Linux, root only.
package rig

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
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

// ScratchDir is a folder on the run's own tmpfs. Temporary files live there;
// outside and every host see it at this path.
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
func reexec(stage string, attr syscall.SysProcAttr) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...) //nolint:forbidigo,noctx,gosec // a stage lives as long as this process
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &attr
	return cmd
}

// launch starts PID 1 of the namespaces and waits for it.
func launch() (int, error) {
	// The death signal is sent when the thread ends that made the child.
	runtime.LockOSThread()
	cmd := reexec(stageInit, syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	})
	cmd.Stdin = os.Stdin
	signals := catch()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("making namespaces (are you root?): %w", err)
	}
	go forward(signals, cmd.Process)
	return exitCode(cmd.Wait())
}

// catch takes over the signals that ask a program to end. A terminal's
// interrupt reaches every process of the group anyhow; getting it twice harms
// none that shuts down gracefully.
func catch() <-chan os.Signal {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	return signals
}

// forward passes signals on for as long as this process lives.
func forward(signals <-chan os.Signal, to *os.Process) {
	for s := range signals {
		_ = to.Signal(s) // gone already is fine
	}
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

// runInit prepares the outside's namespaces, starts the program, and reaps
// whatever is orphaned until the program ends. Then the kernel kills the rest.
func runInit() (int, error) {
	signals := catch()
	if err := prepareOutside(); err != nil {
		return 0, err
	}
	cmd := reexec(stageInside, syscall.SysProcAttr{})
	cmd.Stdin = os.Stdin
	cmd.Env = append(cmd.Env, "TMPDIR="+ScratchDir)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("starting the program: %w", err)
	}
	go forward(signals, cmd.Process)
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

func prepareOutside() error {
	if err := privateMounts(); err != nil {
		return err
	}
	if err := mountTmpfs("/run"); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	if err := os.Mkdir(ScratchDir, 0o711); err != nil { //nolint:gosec // QEMU's user passes through
		return fmt.Errorf("making scratch folder: %w", err)
	}
	hosts := filepath.Join(ScratchDir, "hosts")
	if err := os.WriteFile(hosts, []byte(hostsFile()), 0o644); err != nil { //nolint:gosec // a hosts file is public
		return fmt.Errorf("writing hosts file: %w", err)
	}
	if err := bind(hosts, "/etc/hosts"); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(outsideName)); err != nil {
		return fmt.Errorf("setting host name: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	return addBridge()
}
