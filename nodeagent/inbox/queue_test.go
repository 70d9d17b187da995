package inbox_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

func launch(sequence uint64, guest string, generation uint64) *api.Command {
	c := command(sequence)
	c.Verb = &api.Command_LaunchGuest{LaunchGuest: &api.LaunchGuest{
		GuestId: guest, Generation: generation, Manifest: []byte("{}"), LaunchDigest: make([]byte, 48),
		Image:   &api.BootImage{FirmwareSha256: make([]byte, 32), KernelSha256: make([]byte, 32), InitrdSha256: make([]byte, 32), Cmdline: "quiet"},
		Machine: &api.Machine{Vcpus: 2, MemoryMib: 512, CpuModel: "EPYC-v4", GuestFeatures: 1, Policy: 0x30000},
		Results: &api.ResultTarget{Uploads: []*api.ResultUpload{{Name: contract.ResultsManifestName, PutUrl: "https://store.example/m"}}},
	}}
	return c
}

func stop(sequence uint64, guest string, generation uint64) *api.Command {
	c := command(sequence)
	c.Verb = &api.Command_StopGuest{StopGuest: &api.StopGuest{GuestId: guest, Generation: generation}}
	return c
}

// runUntilDeath runs the agent and kills it when the executor says so: what is
// on disk stays as it was at that moment.
func (n *node) runUntilDeath(dies func(*api.Command) bool) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(n.t.Context())
	n.executor.execute = func(ctx context.Context, cmd *api.Command) ([]*api.Event, error) {
		if dies(cmd) {
			<-time.After(time.Millisecond) // what runs beside it has begun
			n.journal.FailWith(func(string) error { return errors.New("the process is dead") })
			cancel()
		}
		if cmd.GetRequestEvidence() != nil { // a guest takes its time
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
		return nil, ctx.Err()
	}
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	time.Sleep(time.Minute) //nolint:forbidigo // fake time
	cancel()
	if err := <-done; err != nil {
		n.t.Error(err)
	}
	n.journal.FailWith(nil)
	n.restart()
}

func TestAStopDoesNotWaitBehindLaunches(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		first, last := launch(1, api.NewID(), 1), stop(102, guestID, 1)
		began, release := make(chan struct{}), make(chan struct{})
		n.executor.execute = func(_ context.Context, cmd *api.Command) ([]*api.Event, error) {
			if cmd.GetCommandId() == first.GetCommandId() {
				close(began)
				<-release
			}
			return nil, nil
		}
		n.receive(n.seal(first))
		for s := uint64(2); s <= 101; s++ {
			n.receive(n.seal(launch(s, api.NewID(), 1)))
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		<-began
		n.receive(n.seal(last))
		close(release)
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := n.executor.executed(); len(got) != 102 || got[1] != last.GetCommandId() {
			t.Errorf("%d executed, the stop was number %d", len(got), slices.Index(got, last.GetCommandId())+1)
		}
	})
}

func TestAStopFencesLaunchesByGeneration(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		first, second *api.Command
		between       func(n *node)
		want          []string
	}{
		"behind its launch in one line": {first: launch(1, guestID, 2), second: stop(2, guestID, 2), want: []string{"", inbox.CodeStopped}},
		"before its launch arrives":     {first: stop(2, guestID, 2), second: launch(1, guestID, 2), between: (*node).run, want: []string{"", inbox.CodeStopped}},
		"of an older generation":        {first: stop(1, guestID, 1), second: launch(2, guestID, 2), between: (*node).run, want: []string{"", ""}},
		"of a newer generation":         {first: stop(2, guestID, 3), second: launch(1, guestID, 2), between: (*node).run, want: []string{"", inbox.CodeStopped}},
		"of another guest":              {first: stop(2, api.NewID(), 2), second: launch(1, guestID, 2), between: (*node).run, want: []string{"", ""}},
		"across a restart": {first: stop(2, guestID, 2), second: launch(1, guestID, 2), want: []string{"", inbox.CodeStopped}, between: func(n *node) {
			n.run()
			n.restart()
		}},
		"whose own window is long over": {first: stop(2, guestID, 2), second: launch(1, guestID, 2), want: []string{"", inbox.CodeStopped}, between: func(n *node) {
			n.run()
			time.Sleep(20 * time.Hour) //nolint:forbidigo // fake time
			n.journal.Forget(time.Now().Add(-2 * inbox.DefaultSkew))
			n.restart()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, 1)
				now := time.Now()
				for c, window := range map[*api.Command]time.Duration{tc.first: time.Minute, tc.second: 23 * time.Hour} {
					c.NotBefore.Seconds, c.ExpiresAt.Seconds = now.Unix(), now.Add(window).Unix()
				}
				n.receive(n.seal(tc.first))
				if tc.between != nil {
					tc.between(n)
				}
				n.receive(n.seal(tc.second))
				n.run()
				if got := n.codes(); !slices.Equal(got, tc.want) {
					t.Errorf("outcomes %q, want %q", got, tc.want)
				}
			})
		})
	}
}

