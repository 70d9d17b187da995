package inbox_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/inbox/inboxtest"
)

const (
	host    = "node-a"
	guestID = "0b9c1a5e-7d33-4f53-8f0e-2f6f3c1f9a10"
)

// recorder is an executor that remembers.
type recorder struct {
	mu      sync.Mutex
	seen    []string // sequence order
	execute func(ctx context.Context, cmd *api.Command) ([]*api.Event, error)
}

func (r *recorder) Execute(ctx context.Context, cmd *api.Command) ([]*api.Event, error) {
	r.mu.Lock()
	r.seen = append(r.seen, cmd.GetCommandId())
	f := r.execute
	r.mu.Unlock()
	if f == nil {
		return nil, nil
	}
	return f(ctx, cmd)
}

func (r *recorder) executed() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen)
}

// node is an inbox in a bubble of fake time.
type node struct {
	*inbox.Inbox
	t        *testing.T
	journal  *inboxtest.Journal
	executor *recorder
	key      ed25519.PrivateKey
	clock    func() clock.Instant
	doubt    func() *contract.Refusal
}

func newNode(t *testing.T, epoch uint64) *node {
	t.Helper()
	n := &node{
		t: t, journal: inboxtest.New(7), executor: &recorder{},
		key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)), clock: clocktest.Wall,
	}
	if epoch > 0 {
		if err := n.journal.BeginEpoch(epoch, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	n.restart()
	return n
}

// restart makes a new inbox over the same journal.
func (n *node) restart() { n.t.Helper(); n.restartWhen(nil) }

// restartWhen is restart with an executor that is not ready yet.
func (n *node) restartWhen(ready <-chan struct{}) {
	n.t.Helper()
	var err error
	n.Inbox, err = inbox.New(inbox.Deps{
		Journal: n.journal, Executor: n.executor, Ready: ready, Keys: []ed25519.PublicKey{ed25519.PublicKey(n.key[32:])},
		HostID: host, Features: []string{"a.b"}, Logger: hclog.NewNullLogger(), Clock: n.clock, Doubt: n.doubt,
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// command is a valid Cordon of epoch 1.
func command(sequence uint64) *api.Command {
	now := time.Now()
	return &api.Command{
		CommandId: api.NewID(), Audience: host, IssuerEpoch: 1, Sequence: sequence,
		NotBefore: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(time.Hour)),
		Verb: &api.Command_Cordon{Cordon: &api.Cordon{}},
	}
}

func beginEpoch(epoch uint64, store byte) *api.Command {
	c := command(1)
	c.IssuerEpoch = epoch
	c.Verb = &api.Command_BeginEpoch{BeginEpoch: &api.BeginEpoch{Epoch: epoch, StoreId: append([]byte{store}, make([]byte, 15)...)}}
	return c
}

func evidence(sequence uint64) *api.Command {
	c := command(sequence)
	c.Verb = &api.Command_RequestEvidence{RequestEvidence: &api.RequestEvidence{GuestId: guestID, Nonce: make([]byte, 16)}}
	return c
}

func (n *node) seal(cmd *api.Command) []byte {
	n.t.Helper()
	raw, err := api.SealUnchecked(cmd, n.key)
	if err != nil {
		n.t.Fatal(err)
	}
	return raw
}

func (n *node) receive(raw []byte) {
	n.t.Helper()
	if err := n.Receive(n.t.Context(), raw); err != nil {
		n.t.Fatal(err)
	}
}

// run runs the inbox until nothing moves any more, and stops it.
func (n *node) run() {
	n.t.Helper()
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	synctest.Wait()
	cancel()
	if err := <-done; err != nil {
		n.t.Error(err)
	}
}

func (n *node) events() []*api.Event {
	n.t.Helper()
	events, err := n.journal.NextEvents(10000)
	if err != nil {
		n.t.Fatal(err)
	}
	return events
}

// codes are the refusals in the outbox; "" for any other event.
func (n *node) codes() []string {
	n.t.Helper()
	var out []string
	for _, e := range n.events() {
		out = append(out, e.GetCommandRefused().GetRefusal().GetCode())
	}
	return out
}

func TestAValidCommandIsExecutedOnceAndReported(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		cmd := command(1)
		raw := n.seal(cmd)
		n.receive(raw)
		if len(n.executor.executed()) != 0 {
			t.Error("executed while receiving")
		}
		n.receive(raw)
		n.run()
		n.receive(raw) // the acknowledgement was lost
		n.restart()
		n.receive(raw)
		n.run()
		if got := n.executor.executed(); len(got) != 1 || got[0] != cmd.GetCommandId() {
			t.Errorf("executed %v", got)
		}
		events := n.events()
		if len(events) != 1 || events[0].GetCommandDone() == nil || events[0].GetCommandId() != cmd.GetCommandId() || events[0].GetHostId() != host {
			t.Errorf("events %v", events)
		}
	})
}

func TestCommandsThatMustNotTakeEffectAreRefusedWithTheirCode(t *testing.T) {
	t.Parallel()
	at := func(c *api.Command, from, to time.Duration) {
		now := time.Now()
		c.NotBefore, c.ExpiresAt = timestamppb.New(now.Add(from)), timestamppb.New(now.Add(to))
	}
	unknown := protowire.AppendVarint(protowire.AppendTag(nil, 900, protowire.VarintType), 1)
	for name, tc := range map[string]struct {
		code string
		edit func(c *api.Command)
	}{
		"another host":            {api.CodeWrongAudience, func(c *api.Command) { c.Audience = "node-b" }},
		"newer protocol":          {api.CodeCapabilityTooLow, func(c *api.Command) { c.MinCapability = 99 }},
		"unknown field":           {api.CodeUnknownField, func(c *api.Command) { c.ProtoReflect().SetUnknown(unknown) }},
		"no verb":                 {api.CodeMalformed, func(c *api.Command) { c.Verb = nil }},
		"long window":             {api.CodeWindowTooLong, func(c *api.Command) { at(c, 0, 24*time.Hour+time.Second) }},
		"future beyond skew":      {api.CodeNotYetValid, func(c *api.Command) { at(c, 2*time.Minute+time.Second, time.Hour) }},
		"past beyond skew":        {api.CodeExpired, func(c *api.Command) { at(c, -time.Hour, -2*time.Minute-time.Second) }},
		"newer epoch":             {api.CodeEpochUnknown, func(c *api.Command) { c.IssuerEpoch = 3 }},
		"older epoch":             {api.CodeEpochStale, func(c *api.Command) { c.IssuerEpoch = 1 }},
		"begin for another store": {api.CodeStoreMismatch, func(c *api.Command) { c.IssuerEpoch, c.Verb = 3, beginEpoch(3, 8).GetVerb() }},
		"begin an old epoch":      {api.CodeEpochStale, func(c *api.Command) { c.IssuerEpoch, c.Verb = 1, beginEpoch(1, 7).GetVerb() }},
		"feature we lack":         {api.CodeFeatureUnknown, func(c *api.Command) { c.RequiredFeatures = []string{"a.b", "compliance.hipaa"} }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, 2)
				cmd := command(1)
				cmd.IssuerEpoch = 2
				tc.edit(cmd)
				raw := n.seal(cmd)
				n.receive(raw)
				n.receive(raw) // repeated by the transport: one report is enough
				n.run()
				if got := n.codes(); len(got) != 1 || got[0] != tc.code {
					t.Fatalf("refusals %v, want %s", got, tc.code)
				}
				e := n.events()[0]
				if e.GetCommandId() != cmd.GetCommandId() || len(e.GetCommandRefused().GetEnvelopeSha256()) != 64 ||
					e.GetCommandRefused().GetRefusal().GetRemedy() == "" {
					t.Errorf("event %v", e)
				}
				if got := n.executor.executed(); len(got) != 0 {
					t.Errorf("executed %v", got)
				}
			})
		})
	}
}

