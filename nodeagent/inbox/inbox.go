// Package inbox decides which commands a node carries out, and carries each
// out at most once: it verifies an envelope, checks audience, window, epoch,
// replay and features in that order, stores what it accepts before the
// transport may acknowledge it, answers the rest with a typed refusal in the
// outbox, and executes what is stored.
//
// It owns no connection and knows no guest: verbs are the Executor's. It never
// trusts the transport, which may lose, repeat, reorder or invent messages.
//
// Receive and Run may be called concurrently; each is called by one goroutine
// at a time. Commands are executed one after another in the order of their
// sequence, with two exceptions: StopGuest goes before everything that has not
// begun, so that it never waits behind a line of launches, and RequestEvidence,
// which waits for guests, runs beside the rest, at most 16 at a time.
//
// A stop is a fence: a launch of the same guest, of its generation or an older
// one, that has not begun when the stop is carried out never begins, in
// whichever order the two arrive. A command during which the agent died
// maxDeaths times is refused as poison, and the queue goes on.
package inbox

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
)

const (
	// DefaultSkew is the difference between the issuer's clock and the
	// host's that windows tolerate at both ends.
	DefaultSkew = 2 * time.Minute
	// maxUnsigned bounds the outbox for refusals of bytes nobody signed:
	// whoever can write to the stream must not fill the disk with them.
	maxUnsigned = 4096
	// maxWaiting commands are stored and not carried out. A waiting one costs
	// about 200 bytes of memory; its payload is on disk.
	maxWaiting = 16384
	// maxRemembered refused envelopes are not refused again in public.
	maxRemembered = 1024
)

// Log keys.
const (
	keyCommand = "command_id"
	keyVerb    = "verb"
	keyCode    = "code"
	keyRemedy  = "remedy"
	keyError   = "err"
)

// Executor carries out accepted commands. It must be idempotent: after a crash
// a command that was being executed is executed again.
type Executor interface {
	// Execute returns the events that report the outcome; none means a
	// CommandDone. An error refuses the command: a *contract.Refusal as it
	// is, anything else as an internal error. BeginEpoch never gets here.
	Execute(ctx context.Context, cmd *api.Command) ([]*api.Event, error)
}

// Deps are what an Inbox is made of.
type Deps struct {
	Journal  Journal
	Executor Executor
	// Ready, unless nil, is closed when the executor can take commands. A death
	// while it cannot is no command's.
	Ready <-chan struct{}
	// Keys are the issuers whose commands are believed.
	Keys   []ed25519.PublicKey
	HostID string
	// Features the node has; see api.Features.
	Features []string
	// Clock is the agent's time: (*clock.Clock).Now.
	Clock func() clock.Instant
	// Doubt, unless nil, says why nothing may be launched by that time.
	Doubt func() *contract.Refusal
	// Skew is DefaultSkew when 0.
	Skew   time.Duration
	Logger hclog.Logger
}

// Inbox is the way of commands into the node.
type Inbox struct {
	d    Deps
	wake chan struct{}

	queue  queue
	fences fences // Run only

	mu      sync.Mutex // serialises Receive's check-then-store; guards below
	refused map[[sha256.Size]byte]bool
	order   [][sha256.Size]byte // of refused, oldest first
	// doubted are commands that the journal could not store, and has all the
	// same: a disk may fail at the very last sync of a change.
	doubted map[string]bool
}

// New makes an inbox. Nothing happens before Receive or Run.
func New(d Deps) (*Inbox, error) {
	if d.Journal == nil || d.Executor == nil || d.Logger == nil || d.Clock == nil || !api.ValidHostID(d.HostID) || len(d.Keys) == 0 {
		return nil, errors.New("making inbox: journal, executor, logger, clock, host id and issuer keys are required")
	}
	if d.Skew == 0 {
		d.Skew = DefaultSkew
	}
	d.Logger = d.Logger.Named("inbox")
	return &Inbox{
		d: d, wake: make(chan struct{}, 1),
		refused: map[[sha256.Size]byte]bool{}, doubted: map[string]bool{},
	}, nil
}