// A host whose hypervisor is away may see its agent die and begin again.
func TestDeathsBeforeTheHostIsReadyCountForNoCommand(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		c := command(1)
		n.receive(n.seal(c))
		ready := make(chan struct{})
		for range 5 {
			n.restartWhen(ready)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- n.Run(ctx) }()
			synctest.Wait()
			if pending, err := n.journal.PendingCommands(); err != nil || len(pending) != 1 || pending[0].Begun || pending[0].Deaths > 0 {
				t.Errorf("waiting: %+v, %v", pending, err)
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestACommandThatKillsTheAgentIsQuarantinedAndTheQueueGoesOn(t *testing.T) {
	t.Parallel()
	for name, poison := range map[string]func(uint64) *api.Command{"cordon": command, "challenge": evidence} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, 1)
				bad := poison(5)
				dies := func(c *api.Command) bool { return c.GetCommandId() == bad.GetCommandId() }
				for s := uint64(1); s <= 9; s++ {
					c := command(s)
					if s == 5 {
						c = bad
					} else if s%2 == 0 {
						c = evidence(s)
					}
					n.receive(n.seal(c))
				}
				for range 6 {
					n.runUntilDeath(dies)
				}
				deaths := 0
				for _, id := range n.executor.executed() {
					if id == bad.GetCommandId() {
						deaths++
					}
				}
				if deaths != 3 {
					t.Errorf("the agent died %d times", deaths)
				}
				outcomes := map[string]string{}
				for _, e := range n.events() {
					if _, twice := outcomes[e.GetCommandId()]; twice {
						t.Errorf("command %s has two outcomes", e.GetCommandId())
					}
					outcomes[e.GetCommandId()] = e.GetCommandRefused().GetRefusal().GetCode()
				}
				if len(outcomes) != 9 || outcomes[bad.GetCommandId()] != inbox.CodePoison {
					t.Errorf("outcomes %v", outcomes)
				}
				delete(outcomes, bad.GetCommandId())
				for id, code := range outcomes {
					if code != "" {
						t.Errorf("innocent command %s: %s", id, code)
					}
				}
			})
		})
	}
}

func TestAnOrderlyEndIsNoDeath(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		n.receive(n.seal(command(1)))
		n.executor.execute = func(ctx context.Context, _ *api.Command) ([]*api.Event, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		for range 10 {
			n.run()
			n.restart()
		}
		n.executor.execute = nil
		n.run()
		if got := n.codes(); !slices.Equal(got, []string{""}) {
			t.Errorf("outcomes %q", got)
		}
	})
}

func TestAFloodIsRefusedAndStopsStillPass(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		const most = 16384
		payload, err := proto.Marshal(command(1))
		if err != nil {
			t.Fatal(err)
		}
		for s := uint64(1); s <= most; s++ {
			c := inbox.Command{ID: api.NewID(), Epoch: 1, Sequence: s, ExpiresAt: time.Now().Add(time.Hour), Verb: "cordon", Payload: payload}
			if _, err := n.journal.AddCommand(c); err != nil {
				t.Fatal(err)
			}
		}
		release := make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		n.executor.execute = func(_ context.Context, cmd *api.Command) ([]*api.Event, error) {
			<-release
			if cmd.GetStopGuest() != nil {
				cancel() // draining the rest would show nothing more
			}
			return nil, nil
		}
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		synctest.Wait()
		n.receive(n.seal(command(most + 1)))
		n.receive(n.seal(command(most + 2)))
		last := stop(most+3, guestID, 1)
		n.receive(n.seal(last))
		if got := n.codes(); !slices.Contains(got, inbox.CodeQueueFull) {
			t.Errorf("no refusal: %q", got[max(0, len(got)-3):])
		}
		close(release)
		<-ctx.Done()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := n.executor.executed(); len(got) != 2 || got[1] != last.GetCommandId() {
			t.Errorf("%d executed, the stop was not the second", len(got))
		}
	})
}