func TestWindowsTolerateTwoMinutesOfSkew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		early, late := command(1), command(2)
		early.NotBefore = timestamppb.New(time.Now().Add(2 * time.Minute))
		late.NotBefore, late.ExpiresAt = timestamppb.New(time.Now().Add(-time.Hour)), timestamppb.New(time.Now().Add(-2*time.Minute))
		n.receive(n.seal(early))
		n.receive(n.seal(late))
		n.run()
		if len(n.executor.executed()) != 2 {
			t.Errorf("outbox %v", n.events())
		}
	})
}

func TestBytesOfNobodyAreRefusedWithoutBelievingAnything(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		forged, err := api.SealCommand(command(1), ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32)))
		if err != nil {
			t.Fatal(err)
		}
		n.receive(forged)
		n.receive([]byte("hello"))
		n.receive(make([]byte, api.MaxCommandBytes+1))
		n.receive(nil)
		want := []string{api.CodeForged, api.CodeMalformed, api.CodeOversize, api.CodeMalformed}
		if got := n.codes(); !slices.Equal(got, want) {
			t.Errorf("refusals %v, want %v", got, want)
		}
		for _, e := range n.events() {
			if e.GetCommandId() != "" {
				t.Errorf("a forged id was believed: %v", e)
			}
		}
	})
}

func TestAFloodOfForgeriesDoesNotFillTheOutbox(t *testing.T) {
	t.Parallel()
	n := newNode(t, 1)
	for i := range 5000 {
		n.receive([]byte{byte(i), byte(i >> 8)})
	}
	if got, err := n.journal.OutboxLen(); err != nil || got != 4096 {
		t.Errorf("outbox has %d, %v", got, err)
	}
	n.receive(n.seal(command(1)))
	if got, err := n.journal.PendingCommands(); err != nil || len(got) != 1 {
		t.Errorf("an honest command was not accepted: %v, %v", got, err)
	}
}

