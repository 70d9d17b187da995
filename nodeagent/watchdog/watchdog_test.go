package watchdog_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/watchdog"
)

// told is what systemd hears.
type told struct {
	mu     sync.Mutex
	states []string
}

func (n *told) notify(state string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.states = append(n.states, state)
}

// since returns what was told since it was last called.
func (n *told) since() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	states := n.states
	n.states = nil
	return states
}

func count(states []string, want string) int {
	return len(slices.DeleteFunc(slices.Clone(states), func(s string) bool { return s != want }))
}

// after lets fake time go by.
func after(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // fake time
	synctest.Wait()
}

func TestSystemdHearsOnlyWhileEveryLoopTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var systemd told
		w := watchdog.New(time.Minute, systemd.notify, hclog.NewNullLogger())
		quick, slow := w.Loop("quick", 2*time.Minute), w.Loop("slow", time.Hour)
		hang := make(chan chan struct{}, 1)
		go func() { // the seam: this loop can be made to hang
			tick := time.NewTicker(time.Minute)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case over := <-hang:
					<-over
				case <-tick.C:
					quick()
				}
			}
		}()
		go func() { _ = w.Run(ctx) }()
		after(50 * time.Minute)
		slow()
		if got := systemd.since(); count(got, daemon.SdNotifyWatchdog) < 50 || len(got) != count(got, daemon.SdNotifyWatchdog) {
			t.Errorf("all turn: %d of %v", len(got), got)
		}
		over := make(chan struct{})
		hang <- over
		after(3 * time.Minute)
		systemd.since()
		after(10 * time.Minute)
		if got := systemd.since(); len(got) != 0 {
			t.Errorf("one hangs, and systemd hears %v", got)
		}
		close(over)
		after(3 * time.Minute)
		if got := systemd.since(); count(got, "STATUS=working") != 1 || count(got, daemon.SdNotifyWatchdog) == 0 {
			t.Errorf("it turns again, and systemd hears %v", got)
		}
		after(time.Hour)
		systemd.since()
		after(time.Minute)
		if got := systemd.since(); len(got) != 0 {
			t.Errorf("the slow one hangs, and systemd hears %v", got)
		}
	})
}

func TestNobodyIsToldWhatNobodyAsked(t *testing.T) {
	t.Parallel()
	w := watchdog.New(0, func(state string) { t.Errorf("told %q", state) }, hclog.NewNullLogger())
	w.Loop("a", time.Nanosecond)
	if err := w.Run(t.Context()); err != nil {
		t.Error(err)
	}
}

// As under systemd: a notify socket and WATCHDOG_USEC. The environment is the
// process's: no t.Parallel.
func TestAHungLoopStarvesSystemdsWatchdog(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close() //nolint:errcheck // read only
	const limit = 200 * time.Millisecond
	t.Setenv("NOTIFY_SOCKET", socket)
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(limit.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	asked, err := daemon.SdWatchdogEnabled(false)
	if err != nil || asked != limit {
		t.Fatalf("systemd asks for %v, %v", asked, err)
	}
	w := watchdog.New(asked, func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			t.Error(err)
		}
	}, hclog.NewNullLogger())
	turned := w.Loop("loop", 5*limit)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = w.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	next := func(within time.Duration) string {
		t.Helper()
		if err := systemd.SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		state := make([]byte, 1024)
		n, err := systemd.Read(state)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return string(state[:n])
	}
	for range 20 { // longer than the loop's patience
		turned()
		if got := next(30 * time.Second); got != daemon.SdNotifyWatchdog {
			t.Fatalf("systemd hears %q", got)
		}
	}
	// From here on the loop hangs.
	last := ""
	for range 100 {
		heard := next(10 * limit)
		if heard == "" {
			if !strings.HasPrefix(last, "STATUS=hangs: loop") {
				t.Errorf("the last word was %q", last)
			}
			return
		}
		last = heard
	}
	t.Error("systemd hears of a loop that hangs that it works")
}
