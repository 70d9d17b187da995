package trial

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

const (
	// startTimeout bounds the start of a program on a busy machine.
	startTimeout = 90 * time.Second
	pollInterval = 50 * time.Millisecond
	// endTimeout bounds a program's graceful end.
	endTimeout = 30 * time.Second
)

// Process is one program of a trial, with what it prints in a file.
type Process struct {
	name string
	// Log is the file with its standard error.
	Log  string
	cmd  *exec.Cmd
	done chan struct{}
}

// start starts a command whose output goes to logs/NAME.
func start(name, logs string, cmd *exec.Cmd) (*Process, error) {
	p := &Process{name: name, Log: filepath.Join(logs, name+".log"), cmd: cmd, done: make(chan struct{})}
	out, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := errors.Join(cmd.Start(), out.Close()); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		_ = cmd.Wait() // how it ended is in ProcessState
		close(p.done)
	}()
	return p, nil
}

// PID of the program itself.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Running reports whether it has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends it at once and waits.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // gone already is fine
	<-p.done
}

// Signal sends a signal.
func (p *Process) Signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// Stop asks it to end; it is an error when it does not, or not well.
func (p *Process) Stop() error {
	if !p.Running() {
		return fmt.Errorf("%s had ended: %v; see %s", p.name, p.cmd.ProcessState, p.Log)
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stopping %s: %w", p.name, err)
	}
	select {
	case <-p.done:
	case <-time.After(endTimeout):
		p.Kill()
		return fmt.Errorf("%s did not end within %v; see %s", p.name, endTimeout, p.Log)
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("%s ended with %v; see %s", p.name, p.cmd.ProcessState, p.Log)
	}
	return nil
}

// up waits until ready reports true, while the process runs.
func (p *Process) up(ctx context.Context, ready func(context.Context) bool) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return Await(ctx, p.name+" to be ready", func() (bool, error) {
		if !p.Running() {
			text, _ := os.ReadFile(p.Log) // best effort: the state says enough
			return false, fmt.Errorf("%s ended: %v: %s", p.name, p.cmd.ProcessState, text)
		}
		return ready(ctx), nil
	})
}

// Await asks again and again until done reports true, fails, or ctx ends.
func Await(ctx context.Context, what string, done func() (bool, error)) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		case <-tick.C:
		}
	}
}