// Receive judges one message. After nil the transport may acknowledge it: the
// command is stored, or its refusal is in the outbox. After an error nothing
// was decided and the message must come again.
func (x *Inbox) Receive(ctx context.Context, raw []byte) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("receiving command: %w", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	sum := sha256.Sum256(raw)
	if x.refused[sum] {
		x.d.Logger.Debug("command refused before, acknowledged again")
		return nil
	}
	cmd, err := api.VerifyCommand(raw, x.d.Keys)
	if err != nil {
		return x.refuseUnsignedLocked(sum, contract.AsRefusal(err))
	}
	if cmd.GetAudience() != x.d.HostID {
		return x.refuseLocked(sum, cmd, contract.Refuse(api.CodeWrongAudience,
			"send it to the host it was signed for", "the command is for another host"))
	}
	// A command already taken must not be answered with a refusal when the
	// transport repeats it after its expiry.
	known, err := x.d.Journal.KnownCommand(cmd.GetCommandId())
	if err != nil {
		return fmt.Errorf("looking up command: %w", err)
	}
	if known && x.doubted[cmd.GetCommandId()] {
		return x.store(cmd, x.d.Clock())
	}
	if known {
		x.d.Logger.Debug("command known, acknowledged again", keyCommand, cmd.GetCommandId())
		return nil
	}
	epoch, err := x.d.Journal.Epoch()
	if err != nil {
		return fmt.Errorf("reading epoch: %w", err)
	}
	now := x.d.Clock()
	if refusal := x.judge(cmd, epoch, now); refusal != nil {
		if err := x.refuseLocked(sum, cmd, refusal); err != nil {
			return err
		}
		return x.retire(cmd, epoch, now)
	}
	return x.accept(cmd, epoch, now)
}

// judge applies every check after identity, in order.
func (x *Inbox) judge(cmd *api.Command, epoch Epoch, now clock.Instant) *contract.Refusal {
	if err := cmd.Check(); err != nil {
		return contract.AsRefusal(err)
	}
	for _, r := range []*contract.Refusal{
		x.checkClock(cmd), x.checkWindow(cmd, now.Wall), checkEpoch(cmd, epoch), checkReplay(cmd, epoch), x.checkFeatures(cmd), x.checkQueue(cmd),
	} {
		if r != nil {
			return r
		}
	}
	return nil
}

// checkClock comes before the window, which is judged by that clock.
func (x *Inbox) checkClock(cmd *api.Command) *contract.Refusal {
	if cmd.GetLaunchGuest() == nil {
		return nil
	}
	return x.doubt()
}

func (x *Inbox) doubt() *contract.Refusal {
	if x.d.Doubt == nil {
		return nil
	}
	return x.d.Doubt()
}

func (x *Inbox) checkWindow(cmd *api.Command, now time.Time) *contract.Refusal {
	from, to := cmd.GetNotBefore().AsTime(), cmd.GetExpiresAt().AsTime()
	const clock = "send a new command; if it repeats, compare the clocks of issuer and host"
	switch {
	case to.Sub(from) > api.MaxWindow:
		return contract.Refuse(api.CodeWindowTooLong, "shorten the window", "the window is longer than %s", api.MaxWindow)
	case now.Before(from.Add(-x.d.Skew)):
		return contract.Refuse(api.CodeNotYetValid, clock, "the command is valid from %s, here it is %s", stamp(from), stamp(now))
	case x.expired(cmd, now):
		return contract.Refuse(api.CodeExpired, clock, "the command expired at %s, here it is %s", stamp(to), stamp(now))
	}
	return nil
}

