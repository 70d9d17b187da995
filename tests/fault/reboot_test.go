//go:build emulated

package fault_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/fault"
)

// powerCut is what a host has lost when it comes up again: its processes,
// /run, links, rules and the kernel's settings. What is on disk stays. The
// boot id is another one.
const powerCut = `set -eu
for pid in $(cat /run/libvirt/qemu/nodeagent-*.pid); do
	kill -9 "$pid"
	timeout 30 tail --pid="$pid" -f /dev/null
done
for link in $(ip -o link | sed -n 's/^[0-9]*: \(na[^:@]*\).*/\1/p'); do ip link del "$link"; done
nft flush ruleset
echo 0 > /proc/sys/net/ipv4/ip_forward
rm -rf /run/nodeagent /run/libvirt/qemu/* /run/libvirt/libvirt-sock*
mount --bind /run/boot_id /proc/sys/kernel/random/boot_id`

// The host loses its power under a guest. The next agent finds another boot,
// an empty hypervisor and an empty /run: the guest has failed, typed, nothing
// of it is left, and the host takes guests again.
func TestAHostsPowerCutEndsItsGuestsTyped(t *testing.T) {
	w := newWorld(t)
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Send(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if g, err := w.Started(t.Context(), o.GetGuestId()); err != nil || g.Ended() {
		t.Fatalf("not started: %+v, %v", g, err)
	}
	w.Host.Agent().Kill()
	if err := w.Host.KillLibvirtd(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.Host.Path("/run/boot_id"), []byte(uuid.NewString()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Host.Output(t.Context(), "bash", "-c", powerCut); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(w.Host.Path("/run/nodeagent/*")); err != nil || len(left) > 0 {
		t.Fatalf("/run is not empty: %v, %v", left, err)
	}
	if err := errors.Join(w.Host.StartLibvirtd(t.Context()), w.Host.StartPSP(t.Context())); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := w.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	g, err := w.Ended(t.Context(), o.GetGuestId())
	if err != nil {
		t.Fatal(err)
	}
	if s, err := g.GuestState(); err != nil || s.GetStatus() != api.GuestStatus_GUEST_STATUS_FAILED || s.GetRefusal().GetCode() != "host.rebooted" {
		t.Errorf("ended as %v, %v", s, err)
	}
	if err := errors.Join(w.Clean(t.Context()), w.Once(t.Context(), o.GetGuestId())); err != nil {
		t.Error(err)
	}
	took := time.Since(begun)
	if status, err := w.Host.Status(t.Context()); err != nil || !status.Clock.Trusted {
		t.Errorf("after the boot the clock is %+v, %v", status.Clock, err)
	}
	t.Logf("told and clean %.1f s after the agent's start", took.Seconds())
	if took > fault.Recovery {
		t.Errorf("longer than %v", fault.Recovery)
	}
	w.launchesAndStops(t)
}

// launchesAndStops takes one more guest through its life, on a host that is
// clean then.
func (w *world) launchesAndStops(t *testing.T) {
	t.Helper()
	w.launchesAndStopsBeside(t)
	within, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := w.Clean(within); err != nil {
		t.Error(err)
	}
}

// launchesAndStopsBeside is launchesAndStops beside others.
func (w *world) launchesAndStopsBeside(t *testing.T) {
	t.Helper()
	o, err := w.Order()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Send(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w.stop(t, o)
	g, err := w.Ended(t.Context(), o.GetGuestId())
	if err != nil {
		t.Fatal(err)
	}
	if s, err := g.GuestState(); err != nil || s.GetStatus() != api.GuestStatus_GUEST_STATUS_STOPPED {
		t.Errorf("the next guest ended as %v, %v", s, err)
	}
}
