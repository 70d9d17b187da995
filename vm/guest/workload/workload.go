// Package workload runs the tenant's program apart from the init: in user,
// mount, PID, network, IPC and UTS namespaces of its own, on the image's files,
// without capabilities, without a way to gain any, and with no network but its
// own loopback. It cannot reach the init's keys, the report device, configfs,
// the guest's ports or the metadata service: their files are in no mount of
// its namespace, and their addresses on no link of it.
//
// The init's binary is started again as the first process of the namespaces
// (Enter); it builds the file system, gives everything up and becomes the
// workload. A Process is safe for concurrent use.
package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// Stage is the name the init's binary is started under to become a workload.
const Stage = "workload-stage"

// The workload's user namespace: its ids 0 to IDs-1 are IDShift and up in the
// init's, so that not even its root owns anything outside.
const (
	IDShift = 100000
	IDs     = 65536
)

// Descriptors of the stage beyond the standard three.
const (
	fdSpec  = 3
	fdError = 4
)

// signalBase is added to a signal's number to make an exit code, as shells do.
const signalBase = 128

// Spec is one workload. Paths are the init's.
type Spec struct {
	// Root is the unpacked image, owned within the workload's ids.
	Root string `json:"root"`
	// Inputs appears read-only as /inputs, Results writable as /results.
	Inputs  string `json:"inputs"`
	Results string `json:"results"`
	// Devices are files of the init's /dev that the workload may use, besides
	// the harmless ones.
	Devices []string `json:"devices,omitempty"`
	// Driver is the folder with the GPUs' libraries; it appears read-only as
	// /usr/local/nvidia, where images for NVIDIA's container tools look.
	Driver string   `json:"driver,omitempty"`
	Args   []string `json:"args"`
	// Env is NAME=value; it holds secrets.
	Env []string `json:"env"`
	Dir string   `json:"dir"`
	// UID and GID within the workload's user namespace.
	UID int `json:"uid"`
	GID int `json:"gid"`
}

// Process is a running workload.
type Process struct {
	cmd   *exec.Cmd
	netns *os.File
	done  chan struct{}

	mu   sync.Mutex
	code int
	err  error
}

// Start starts a workload. out receives what it prints; nil discards it.
func Start(ctx context.Context, spec Spec, out io.Writer) (*Process, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("encoding workload: %w", err)
	}
	specR, specW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making pipe: %w", err)
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making pipe: %w", err), specR.Close(), specW.Close())
	}
	// Not bound to ctx: Stop ends it, and its namespace with it.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "/proc/self/exe")
	cmd.Args = []string{Stage}
	cmd.Env = []string{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{specR, errW}
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: IDShift, Size: IDs}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Setsid:     true, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{},
	}
	err = cmd.Start()
	err = errors.Join(err, specR.Close(), errW.Close())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting workload's namespaces: %w", err), specW.Close(), errR.Close())
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	if err := p.begin(text, specW, errR); err != nil {
		_ = cmd.Process.Kill() // it may have ended by itself
		_ = cmd.Wait()         // its exit status says less than err
		return nil, err
	}
	go p.wait()
	return p, nil
}

// begin hands the specification over and waits until the workload's own
// program runs.
func (p *Process) begin(spec []byte, specW, errR *os.File) (err error) {
	defer func() { err = errors.Join(err, errR.Close()) }()
	// A handle of the namespace, taken while its first process surely lives.
	if p.netns, err = os.Open("/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/ns/net"); err != nil {
		return errors.Join(fmt.Errorf("opening workload's network namespace: %w", err), specW.Close())
	}
	_, err = specW.Write(spec)
	if err = errors.Join(err, specW.Close()); err != nil {
		return errors.Join(fmt.Errorf("handing over to the workload: %w", err), p.netns.Close())
	}
	const maxReason = 4096
	reason, err := io.ReadAll(io.LimitReader(errR, maxReason))
	if err == nil && len(reason) == 0 {
		return nil
	}
	return errors.Join(contract.Refuse("guest.workload-not-started", "run the image with a container engine first, with the manifest's command",
		"the workload could not be started").Because(errors.Join(err, errors.New(string(reason)))), p.netns.Close())
}

func (p *Process) wait() {
	err := p.cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	defer close(p.done)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.err = fmt.Errorf("waiting for workload: %w", err)
		return
	}
	p.code = p.cmd.ProcessState.ExitCode()
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		p.code = signalBase + int(status.Signal())
	}
}

// Done is closed when the workload has ended, and every process of it.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitCode returns the workload's exit status, 128+n when signal n ended it.
// It blocks until then.
func (p *Process) ExitCode() (int, error) {
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.code, p.err
}

// Stop asks the workload to end and ends it after grace.
func (p *Process) Stop(grace time.Duration) {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		// The end of a PID namespace's first process is the end of all.
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// Close releases what is held of an ended workload.
func (p *Process) Close() error {
	if err := p.netns.Close(); err != nil {
		return fmt.Errorf("closing workload's network namespace: %w", err)
	}
	return nil
}

// Dial connects to a port of the workload's loopback.
func (p *Process) Dial(ctx context.Context, port int) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	out := make(chan result, 1)
	go func() {
		// A socket belongs to the namespace of the thread that makes it. The
		// thread is never unlocked, so it ends with this goroutine and no
		// other goroutine ever runs in the workload's namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(p.netns.Fd()), unix.CLONE_NEWNET); err != nil {
			out <- result{nil, fmt.Errorf("entering workload's network namespace: %w", err)}
			return
		}
		// A literal address: one attempt, made by this very goroutine.
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		out <- result{conn, err}
	}()
	r := <-out
	if r.err != nil {
		return nil, fmt.Errorf("connecting to workload: %w", r.err)
	}
	return r.conn, nil
}
