//go:build emulated

package fault_test

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/tests/trial"
)

// lastCall ends the loop of a call that fires for ever.
const lastCall = 40

// The agent is killed on entry of the Nth call that makes something durable,
// over a launch and a stop, for every N until it fires no more: between write
// and sync, sync and rename, one record and the next. strace counts per thread.
func TestTheAgentIsKilledAtEverySync(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		skip.Missing(t, "strace")
	}
	w, chosen := newWorld(t), third(t)
	for _, call := range []string{"fsync", "fdatasync", "rename,renameat,renameat2"} {
		for n, fired := 1, true; fired; n++ {
			if n > lastCall {
				t.Fatalf("%s fires for ever", call)
			}
			if !chosen(n) {
				continue
			}
			t.Run(fmt.Sprintf("%s-%d", call, n), func(t *testing.T) { fired = w.killedAtCall(t, call, n) })
			if t.Failed() {
				t.FailNow()
			}
		}
	}
}

// killedAtCall reports whether the agent was killed.
func (w *world) killedAtCall(t *testing.T, call string, n int) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*fault.Recovery)
	defer cancel()
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	tracer := exec.CommandContext(w.t.Context(), "strace", "-f", "-p", strconv.Itoa(w.Host.Agent().PID()), "-o", "/dev/null",
		"-e", "trace="+call, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n))
	tracer.Stderr = &said
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- tracer.Wait() }()
	w.traced(t)
	if err := w.Send(ctx, o); err != nil {
		t.Fatal(err)
	}
	stopped := false
	err = trial.Await(ctx, "the agent's death or the guest's start", func() (bool, error) {
		if !w.Host.Agent().Running() {
			return true, nil
		}
		g, err := w.API.Guest(ctx, o.GetGuestId())
		if err != nil {
			return false, err
		}
		s, err := g.GuestState()
		return len(g.State) > 0 && (g.Ended() || s.GetStatus() > 1), err
	})
	if err != nil {
		t.Fatal(err)
	}
	if w.Host.Agent().Running() {
		stopped = true
		if _, err := w.API.Stop(ctx, o.GetGuestId(), time.Second); err != nil {
			t.Fatal(err)
		}
	}
	fired := w.fired(ctx, t, o)
	if !fired {
		_ = tracer.Process.Signal(syscall.SIGTERM) // it detaches, the agent lives on
	}
	if err := untraced(tracer, ended); err != nil && strings.Contains(said.String(), "ptrace") {
		t.Fatalf("strace: %v: %s", err, said.String())
	}
	if fired {
		w.recover(t, o, stopped)
	}
	return fired
}

// untraced waits for strace's end. One that does not end when asked, as happens
// when a thread is between two stops, is killed: the kernel lets its threads go.
func untraced(tracer *exec.Cmd, ended <-chan error) error {
	timer := time.NewTimer(15 * time.Second)
	defer timer.Stop()
	select {
	case err := <-ended:
		return err
	case <-timer.C:
		_ = tracer.Process.Kill()
		return <-ended
	}
}

// traced waits until strace holds every thread.
func (w *world) traced(t *testing.T) {
	t.Helper()
	err := trial.Await(t.Context(), "strace to hold the agent", func() (bool, error) {
		out, err := exec.CommandContext(t.Context(), "bash", "-c",
			"grep -h ^TracerPid /proc/"+strconv.Itoa(w.Host.Agent().PID())+"/task/*/status | grep -c '\t0$' || true").Output()
		return strings.TrimSpace(string(out)) == "0", err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// fired reports whether the agent dies before the guest has ended and is gone.
func (w *world) fired(ctx context.Context, t *testing.T, o *fault.Order) bool {
	t.Helper()
	err := trial.Await(ctx, "the agent's death or the guest's end", func() (bool, error) {
		g, err := w.API.Guest(ctx, o.GetGuestId())
		if !w.Host.Agent().Running() || err != nil {
			return true, err
		}
		left, err := w.Left(ctx)
		return g.Ended() && len(left) == 0, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return !w.Host.Agent().Running()
}
