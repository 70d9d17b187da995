// Package supervise runs the agent's long-lived work. A task is a function
// that works until its context ends; a panic in one becomes an error with its
// stack, the first task that fails for good ends all others and is the group's
// error, and tasks whose failures pass are begun again after a pause.
//
// It knows nothing of what tasks do. A Group is safe for concurrent use; tasks
// may be added while others run, and by tasks.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Task works until ctx ends. Nil means that its work is done.
type Task func(ctx context.Context) error

// PanicError is a panic of a task.
type PanicError struct {
	Value any
	// Stack of the goroutine that panicked.
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// Call runs task here and turns a panic into a *PanicError.
func Call(ctx context.Context, task Task) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	return task(ctx)
}

// fatal marks an error that ends the group although its task is restarted.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }

// Fatal returns err so that it ends the group even if the task's failures are
// taken as passing ones.
func Fatal(err error) error { return fatal{err} }

// Backoff is the pause before a task is begun again: Min after the first
// failure, doubled by each further one up to Max. A task that ran for longer
// than Max before it failed starts over with Min.
type Backoff struct{ Min, Max time.Duration }

// Group is tasks that live and end together.
type Group struct {
	ctx    context.Context // the tasks' common life is what a Group is
	cancel context.CancelCauseFunc
	log    hclog.Logger

	mu      sync.Mutex
	running int
	idle    chan struct{} // closed when running falls to 0; replaced when it rises
	err     error
}

// New returns a group whose tasks end when ctx does.
func New(ctx context.Context, logger hclog.Logger) *Group {
	ctx, cancel := context.WithCancelCause(ctx)
	idle := make(chan struct{})
	close(idle)
	return &Group{ctx: ctx, cancel: cancel, log: logger, idle: idle}
}

// Go begins a task. Its error ends the group. After the group has ended
// nothing is begun, and false is returned.
func (g *Group) Go(name string, task Task) bool { return g.start(name, task, nil) }

// Restart begins a task that is begun again when it fails.
func (g *Group) Restart(name string, task Task, pause Backoff) bool {
	return g.start(name, task, &pause)
}

func (g *Group) start(name string, task Task, pause *Backoff) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ctx.Err() != nil {
		return false
	}
	if g.running == 0 {
		g.idle = make(chan struct{})
	}
	g.running++
	go func() {
		err := g.run(name, task, pause)
		g.mu.Lock()
		defer g.mu.Unlock()
		if err != nil && g.err == nil {
			g.err = fmt.Errorf("%s: %w", name, err)
			g.cancel(g.err)
		}
		if g.running--; g.running == 0 {
			close(g.idle)
		}
	}()
	return true
}

// run returns an error only when it is the group's end.
func (g *Group) run(name string, task Task, pause *Backoff) error {
	for wait := time.Duration(0); ; {
		begun := time.Now()
		err := Call(g.ctx, task)
		if err == nil {
			return nil
		}
		p, panicked := errors.AsType[*PanicError](err)
		if panicked {
			g.log.Error("task panicked", "task", name, "err", err, "stack", string(p.Stack))
		}
		if g.ctx.Err() != nil && !panicked {
			return nil // told to end
		}
		if _, isFatal := errors.AsType[fatal](err); isFatal || pause == nil {
			return err
		}
		if wait = min(2*wait, pause.Max); wait == 0 || time.Since(begun) > pause.Max {
			wait = pause.Min
		}
		if !panicked {
			g.log.Warn("task failed, begun again after a pause", "task", name, "pause", wait.String(), "err", err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-g.ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// Wait returns when no task runs any more, with the error that ended the
// group, if one did.
func (g *Group) Wait() error {
	for {
		g.mu.Lock()
		idle, running, err := g.idle, g.running, g.err
		g.mu.Unlock()
		if running == 0 {
			g.cancel(err)
			return err
		}
		<-idle
	}
}
