package inbox_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

func TestPendingCommandsRunInTheOrderOfTheirSequence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		var want []string
		commands := map[uint64]*api.Command{}
		for s := uint64(1); s <= 20; s++ {
			commands[s] = command(s)
			want = append(want, commands[s].GetCommandId())
		}
		for _, c := range commands { // random order
			n.receive(n.seal(c))
		}
		n.run()
		if got := n.executor.executed(); !slices.Equal(got, want) {
			t.Errorf("order %v, want %v", got, want)
		}
	})
}

func TestOutcomesCarryTheirCommand(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		events []*api.Event
		err    error
		want   []string // kind, or code of a refusal
	}{
		"nothing to say": {nil, nil, []string{api.KindCommandDone}},
		"an event":       {[]*api.Event{api.NewGuestState(host, "", time.Now(), &api.GuestState{})}, nil, []string{api.KindGuestState}},
		"a refusal":      {nil, contract.Refuse("admit.memory", "less", "too much"), []string{"admit.memory"}},
		"a bare error":   {nil, errors.New("secret detail"), []string{"internal"}},
		"both": {
			[]*api.Event{api.NewGuestState(host, "", time.Now(), &api.GuestState{})},
			contract.Refuse("x.y", "z", "no"),
			[]string{api.KindGuestState, "x.y"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, 1)
				n.executor.execute = func(context.Context, *api.Command) ([]*api.Event, error) { return tc.events, tc.err }
				cmd := command(1)
				n.receive(n.seal(cmd))
				n.run()
				var got []string
				for _, e := range n.events() {
					if e.GetCommandId() != cmd.GetCommandId() || strings.Contains(e.String(), "secret") {
						t.Errorf("event %v", e)
					}
					if r := e.GetCommandRefused(); r != nil {
						got = append(got, r.GetRefusal().GetCode())
						continue
					}
					got = append(got, api.EventKind(e))
				}
				if !slices.Equal(got, tc.want) {
					t.Errorf("outcome %v, want %v", got, tc.want)
				}
			})
		})
	}
}

func TestAPanickingVerbIsRefusedAndTheNextOneRuns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		first := true
		n.executor.execute = func(context.Context, *api.Command) ([]*api.Event, error) {
			if first {
				first = false
				panic("oops")
			}
			return nil, nil
		}
		n.receive(n.seal(command(1)))
		n.receive(n.seal(command(2)))
		n.run()
		if got := n.codes(); !slices.Equal(got, []string{"internal", ""}) {
			t.Errorf("outcomes %v", got)
		}
	})
}

func TestACommandInterruptedByTheAgentsEndIsExecutedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		n.executor.execute = func(ctx context.Context, _ *api.Command) ([]*api.Event, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		n.receive(n.seal(command(1)))
		n.receive(n.seal(evidence(2)))
		n.run()
		if got := n.events(); len(got) != 0 {
			t.Fatalf("an interruption was reported as an outcome: %v", got)
		}
		n.executor.execute = nil
		n.restart()
		n.run()
		if got := n.codes(); !slices.Equal(got, []string{"", ""}) {
			t.Errorf("outcomes %v", got)
		}
	})
}

func TestAnOutcomeThatCannotBeRecordedIsKeptAndNotDoneAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		full := time.Now().Add(10 * time.Minute)
		n.journal.FailWith(func(op string) error {
			if op == "FinishCommand" && time.Now().Before(full) {
				return errors.New("disk full")
			}
			return nil
		})
		n.receive(n.seal(command(1)))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		time.Sleep(11 * time.Minute) //nolint:forbidigo // fake time
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(n.executor.executed()) != 1 || len(n.events()) != 1 {
			t.Errorf("executed %v, reported %v", n.executor.executed(), n.events())
		}
	})
}

func TestChallengesRunBesideTheRestAndAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		release := make(chan struct{})
		var running, most atomic.Int32
		n.executor.execute = func(ctx context.Context, cmd *api.Command) ([]*api.Event, error) {
			if cmd.GetRequestEvidence() == nil {
				return nil, nil
			}
			most.Store(max(most.Load(), running.Add(1)))
			defer running.Add(-1)
			select {
			case <-release:
				return nil, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		for s := uint64(1); s <= 40; s++ {
			n.receive(n.seal(evidence(s)))
		}
		n.receive(n.seal(command(41)))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		synctest.Wait()
		if running.Load() != 16 || len(n.events()) != 1 {
			t.Errorf("%d challenges, %d outcomes", running.Load(), len(n.events()))
		}
		close(release)
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if most.Load() != 16 || len(n.events()) != 41 || len(n.executor.executed()) != 41 {
			t.Errorf("at most %d at a time, %d outcomes of %d executions", most.Load(), len(n.events()), len(n.executor.executed()))
		}
	})
}

func TestAChallengeNobodyAnswersTimesOutTyped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		n.executor.execute = func(ctx context.Context, _ *api.Command) ([]*api.Event, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		n.receive(n.seal(evidence(1)))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		time.Sleep(time.Hour) //nolint:forbidigo // fake time
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := n.codes(); !slices.Equal(got, []string{inbox.CodeTimeout}) {
			t.Errorf("outcomes %v", got)
		}
	})
}

func TestALaunchIsNotStartedLongAfterItsExpiry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		challenge, cordon := evidence(1), command(2)
		n.receive(n.seal(challenge))
		n.receive(n.seal(cordon))
		time.Sleep(48 * time.Hour) //nolint:forbidigo // the agent is down, in fake time
		n.restart()
		n.run()
		if got := n.executor.executed(); !slices.Equal(got, []string{cordon.GetCommandId()}) {
			t.Errorf("executed %v", got)
		}
		got := n.codes()
		slices.Sort(got)
		if !slices.Equal(got, []string{"", api.CodeExpired}) {
			t.Errorf("outcomes %v", got)
		}
	})
}

func TestAStoredCommandThatCannotBeReadIsReported(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		_, err := n.journal.AddCommand(inbox.Command{
			ID: api.NewID(), Epoch: 1, Sequence: 1, ExpiresAt: timestamppb.Now().AsTime(), Payload: []byte{0xff},
		})
		if err != nil {
			t.Fatal(err)
		}
		n.run()
		if got := n.codes(); !slices.Equal(got, []string{api.CodeMalformed}) {
			t.Errorf("outcomes %v", got)
		}
	})
}

func TestABrokenStoreEndsRun(t *testing.T) {
	t.Parallel()
	n := newNode(t, 1)
	n.journal.FailWith(func(string) error { return errors.New("bad page") })
	if err := n.Run(t.Context()); err == nil {
		t.Error("went on")
	}
}
