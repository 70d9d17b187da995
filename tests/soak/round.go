//go:build emulated

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/tests/fault"
	"github.com/confidential-node/agent/tests/trial"
)

// endTimeout bounds a round's end: the promised recovery, and a restart of
// everything on a busy machine.
const endTimeout = fault.Recovery + time.Minute

// soak is one run.
type soak struct {
	*fault.Field
	random *rand.Rand
	begun  time.Time

	mu    sync.Mutex // guards steps
	steps []string

	rounds, launches, stops int
	// remedied is how often the operator's part was needed: libvirtd held on
	// to a guest and the agent said to restart it.
	remedied int
	kinds    map[string]int
	samples  []sample
	fresh    int // goroutines of an agent that had no guest
}

func (s *soak) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = append(s.steps, fmt.Sprintf("%8.1f  %d  ", time.Since(s.begun).Seconds(), s.rounds)+fmt.Sprintf(format, args...))
}

// kind is one way to break a round.
type kind struct {
	name string
	// before changes the launch or arms a point, during happens at a random
	// time after it was sent.
	before func(*soak, *fault.Order) error
	during func(*soak, context.Context) error
	// code is how the launch must be refused; empty allows any end.
	code string
	// refusal is how it may be refused at once, when what happens came first.
	refusal string
}

func kinds() []kind {
	return []kind{
		{name: "nothing"},
		{name: "agent dies at a point", before: (*soak).armPoint},
		{name: "agent SIGKILL", during: func(s *soak, _ context.Context) error { s.Host.Agent().Kill(); return nil }},
		{name: "agent SIGTERM", during: func(s *soak, _ context.Context) error { return s.Host.Agent().Stop() }},
		{name: "libvirtd killed", refusal: "admit.hypervisor-silent", during: func(s *soak, ctx context.Context) error {
			return errors.Join(s.Host.KillLibvirtd(), s.Host.StartLibvirtd(ctx))
		}},
		{name: "QEMU killed", during: func(s *soak, ctx context.Context) error {
			return s.onHost(ctx, "kill -9 $(cat /run/libvirt/qemu/nodeagent-*.pid 2>/dev/null) 2>/dev/null || true")
		}},
		{name: "link down", during: (*soak).linkDown},
		{name: "control plane restarted", during: func(s *soak, ctx context.Context) error { return s.RestartControl(ctx) }},
		{name: "nft flushed", during: func(s *soak, ctx context.Context) error { return s.onHost(ctx, "nft flush ruleset") }},
		{name: "wrong digest", code: "launch.digest-mismatch", before: func(_ *soak, o *fault.Order) error { o.LaunchDigest = flipped(o.LaunchDigest); return nil }},
		{name: "corrupted blob", code: "blob.digest-mismatch", before: func(s *soak, o *fault.Order) error { s.Corrupt(o); return nil }},
	}
}

func flipped(digest []byte) []byte {
	digest = slices.Clone(digest)
	digest[0] ^= 1
	return digest
}

func (s *soak) armPoint(*fault.Order) error {
	points := lifecycle.Points()
	point := points[s.random.IntN(len(points))]
	s.note("armed %s", point)
	return s.SetFaults(point + "=kill")
}

func (s *soak) linkDown(ctx context.Context) error {
	down := s.upTo(4 * time.Second)
	s.note("link down for %v", down)
	return exec.CommandContext(ctx, "bash", "-c", fmt.Sprintf("ip link set host0 down; sleep %f; ip link set host0 up", down.Seconds())).Run()
}

func (s *soak) onHost(ctx context.Context, script string) error {
	_, err := s.Host.Output(ctx, "bash", "-c", script)
	return err
}

func (s *soak) upTo(d time.Duration) time.Duration { return time.Duration(s.random.Int64N(int64(d))) }

// pause waits while the guests go on.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// round launches, breaks, repairs, and looks.
func (s *soak) round(ctx context.Context) error {
	s.rounds++
	all := kinds()
	k := all[s.random.IntN(len(all))]
	s.kinds[k.name]++
	orders := make([]*fault.Order, 1+s.random.IntN(2))
	for i := range orders {
		o, err := s.Order()
		if err != nil {
			return err
		}
		if k.before != nil && i == 0 {
			if err := k.before(s, o); err != nil {
				return err
			}
		}
		if err := s.Send(ctx, o); err != nil {
			return err
		}
		s.launches++
		s.note("%s: guest %s launched", k.name, o.GetGuestId())
		orders[i] = o
	}
	pause(ctx, s.upTo(6*time.Second))
	if k.during != nil {
		s.note("%s", k.name)
		if err := k.during(s, ctx); err != nil {
			return err
		}
	}
	pause(ctx, s.upTo(3*time.Second))
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	if err := s.settle(ctx, k, orders); err != nil {
		return err
	}
	// The agent may die of its last point, and only now.
	if err := errors.Join(s.SetFaults(), s.revive(ctx)); err != nil {
		return err
	}
	return s.measure(ctx, k)
}