// guests is what the agent's guests do with commands, in short.
type guests struct {
	n       *node
	violate func(format string, args ...any)
	started map[string]*api.Command // by guest
	stopped map[string]uint64       // generation, by guest
	effects map[string]int          // by command
	begun   map[string]bool         // commands
}

func (g *guests) execute(cmd *api.Command, again bool) error {
	id, l, s := cmd.GetCommandId(), cmd.GetLaunchGuest(), cmd.GetStopGuest()
	if s != nil {
		g.stopped[s.GetGuestId()] = max(g.stopped[s.GetGuestId()], s.GetGeneration())
		if g.started[s.GetGuestId()] == nil {
			return contract.Refuse("guest.not-found", "x", "no guest")
		}
		return nil
	}
	pending, err := g.n.journal.PendingCommands()
	if err != nil {
		return err
	}
	for _, c := range pending {
		if c.IsStop() && !again {
			g.violate("launch %s began while stop %s waited", id, c.ID)
		}
	}
	switch old := g.started[l.GetGuestId()]; {
	case old.GetCommandId() == id && old != nil:
		return nil
	case old != nil:
		return contract.Refuse("launch.guest-id-used", "x", "used")
	}
	if stopped := g.stopped[l.GetGuestId()]; stopped >= l.GetGeneration() {
		g.violate("launch %s of generation %d began after a stop of %d", id, l.GetGeneration(), stopped)
	}
	g.started[l.GetGuestId()] = cmd
	g.effects[id]++
	return nil
}

// A random life of a node: commands come in any order and again, the agent
// dies and restarts at any step. Seeded, so that a failure can be looked at.
func TestConflictingCommandsInAnyOrderAndThroughAnyDeath(t *testing.T) {
	t.Parallel()
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { randomLife(t, rand.New(rand.NewPCG(seed, 0))) })
		})
	}
}

func randomLife(t *testing.T, random *rand.Rand) {
	t.Helper()
	n := newNode(t, 1)
	g := &guests{
		n: n, violate: t.Errorf, started: map[string]*api.Command{}, stopped: map[string]uint64{}, effects: map[string]int{}, begun: map[string]bool{},
	}
	ids := []string{api.NewID(), api.NewID(), api.NewID()}
	deaths := map[string]int{}
	var issued [][]byte
	var commands []*api.Command
	live := func(mayDie bool) {
		ctx, cancel := context.WithCancel(t.Context())
		n.executor.execute = func(_ context.Context, cmd *api.Command) ([]*api.Event, error) {
			again := g.begun[cmd.GetCommandId()]
			g.begun[cmd.GetCommandId()] = true
			fate := random.IntN(10)
			if deaths[cmd.GetCommandId()] == 2 || !mayDie {
				fate = 9
			}
			die := func() {
				deaths[cmd.GetCommandId()]++
				n.journal.FailWith(func(string) error { return errors.New("the process is dead") })
				cancel()
			}
			if fate == 0 { // before its effect
				die()
				return nil, context.Canceled
			}
			err := g.execute(cmd, again)
			switch fate {
			case 1: // after its effect
				die()
			case 2: // an orderly end
				cancel()
			}
			return nil, err
		}
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		n.journal.FailWith(nil)
		n.restart()
	}
	for range 40 {
		for range random.IntN(5) {
			guest, generation := ids[random.IntN(len(ids))], 1+random.Uint64N(3)
			verb := launch
			if random.IntN(2) == 0 {
				verb = stop
			}
			c := verb(uint64(len(commands)+1), guest, generation)
			commands = append(commands, c)
			issued = append(issued, n.seal(c))
		}
		for range random.IntN(6) {
			if len(issued) > 0 {
				n.receive(issued[random.IntN(len(issued))])
			}
		}
		if random.IntN(2) == 0 {
			live(true)
		}
	}
	for _, raw := range issued {
		n.receive(raw)
	}
	for range 5 {
		live(false)
	}
	outcomes := map[string]int{}
	for _, e := range n.events() {
		outcomes[e.GetCommandId()]++
		if e.GetCommandRefused().GetRefusal().GetCode() == inbox.CodeStopped && g.effects[e.GetCommandId()] > 0 {
			t.Errorf("launch %s is called stopped before it began, and began", e.GetCommandId())
		}
	}
	for _, c := range commands {
		if outcomes[c.GetCommandId()] != 1 || g.effects[c.GetCommandId()] > 1 {
			t.Errorf("command %d: %d outcomes, %d effects", c.GetSequence(), outcomes[c.GetCommandId()], g.effects[c.GetCommandId()])
		}
	}
}