func TestANewStoreRefusesEverythingUntilItsEpochBegins(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 0)
		n.receive(n.seal(command(2)))
		begin := beginEpoch(1, 7)
		raw := n.seal(begin)
		n.receive(raw)
		n.receive(raw)
		after := command(2)
		n.receive(n.seal(after))
		n.run()
		if got := n.executor.executed(); len(got) != 1 || got[0] != after.GetCommandId() {
			t.Errorf("executed %v", got)
		}
		if got := n.codes(); !slices.Equal(got, []string{api.CodeEpochUnknown, "", ""}) {
			t.Errorf("refusals %v", got)
		}
		if e := n.events()[1]; e.GetCommandDone() == nil || e.GetCommandId() != begin.GetCommandId() {
			t.Errorf("the epoch's outcome is %v", e)
		}
	})
}

func TestACrashBetweenEpochAndCommandIsHealedByRedelivery(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 0)
		raw := n.seal(beginEpoch(4, 7))
		n.journal.FailWith(func(op string) error {
			if op == "AddCommand" {
				return errors.New("disk full")
			}
			return nil
		})
		if err := n.Receive(t.Context(), raw); err == nil {
			t.Fatal("acknowledged without being stored")
		}
		n.journal.FailWith(nil)
		n.restart()
		n.receive(raw)
		n.run()
		if e := n.events(); len(e) != 1 || e[0].GetCommandDone() == nil {
			t.Errorf("events %v", e)
		}
		if epoch, err := n.journal.Epoch(); err != nil || epoch.Number != 4 {
			t.Errorf("epoch %v, %v", epoch, err)
		}
	})
}

func TestReplaysBelowTheFloorAreRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		old := command(5)
		n.receive(n.seal(old))
		n.run()
		n.journal.Forget(time.Now().Add(2 * time.Hour))
		// Signed long ago with a long window, never delivered, overtaken.
		overtaken := command(5)
		n.receive(n.seal(overtaken))
		n.receive(n.seal(command(6)))
		n.run()
		if got := n.codes(); !slices.Equal(got, []string{"", api.CodeReplayed, ""}) {
			t.Errorf("refusals %v", got)
		}
		if got := n.executor.executed(); len(got) != 2 || got[0] != old.GetCommandId() {
			t.Errorf("executed %v", got)
		}
	})
}

func TestAKnownCommandIsAcknowledgedEvenAfterItsExpiry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		raw := n.seal(command(1))
		n.receive(raw)
		n.run()
		time.Sleep(3 * time.Hour) //nolint:forbidigo // fake time
		n.receive(raw)
		if got := n.codes(); !slices.Equal(got, []string{""}) {
			t.Errorf("a carried out command was refused: %v", got)
		}
	})
}

func TestARefusedCommandNeverTakesEffectLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		cmd := command(1)
		cmd.NotBefore, cmd.ExpiresAt = timestamppb.New(time.Now().Add(time.Hour)), timestamppb.New(time.Now().Add(3*time.Hour))
		raw := n.seal(cmd)
		n.receive(raw)
		time.Sleep(2 * time.Hour) //nolint:forbidigo // fake time
		n.restart()               // the memory of refusals is gone
		n.receive(raw)
		n.run()
		if got := n.executor.executed(); len(got) != 0 {
			t.Errorf("executed %v after it was refused", got)
		}
		if got := n.codes(); !slices.Equal(got, []string{api.CodeNotYetValid}) {
			t.Errorf("refusals %v", got)
		}
	})
}

func TestNothingIsAcknowledgedThatIsNotStored(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"Epoch", "KnownCommand", "AddCommand", "AppendEvents", "OutboxLen"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, 1)
				good := n.seal(command(1))
				old := command(2)
				old.IssuerEpoch = 9
				messages := [][]byte{good, n.seal(old), []byte("hello")}
				n.journal.FailWith(func(o string) error {
					if o == op {
						return errors.New("disk full")
					}
					return nil
				})
				failed := 0
				for _, raw := range messages {
					if n.Receive(t.Context(), raw) != nil {
						failed++
					}
				}
				if failed == 0 {
					t.Error("nothing failed")
				}
				n.journal.FailWith(nil)
				for _, raw := range messages {
					n.receive(raw)
				}
				n.run()
				got := n.codes()
				slices.Sort(got)
				if !slices.Equal(got, []string{"", api.CodeEpochUnknown, api.CodeMalformed}) {
					t.Errorf("after redelivery: %v", got)
				}
			})
		})
	}
}

func TestMessagesAreNotJudgedAfterTheEnd(t *testing.T) {
	t.Parallel()
	n := newNode(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Receive(ctx, n.seal(command(1))); err == nil {
		t.Error("acknowledged")
	}
}

func TestEveryMissingFeatureIsNamed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 2)
		cmd := command(1)
		cmd.IssuerEpoch, cmd.RequiredFeatures = 2, []string{"compliance.hipaa", "a.b", "audit.log"}
		n.receive(n.seal(cmd))
		n.run()
		text := n.events()[0].GetCommandRefused().GetRefusal().GetMessage()
		if !strings.Contains(text, "compliance.hipaa") || !strings.Contains(text, "audit.log") || strings.Contains(text, "a.b") {
			t.Errorf("refused with %q", text)
		}
	})
}