func (x *Inbox) expired(cmd *api.Command, now time.Time) bool {
	return now.After(cmd.GetExpiresAt().AsTime().Add(x.d.Skew))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func checkEpoch(cmd *api.Command, epoch Epoch) *contract.Refusal {
	begin := cmd.GetBeginEpoch()
	switch {
	case begin != nil && [16]byte(begin.GetStoreId()) != epoch.StoreID:
		return contract.Refuse(api.CodeStoreMismatch, "send one for the store id the node reports in its heartbeat",
			"the epoch is meant for another store than this node's")
	case cmd.GetIssuerEpoch() < epoch.Number:
		return contract.Refuse(api.CodeEpochStale, "issue the command again in the node's epoch",
			"the command is of epoch %d, the node is in %d", cmd.GetIssuerEpoch(), epoch.Number)
	case begin == nil && cmd.GetIssuerEpoch() > epoch.Number:
		return contract.Refuse(api.CodeEpochUnknown, "send BeginEpoch with the store id the node reports, then issue the command again",
			"the command is of epoch %d, the node's store is in %d", cmd.GetIssuerEpoch(), epoch.Number)
	}
	return nil
}

func checkReplay(cmd *api.Command, epoch Epoch) *contract.Refusal {
	switch {
	case cmd.GetIssuerEpoch() != epoch.Number:
	case cmd.GetSequence() <= epoch.Floor:
		return contract.Refuse(api.CodeReplayed, "issue it again with a new id and a higher sequence",
			"sequence %d is not above %d, up to which commands are over", cmd.GetSequence(), epoch.Floor)
	case cmd.GetNotBefore().AsTime().Before(epoch.Since):
		return contract.Refuse(api.CodeReplayed, "issue it again with a new id",
			"the command is from before the issuer began the epoch at %s", stamp(epoch.Since))
	}
	return nil
}

func (x *Inbox) checkFeatures(cmd *api.Command) *contract.Refusal {
	missing := slices.DeleteFunc(slices.Clone(cmd.GetRequiredFeatures()), func(f string) bool { return slices.Contains(x.d.Features, f) })
	if len(missing) == 0 {
		return nil
	}
	return contract.Refuse(api.CodeFeatureUnknown, "choose a node that lists every feature, or do without them",
		"the node lacks the features %q", missing)
}

// checkQueue keeps a flood of commands from filling memory and disk. What
// ends guests or begins an epoch is always taken.
func (x *Inbox) checkQueue(cmd *api.Command) *contract.Refusal {
	if cmd.GetStopGuest() != nil || cmd.GetBeginEpoch() != nil || x.queue.len() < maxWaiting {
		return nil
	}
	return contract.Refuse(CodeQueueFull, "issue it again when the node has answered the others",
		"%d commands wait to be carried out", maxWaiting)
}

// accept stores a command that passed every check.
func (x *Inbox) accept(cmd *api.Command, epoch Epoch, now clock.Instant) error {
	if begin := cmd.GetBeginEpoch(); begin != nil && begin.GetEpoch() > epoch.Number {
		if err := x.d.Journal.BeginEpoch(begin.GetEpoch(), cmd.GetNotBefore().AsTime()); err != nil {
			return fmt.Errorf("beginning epoch: %w", err)
		}
		x.d.Logger.Info("issuer epoch begun", "epoch", begin.GetEpoch())
	}
	return x.store(cmd, now)
}

// store puts a command into the journal and the queue.
func (x *Inbox) store(cmd *api.Command, now clock.Instant) error {
	fresh, err := x.add(cmd, now, false)
	if err != nil {
		return err
	}
	if fresh {
		x.d.Logger.Info("command accepted", keyCommand, cmd.GetCommandId(), keyVerb, verb(cmd))
		x.poke()
	}
	return nil
}

func (x *Inbox) add(cmd *api.Command, now clock.Instant, done bool) (bool, error) {
	payload, err := proto.Marshal(cmd)
	if err != nil {
		return false, fmt.Errorf("encoding command: %w", err)
	}
	c := Command{
		ID: cmd.GetCommandId(), Epoch: cmd.GetIssuerEpoch(), Sequence: cmd.GetSequence(), Verb: verb(cmd),
		ExpiresAt: cmd.GetExpiresAt().AsTime(), ReceivedAt: now, Payload: payload, Done: done,
	}
	if stop := cmd.GetStopGuest(); stop != nil {
		c.Guest, c.Generation = stop.GetGuestId(), stop.GetGeneration()
		// It is a fence for as long as a launch signed before it may come.
		c.ExpiresAt = later(c.ExpiresAt, now.Wall.Add(api.MaxWindow+2*x.d.Skew))
	}
	if launch := cmd.GetLaunchGuest(); launch != nil {
		c.Guest, c.Generation = launch.GetGuestId(), launch.GetGeneration()
	}
	fresh, err := x.d.Journal.AddCommand(c)
	if err != nil {
		if known, lookErr := x.d.Journal.KnownCommand(c.ID); !done && lookErr == nil && known {
			x.doubted[c.ID] = true
		}
		return false, fmt.Errorf("storing command: %w", err)
	}
	fresh = fresh || x.doubted[c.ID]
	delete(x.doubted, c.ID)
	if fresh && !done {
		x.queue.add(c)
	}
	return fresh, nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// retire remembers the id of a refused command that might be acceptable
// later (another time, an upgraded agent), so that nobody makes it take
// effect by repeating it after its refusal was reported.
func (x *Inbox) retire(cmd *api.Command, epoch Epoch, now clock.Instant) error {
	from, to := cmd.GetNotBefore().AsTime(), cmd.GetExpiresAt().AsTime()
	lasting := cmd.GetIssuerEpoch() != epoch.Number || cmd.GetSequence() <= epoch.Floor || epoch.Number == 0 ||
		from.Before(epoch.Since) || to.Sub(from) > api.MaxWindow
	if x.doubt() == nil { // otherwise it may yet be in time, by a clock that was set
		lasting = lasting || from.Sub(now.Wall) > api.MaxWindow || x.expired(cmd, now.Wall)
	}
	if lasting || cmd.GetCommandId() == "" {
		return nil
	}
	_, err := x.add(&api.Command{
		CommandId: cmd.GetCommandId(), IssuerEpoch: cmd.GetIssuerEpoch(), Sequence: cmd.GetSequence(), ExpiresAt: cmd.GetExpiresAt(),
	}, now, true)
	return err
}

// refuseLocked reports the refusal of a command an issuer signed.
func (x *Inbox) refuseLocked(sum [sha256.Size]byte, cmd *api.Command, r *contract.Refusal) error {
	if err := x.d.Journal.AppendEvents(api.NewRefused(x.d.HostID, cmd.GetCommandId(), x.d.Clock().Wall, r, sum[:])); err != nil {
		return fmt.Errorf("storing refusal: %w", err)
	}
	x.rememberLocked(sum)
	x.d.Logger.Warn("command refused", keyCommand, cmd.GetCommandId(), keyVerb, verb(cmd), keyCode, r.Code, keyRemedy, r.Remedy, keyError, r)
	return nil
}

// refuseUnsignedLocked reports the refusal of bytes that are nobody's.
func (x *Inbox) refuseUnsignedLocked(sum [sha256.Size]byte, r *contract.Refusal) error {
	waiting, err := x.d.Journal.OutboxLen()
	if err != nil {
		return fmt.Errorf("reading outbox: %w", err)
	}
	if waiting < maxUnsigned {
		if err := x.d.Journal.AppendEvents(api.NewRefused(x.d.HostID, "", x.d.Clock().Wall, r, sum[:])); err != nil {
			return fmt.Errorf("storing refusal: %w", err)
		}
	}
	x.rememberLocked(sum)
	x.d.Logger.Warn("message refused", keyCode, r.Code, keyRemedy, r.Remedy, keyError, r, "reported", waiting < maxUnsigned)
	return nil
}

func (x *Inbox) rememberLocked(sum [sha256.Size]byte) {
	if len(x.order) == maxRemembered {
		delete(x.refused, x.order[0])
		x.order = x.order[1:]
	}
	x.refused[sum] = true
	x.order = append(x.order, sum)
}

// verb names a command's verb for the log.
func verb(cmd *api.Command) string {
	m := cmd.ProtoReflect()
	if fd := m.WhichOneof(m.Descriptor().Oneofs().ByName("verb")); fd != nil {
		return string(fd.Name())
	}
	return "none"
}

// poke wakes Run.
func (x *Inbox) poke() {
	select {
	case x.wake <- struct{}{}:
	default:
	}
}