// settle ends every guest and looks whether all is as it should be.
func (s *soak) settle(ctx context.Context, k kind, orders []*fault.Order) error {
	if err := s.revive(ctx); err != nil {
		return err
	}
	for _, o := range orders {
		if _, err := s.API.Stop(ctx, o.GetGuestId(), time.Second); err != nil {
			return fmt.Errorf("stopping guest: %w", err)
		}
		s.stops++
		s.note("guest %s stopped", o.GetGuestId())
	}
	// A point of the teardown is only come to now.
	alive, cancel := context.WithCancel(ctx)
	revived := make(chan error, 1)
	go func() { revived <- s.keepAlive(alive) }()
	err := s.ends(ctx, k, orders)
	cancel()
	return errors.Join(err, <-revived)
}

// keepAlive starts the agent whenever it died, without its fault, and does
// what the agent asks of the operator.
func (s *soak) keepAlive(ctx context.Context) error {
	tick, look := time.NewTicker(100*time.Millisecond), time.NewTicker(5*time.Second)
	defer tick.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			if err := s.remedy(ctx); err != nil {
				return err
			}
		case <-tick.C:
		}
		if !s.Host.Agent().Running() {
			if err := s.revive(context.WithoutCancel(ctx)); err != nil {
				return err
			}
		}
	}
}

// remedy restarts libvirtd when the agent says that it is stuck.
func (s *soak) remedy(ctx context.Context) error {
	status, err := s.Host.Status(ctx)
	if err != nil {
		return nil //nolint:nilerr // an agent that is down is started again by keepAlive
	}
	at := slices.IndexFunc(status.Warnings, func(w string) bool { return strings.Contains(w, "vm.hypervisor-stuck") })
	if at < 0 {
		return nil
	}
	s.note("libvirtd is stuck and is restarted, as the agent says: %s", status.Warnings[at])
	s.remedied++
	err = s.Host.KillLibvirtd()
	if _, rest, ok := strings.Cut(status.Warnings[at], "remove "); ok {
		state, _, _ := strings.Cut(rest, ",")
		err = errors.Join(err, os.Remove(s.Host.Path(state)))
	}
	return errors.Join(err, s.Host.StartLibvirtd(context.WithoutCancel(ctx)))
}

func (s *soak) ends(ctx context.Context, k kind, orders []*fault.Order) error {
	look := make([]func(context.Context, string) error, len(orders))
	for i, o := range orders {
		g, err := s.Ended(ctx, o.GetGuestId())
		if err != nil {
			return fmt.Errorf("guest %s has not ended: %w", o.GetGuestId(), err)
		}
		// Each guest is stopped, and a stop may overtake its launch.
		if g.Refusal != nil && (g.Refusal.Code == k.refusal || g.Refusal.Code == "launch.stopped") {
			s.note("the launch of guest %s was refused: %s", o.GetGuestId(), g.Refusal.Code)
			look[i] = s.Never
			continue
		}
		if g.Refusal != nil {
			return fmt.Errorf("the launch of guest %s was refused: %w", o.GetGuestId(), g.Refusal)
		}
		look[i] = s.Once
		state, err := g.GuestState()
		if err != nil {
			return err
		}
		got := state.GetRefusal().GetCode()
		s.note("guest %s ended as %s %s", o.GetGuestId(), state.GetStatus(), got)
		stopped := state.GetStatus() == api.GuestStatus_GUEST_STATUS_STOPPED
		if k.code != "" && i == 0 && got != k.code && !stopped {
			return fmt.Errorf("guest %s ended with %q, want %q", o.GetGuestId(), got, k.code)
		}
	}
	if err := s.Clean(ctx); err != nil {
		return err
	}
	for i, o := range orders {
		if err := look[i](ctx, o.GetGuestId()); err != nil {
			return err
		}
	}
	return nil
}

// revive starts the agent when a round killed it.
func (s *soak) revive(ctx context.Context) error {
	if s.Host.Agent().Running() {
		return nil
	}
	s.note("agent started")
	if err := s.SetFaults(); err != nil {
		return err
	}
	return s.StartAgent(ctx)
}

// goroutines makes the agent die with its stacks, and compares their number
// with a fresh one's.
func (s *soak) goroutines(ctx context.Context) error {
	used, err := s.dump(ctx)
	if err != nil {
		return err
	}
	if err := s.StartAgent(ctx); err != nil {
		return err
	}
	if s.fresh, err = s.dump(ctx); err != nil {
		return err
	}
	fmt.Fprintf(os.Stdout, "goroutines: %d after the last round, %d in a fresh agent\n", used, s.fresh)
	// Connections of link and object store come and go.
	if used > s.fresh+8 {
		return fmt.Errorf("the agent has %d goroutines, a fresh one %d", used, s.fresh)
	}
	return s.StartAgent(ctx)
}

func (s *soak) dump(ctx context.Context) (int, error) {
	agent := s.Host.Agent()
	if err := agent.Signal(syscall.SIGQUIT); err != nil {
		return 0, err
	}
	if err := trial.Await(ctx, "the agent's last words", func() (bool, error) { return !agent.Running(), nil }); err != nil {
		return 0, err
	}
	return countGoroutines(agent.Log)
}
