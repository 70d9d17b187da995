//go:build emulated

package fault_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/trial"
)

// sh runs a script on the host.
func (w *world) sh(t *testing.T, script string, args ...any) string {
	t.Helper()
	out, err := w.Host.Output(context.WithoutCancel(t.Context()), "bash", "-ec", fmt.Sprintf(script, args...))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// until asks until done says so.
func (w *world) until(t *testing.T, what string, done func(context.Context) (bool, error)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := trial.Await(ctx, what, func() (bool, error) { return done(ctx) }); err != nil {
		t.Fatal(err)
	}
}

// send sends a launch that nobody changed.
func (w *world) send(t *testing.T, change func(*fault.Order)) *fault.Order {
	t.Helper()
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(o)
	}
	if err := w.Send(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return o
}

// runs launches a guest and waits for its machine.
func (w *world) runs(t *testing.T) *fault.Order {
	t.Helper()
	o := w.send(t, nil)
	w.started(t, o)
	return o
}

func (w *world) started(t *testing.T, o *fault.Order) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	g, err := w.Started(ctx, o.GetGuestId())
	if err != nil || g.Ended() {
		t.Fatalf("the guest does not start: %+v, %v", g, err)
	}
}

// ended waits for a guest's end and says how it ended.
func (w *world) ended(t *testing.T, o *fault.Order) (status api.GuestStatus, code string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	g, err := w.Ended(ctx, o.GetGuestId())
	if err != nil {
		t.Fatal(err)
	}
	if g.Refusal != nil {
		if g.Refusal.Remedy == "" {
			t.Errorf("%v has no remedy", g.Refusal)
		}
		return 0, g.Refusal.Code
	}
	s, err := g.GuestState()
	if err != nil {
		t.Fatal(err)
	}
	return s.GetStatus(), s.GetRefusal().GetCode()
}

// endsAs waits for a guest's end and compares.
func (w *world) endsAs(t *testing.T, o *fault.Order, want api.GuestStatus, code string) {
	t.Helper()
	if status, got := w.ended(t, o); status != want || got != code {
		t.Errorf("the guest ends as %s %q, want %s %q", status, got, want, code)
	}
}

// stops stops a guest and looks that nothing of it is left.
func (w *world) stops(t *testing.T, o *fault.Order) {
	t.Helper()
	if _, err := w.API.Stop(t.Context(), o.GetGuestId(), time.Second); err != nil {
		t.Fatal(err)
	}
	w.endsAs(t, o, api.GuestStatus_GUEST_STATUS_STOPPED, "")
}

// clean waits until nothing of guests is left, and each was started once.
func (w *world) clean(t *testing.T, orders ...*fault.Order) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := w.Clean(ctx); err != nil {
		t.Error(err)
	}
	for _, o := range orders {
		if err := w.Once(ctx, o.GetGuestId()); err != nil {
			t.Error(err)
		}
	}
}

func (w *world) qemu(t *testing.T, o *fault.Order) int {
	t.Helper()
	pid, err := strconv.Atoi(w.sh(t, "cat /run/libvirt/qemu/nodeagent-%s.pid", o.GetGuestId()))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func (w *world) signal(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}

// status asks the agent, which must answer whatever the host does.
func (w *world) status(t *testing.T) admin.Status {
	t.Helper()
	s, err := w.Host.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// short waits until status and heartbeats name these shortages and no others.
func (w *world) short(t *testing.T, codes ...string) {
	t.Helper()
	var last []string
	w.until(t, fmt.Sprintf("shortages %v (of them last %v)", codes, &last), func(ctx context.Context) (bool, error) {
		s, err := w.Host.Status(ctx)
		if err != nil {
			return false, err
		}
		last = nil
		for _, text := range s.Shortages {
			code, _, _ := strings.Cut(text, ":")
			last = append(last, code)
		}
		return slices.Equal(last, codes), nil
	})
	w.toldShort(t, codes...)
}

// toldShort waits until the control plane sees these shortages, in whatever number, and no others.
func (w *world) toldShort(t *testing.T, codes ...string) {
	t.Helper()
	w.until(t, fmt.Sprintf("heartbeats with %v", codes), func(ctx context.Context) (bool, error) {
		nodes, err := w.API.Nodes(ctx)
		var told []string
		for _, n := range nodes {
			for _, r := range n.Warnings {
				if n.ID == w.Host.ID && strings.HasPrefix(r.Code, "host.") {
					told = append(told, r.Code)
				}
			}
		}
		return slices.Equal(slices.Compact(told), slices.Compact(slices.Clone(codes))), err
	})
}

// threads is how many the agent has.
func (w *world) threads(t *testing.T) int {
	t.Helper()
	tasks, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(w.Host.Agent().PID()), "task"))
	if err != nil {
		t.Fatal(err)
	}
	return len(tasks)
}

// heard waits for a further word of the host.
func (w *world) heard(t *testing.T) {
	t.Helper()
	since := time.Now()
	w.until(t, "a heartbeat", func(ctx context.Context) (bool, error) {
		nodes, err := w.API.Nodes(ctx)
		return slices.ContainsFunc(nodes, func(n client.Node) bool {
			return n.ID == w.Host.ID && n.LastSeen != nil && n.LastSeen.After(since)
		}), err
	})
}

// same fails when agent or guest are not what they were.
func (w *world) same(t *testing.T, agent int, o *fault.Order, qemu int) {
	t.Helper()
	if !w.Host.Agent().Running() || w.Host.Agent().PID() != agent {
		t.Fatal("the agent ended")
	}
	if now := w.qemu(t, o); now != qemu {
		t.Fatalf("the guest's process was %d and is %d", qemu, now)
	}
	if out := w.sh(t, "kill -0 %d && echo lives", qemu); out != "lives" {
		t.Fatal("the guest is dead")
	}
}
