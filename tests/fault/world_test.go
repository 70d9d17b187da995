//go:build emulated

package fault_test

import (
	"context"
	"errors"
	"hash/fnv"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/tests/trial"
)

func TestMain(m *testing.M) {
	if rig.Capable() {
		rig.Enter()
	}
	os.Exit(m.Run())
}

// world is one platform for a whole matrix.
type world struct {
	*fault.Field
	t *testing.T
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if !rig.Capable() {
		skip.Missing(t, "root")
	}
	f, err := fault.New(t.Context())
	if errors.Is(err, trial.ErrNoPackages) {
		skip.Missing(t, "the guest's kernel and firmware in .cache/debs (make setup)")
	}
	if err != nil {
		t.Fatal(err)
	}
	w := &world{f, t}
	t.Cleanup(func() {
		if t.Failed() {
			for name, text := range f.LogTails(80) {
				t.Logf("%s:\n%s", name, text)
			}
		}
		// The agent may be dead: that is what it was for.
		if err := f.Close(); err != nil && f.Host.Agent().Running() {
			t.Errorf("closing the platform: %v", err)
		}
	})
	return w
}

// third chooses a third of the cases by the commit, all with FAULT_ALL=1. The
// same commit always runs the same ones: FAULT_THIRD=n repeats them anywhere.
func third(t *testing.T) func(i int) bool {
	t.Helper()
	if os.Getenv("FAULT_ALL") == "1" {
		return func(int) bool { return true }
	}
	n, err := strconv.Atoi(os.Getenv("FAULT_THIRD"))
	if err != nil {
		sum := fnv.New32a()
		_, _ = sum.Write([]byte(head(t)))
		n = int(sum.Sum32() % 3)
	}
	t.Logf("a third of the cases, number %d of 0 to 2; again: FAULT_THIRD=%d go test -tags libvirt_dlopen,emulated ./tests/fault; all: make test-full", n, n)
	return func(i int) bool { return i%3 == n%3 }
}

// head is the commit; a tree without git is always the same.
func head(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "git", "rev-parse", "HEAD").Output()
	if err != nil {
		t.Logf("no commit to choose by: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// recover starts the next agent, which must undo or adopt within the promised
// time; an adopted guest is stopped and ends like any other.
func (w *world) recover(t *testing.T, o *fault.Order, sent bool) {
	t.Helper()
	if err := w.SetFaults(); err != nil {
		t.Fatal(err)
	}
	if err := w.StartAgent(w.t.Context()); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	within, cancel := context.WithTimeout(w.t.Context(), fault.Recovery)
	defer cancel()
	g, err := w.Started(within, o.GetGuestId())
	if err != nil {
		t.Fatalf("neither undone nor adopted within %v: %v", fault.Recovery, err)
	}
	how := "undone"
	if !g.Ended() {
		how = "adopted, stopped"
		if !sent {
			if _, err := w.API.Stop(within, o.GetGuestId(), time.Second); err != nil {
				t.Fatal(err)
			}
		}
		if g, err = w.Ended(within, o.GetGuestId()); err != nil {
			t.Fatalf("it does not end: %v", err)
		}
	}
	s, err := g.GuestState()
	if err != nil || s.GetStatus() != api.GuestStatus_GUEST_STATUS_STOPPED && (s.GetRefusal().GetCode() == "" || s.GetRefusal().GetRemedy() == "") {
		t.Errorf("ended as %v, %v", s, err)
	}
	if err := errors.Join(w.Clean(within), w.Once(within, o.GetGuestId()), w.Intact(within)); err != nil {
		t.Error(err)
	}
	t.Logf("%s as %s %s within %.1f s", how, s.GetStatus(), s.GetRefusal().GetCode(), time.Since(begun).Seconds())
}

// died waits for the agent's end.
func (w *world) died(t *testing.T, limit time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), limit)
	defer cancel()
	return trial.Await(ctx, "the agent's death", func() (bool, error) { return !w.Host.Agent().Running(), nil }) == nil
}
