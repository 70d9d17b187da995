//go:build emulated

package fault_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/tests/trial"
	"github.com/confidential-node/agent/vm"
)

// patience is for a machine that does much else.
const patience = 3 * time.Minute

// refused waits until the host has refused a command, of this id unless it is
// "", with a code.
func (w *world) refused(t *testing.T, id, code string) {
	t.Helper()
	var seen []string
	within, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := trial.Await(within, "a refusal "+code, func() (bool, error) {
		events, err := w.API.Events(t.Context(), 0, 10000, false)
		if err != nil {
			return false, err
		}
		seen = nil
		for _, e := range events {
			event, err := e.Decode()
			if err != nil {
				return false, err
			}
			if r := event.GetCommandRefused().GetRefusal(); r != nil && (id == "" || event.GetCommandId() == id) {
				seen = append(seen, r.GetCode())
			}
		}
		return slices.Contains(seen, code), nil
	})
	if err != nil {
		t.Fatalf("%v; refused with %v", err, seen)
	}
}

// A bit of the state file flips under a running guest. The file is set aside,
// the control plane opens another epoch, the guest goes on running and is told
// of, a command of the old epoch is refused when it comes again, and the host
// takes new guests.
func TestADamagedStateFileHarmsNoGuestAndRepeatsNothing(t *testing.T) {
	w := newWorld(t)
	within, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := w.Control.NewCommand(w.Host.ID, &api.Command_Uncordon{Uncordon: &api.Uncordon{}})
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.Control.Sign(cmd)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Control.Publish(t.Context(), w.Host.ID, again); err != nil {
		t.Fatal(err)
	}
	if err := w.Send(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if g, err := w.Started(t.Context(), o.GetGuestId()); err != nil || g.Ended() {
		t.Fatalf("not started: %+v, %v", g, err)
	}
	w.Host.Agent().Kill()
	path := w.Host.Path(filepath.Join(trial.StateDir, "state.db"))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[16] ^= 1 // of the first meta page: bbolt alone would go back to the other one
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	if aside, err := filepath.Glob(path + ".corrupt-*"); err != nil || len(aside) != 1 {
		t.Errorf("set aside: %v, %v", aside, err)
	}
	err = trial.Await(within, "status to show the guest as nobody's", func() (bool, error) {
		status, err := w.Host.Status(within)
		said := strings.Join(status.Warnings, " ")
		return err == nil && len(status.Guests) == 1 && status.Guests[0].ID == o.GetGuestId() &&
			strings.Contains(said, o.GetGuestId()) && strings.Contains(said, "state.db.corrupt-"), err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Control.Publish(t.Context(), w.Host.ID, again); err != nil {
		t.Fatal(err)
	}
	w.refused(t, cmd.GetCommandId(), api.CodeEpochStale)
	w.launchesAndStopsBeside(t)
	if out, err := w.Host.Output(t.Context(), "virsh", "-q", "-c", "qemu:///system", "destroy", vm.NamePrefix+o.GetGuestId()); err != nil {
		t.Fatalf("the guest does not run any more: %s %v", out, err)
	}
	var left []string
	err = trial.Await(within, "the host to be clean", func() (bool, error) {
		now, err := w.Left(within)
		left = now
		return len(left) == 0, err
	})
	if err != nil {
		t.Errorf("%v; left over: %v", err, left)
	}
}

// The clocks of the host come apart, seen by the real agent on the real run
// path: in a time namespace it is the time since the boot that moves. Nothing
// is launched until the operator accepts the clock. By as much as three years,
// the control plane's certificate has ended at the agent's time, and the link
// says so.
func TestAClockThatJumpedClosesLaunchesUntilItIsAccepted(t *testing.T) {
	if h, err := clock.NewHost("/"); err != nil || h.Synchronised() {
		skip.Missing(t, "a host whose clock no time service keeps synchronised")
	}
	under := apart(time.Hour)
	w := newWorld(t)
	if out, err := w.Host.Output(t.Context(), under[0], append(slices.Clone(under[1:]), "true")...); err != nil {
		t.Log(out, err)
		skip.Missing(t, "time namespaces")
	}
	w.Host.Agent().Kill()
	if err := w.Host.StartAgentUnder(t.Context(), under, nil); err != nil {
		t.Fatal(err)
	}
	status, err := w.Host.Status(t.Context())
	if err != nil || status.Clock.Trusted || !strings.Contains(status.Clock.Reason, clock.CodeJumped) || !strings.Contains(strings.Join(status.Warnings, " "), "clock accept") {
		t.Errorf("status shows %+v, %v, %v", status.Clock, status.Warnings, err)
	}
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Send(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w.refused(t, "", clock.CodeJumped)
	w.doubted(t, clock.CodeJumped)
	if out, err := w.Host.AgentCommand(t.Context(), "clock", "accept").CombinedOutput(); err != nil {
		t.Fatalf("accepting the clock: %s, %v", out, err)
	}
	w.launchesAndStops(t)
	w.Host.Agent().Kill()
	if err := w.StartAgent(t.Context()); err != nil { // and back, as another boot would
		t.Fatal(err)
	}
	if status, err := w.Host.Status(t.Context()); err != nil || !status.Clock.Trusted {
		t.Errorf("status shows %+v, %v", status.Clock, err)
	}
	w.Host.Agent().Kill()
	if err := w.Host.BeginAgentUnder(t.Context(), apart(3*365*24*time.Hour), nil); err != nil {
		t.Fatal(err)
	}
	w.linked(t, control.StateCertificateExpired)
	if out, err := w.Host.AgentCommand(t.Context(), "clock", "accept").CombinedOutput(); err != nil {
		t.Fatalf("accepting the clock: %s, %v", out, err)
	}
	w.linked(t, control.StateConnected)
}

// apart runs a program whose time since the boot is that much longer.
func apart(d time.Duration) []string {
	return []string{"unshare", "--time", "--boottime", strconv.Itoa(int(d.Seconds())), "--kill-child", "--"}
}

// linked waits until the agent says that of its link.
func (w *world) linked(t *testing.T, state control.State) {
	t.Helper()
	within, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := trial.Await(within, "a link that is "+string(state), func() (bool, error) {
		status, err := w.Host.Status(within) // its socket may not be there yet
		return err == nil && status.Control.State == string(state), nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// doubted waits for a heartbeat that tells of a doubt.
func (w *world) doubted(t *testing.T, code string) {
	t.Helper()
	within, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := trial.Await(within, "a heartbeat with "+code, func() (bool, error) {
		events, err := w.API.Events(t.Context(), 0, 10000, true)
		for _, e := range events {
			event, err := e.Decode()
			if err != nil {
				return false, err
			}
			if event.GetHeartbeat().GetClockDoubt() == code {
				return true, nil
			}
		}
		return false, err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// The real agent tells systemd that it is up, that it works, and that it is
// about to end.
func TestTheAgentTellsSystemdThatItWorks(t *testing.T) {
	w := newWorld(t)
	w.Host.Agent().Kill()
	const socket = "/run/notify"
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: w.Host.Path(socket), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close() //nolint:errcheck // read only
	if err := w.Host.StartAgentWith(t.Context(), []string{"NOTIFY_SOCKET=" + socket, "WATCHDOG_USEC=600000"}); err != nil {
		t.Fatal(err)
	}
	next := func() string {
		t.Helper()
		if err := systemd.SetReadDeadline(time.Now().Add(fault.Recovery)); err != nil {
			t.Fatal(err)
		}
		state := make([]byte, 1024)
		n, err := systemd.Read(state)
		if err != nil {
			t.Fatalf("systemd hears nothing: %v", err)
		}
		return string(state[:n])
	}
	var heard []string
	for len(heard) < 10 {
		heard = append(heard, next())
	}
	slices.Sort(heard)
	if want := []string{daemon.SdNotifyReady, daemon.SdNotifyWatchdog}; !slices.Equal(slices.Compact(heard), want) {
		t.Errorf("systemd hears %q", heard)
	}
	go func() { _ = w.Host.Agent().Stop() }()
	for {
		if state := next(); state == daemon.SdNotifyStopping {
			break
		}
	}
}
