package lifecycle_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/config"
)

// published waits until exactly these ways lead to the guest.
func (h *host) published(what string, ports []network.Publish, routes []relay.Route) {
	h.t.Helper()
	h.until(what, func() bool {
		gotPorts, gotRoutes := h.world.Published(guestID)
		for i := range gotRoutes {
			gotRoutes[i].To = relay.Route{}.To
		}
		return slices.Equal(gotPorts, ports) && slices.Equal(gotRoutes, routes)
	})
}

func TestAGuestIsReachedByPortAndNameUntilItIsToStop(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.cfg.SharedTLS = config.SharedTLS{Listen: ":443", Domain: "guests.example"}
	h.cfg.Network.PublishedPorts = network.Range{First: 20000, Last: 20010}
	ports := []network.Publish{{Host: 20000, Guest: 8000}}
	routes := []relay.Route{{Port: 20000}, {Name: "job.guests.example"}}
	launch := h.command(func(l *api.LaunchGuest) {
		l.Ports = []*api.PublishedPort{{GuestPort: 8000}, {GuestPort: 8001, ServerName: "job.guests.example"}}
	})
	ctx, die := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	if err := h.execute(ctx, m, launch); err != nil {
		t.Fatal(err)
	}
	h.until("it runs", func() bool {
		g, err := h.store.Guest(guestID)
		return err == nil && g.Status >= api.GuestStatus_GUEST_STATUS_STARTED
	})
	h.published("launched", ports, routes)
	die()
	<-over
	h.world.ProcessDied()
	m = h.life(t.Context(), nil)
	<-m.Ready()
	if _, now := h.world.Published(guestID); len(now) != len(routes) {
		t.Errorf("clients are let in when %d of %d routes are known", len(now), len(routes))
	}
	h.published("found again", ports, routes)
	h.stop(t.Context(), m, time.Hour)
	h.published("draining", nil, nil)
	if !h.world.Running(guestID) {
		t.Error("it ended before its grace was over")
	}
	events, err := h.store.NextEvents(1000)
	if err != nil {
		t.Fatal(err)
	}
	told := slices.ContainsFunc(events, func(e *api.Event) bool {
		p := e.GetGuestState().GetPorts()
		return len(p) == 2 && p[0].GetHostPort() == 20000 && p[1].GetHostPort() == 443 && p[1].GetServerName() == "job.guests.example"
	})
	if !told {
		t.Error("the control plane was not told the ports")
	}
	h.world.PowerOff(guestID)
	h.ends(t.Context(), stopped, "")
}

func TestAPortOfAProcessIsPassedOver(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.world.Listen(20000, 20001)
	m := h.life(t.Context(), nil)
	h.refused(t.Context(), m, h.command(func(l *api.LaunchGuest) {
		l.Ports = []*api.PublishedPort{{GuestPort: 8000, HostPort: 20001}}
	}), "admit.port-in-use")
	if err := h.execute(t.Context(), m, h.command(func(l *api.LaunchGuest) {
		l.Ports = []*api.PublishedPort{{GuestPort: 8000}}
	})); err != nil {
		t.Fatal(err)
	}
	h.published("the first free port", []network.Publish{{Host: 20002, Guest: 8000}}, []relay.Route{{Port: 20002}})
}

// A launch goes on where the host's sockets cannot be listed.
func TestUnknownPortsStopNoLaunch(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.world.Fail("listening", errors.New("no sock_diag"))
	m := h.life(t.Context(), nil)
	if err := h.execute(t.Context(), m, h.command(func(l *api.LaunchGuest) {
		l.Ports = []*api.PublishedPort{{GuestPort: 8000}}
	})); err != nil {
		t.Fatal(err)
	}
	h.published("the first port", []network.Publish{{Host: 20000, Guest: 8000}}, []relay.Route{{Port: 20000}})
}

func TestAnAdoptedGuestIsServedThoughItsRoutesAreTaken(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ports, routes := []network.Publish{{Host: 20000, Guest: 8000}}, []relay.Route{{Port: 20000}}
	ctx, die := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	if err := h.execute(ctx, m, h.command(func(l *api.LaunchGuest) {
		l.Ports = []*api.PublishedPort{{GuestPort: 8000}}
	})); err != nil {
		t.Fatal(err)
	}
	h.until("it runs", func() bool {
		g, err := h.store.Guest(guestID)
		return err == nil && g.Status >= api.GuestStatus_GUEST_STATUS_STARTED
	})
	die()
	<-over
	h.world.ProcessDied()
	h.world.Fail("relay", errors.New("another process has the port"))
	m = h.life(t.Context(), nil)
	<-m.Ready()
	h.published("by the kernel alone", ports, nil)
	h.until("metadata is served, and the operator told", func() bool {
		views := m.Snapshot()
		_, served := h.world.Session(guestID)
		return served && len(views) == 1 && strings.Contains(views[0].Finding, "another process has the port")
	})
	h.world.Fail("relay", nil)
	h.published("the port is free again", ports, routes)
	h.until("nothing is left to tell", func() bool { return m.Snapshot()[0].Finding == "" })
}

func TestDrainingIsTriedUntilItWorks(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	if err := h.execute(t.Context(), m, h.command(func(l *api.LaunchGuest) {
		l.Ports = []*api.PublishedPort{{GuestPort: 8000}}
	})); err != nil {
		t.Fatal(err)
	}
	h.until("it runs", func() bool {
		g, err := h.store.Guest(guestID)
		return err == nil && g.Status >= api.GuestStatus_GUEST_STATUS_STARTED
	})
	h.world.Fail("relay", errors.New("not now"))
	h.stop(t.Context(), m, time.Hour)
	h.until("it was asked to end", func() bool { return h.world.Calls("shutdown") > 0 })
	h.published("by the relay still", nil, []relay.Route{{Port: 20000}})
	h.world.Fail("relay", nil)
	h.published("draining", nil, nil)
}

// A name is a guest's from its acceptance until nothing of it is left, also
// while it drains and across a death of the agent.
func TestANameIsOneGuestsUntilItHasEnded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.cfg.SharedTLS = config.SharedTLS{Listen: ":443", Domain: "guests.example"}
	named := func(cmd *api.Command, name string) *api.Command {
		cmd.GetLaunchGuest().Ports = []*api.PublishedPort{{GuestPort: 8000, ServerName: name}}
		return cmd
	}
	ctx, die := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	if err := h.execute(ctx, m, named(h.command(nil), "job.guests.example")); err != nil {
		t.Fatal(err)
	}
	h.refused(ctx, m, named(h.other(1), "job.guests.example"), "admit.name-in-use")
	h.refused(ctx, m, named(h.other(2), "job.others.example"), "admit.name-domain")
	h.refused(ctx, m, named(h.other(3), "10.0.0.1"), "network.name-malformed")
	h.until("it runs", func() bool {
		g, err := h.store.Guest(guestID)
		return err == nil && g.Status >= api.GuestStatus_GUEST_STATUS_STARTED
	})
	die()
	<-over
	h.world.ProcessDied()
	m = h.life(t.Context(), nil)
	<-m.Ready()
	h.refused(t.Context(), m, named(h.other(4), "job.guests.example"), "admit.name-in-use")
	h.stop(t.Context(), m, time.Hour)
	h.published("draining", nil, nil)
	h.refused(t.Context(), m, named(h.other(5), "job.guests.example"), "admit.name-in-use")
	h.world.PowerOff(guestID)
	h.ends(t.Context(), stopped, "")
	if err := h.execute(t.Context(), m, named(h.other(6), "job.guests.example")); err != nil {
		t.Errorf("the name is free, and refused: %v", err)
	}
}
