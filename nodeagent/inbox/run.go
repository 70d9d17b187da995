package inbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

// CodeTimeout refuses a challenge that no guest answered in time.
const CodeTimeout = "evidence.timeout"

const (
	// maxEvidence challenges run at a time; the rest waits in the store.
	maxEvidence = 16
	// evidenceTimeout bounds one challenge; a live guest answers in seconds.
	evidenceTimeout = 5 * time.Minute
	// A full disk or a broken store heals or does not; asking again costs
	// little, and the outcome is kept in memory meanwhile.
	firstRetry, lastRetry = time.Second, 30 * time.Second
)

// Run executes stored commands until ctx ends, which is not an error. Commands
// that were pending when the agent last stopped come first.
func (x *Inbox) Run(ctx context.Context) error {
	var evidence sync.WaitGroup
	defer evidence.Wait()
	slots := make(chan struct{}, maxEvidence)
	for {
		x.forgetEnded()
		pending, err := x.d.Journal.PendingCommands()
		if err != nil {
			return fmt.Errorf("listing pending commands: %w", err)
		}
		slices.SortStableFunc(pending, func(a, b Command) int {
			return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Sequence, b.Sequence))
		})
		for _, c := range pending {
			if ctx.Err() != nil {
				return nil
			}
			cmd, err := api.ParseCommand(c.Payload)
			if err != nil {
				cmd = &api.Command{CommandId: c.ID}
			}
			if cmd.GetRequestEvidence() == nil {
				x.carryOut(ctx, cmd, 0)
				continue
			}
			if !x.begin(c.ID) {
				continue
			}
			select {
			case slots <- struct{}{}:
				evidence.Go(func() {
					x.carryOut(ctx, cmd, x.patience(cmd))
					x.end(c.ID)
					<-slots
					x.poke() // a slot is free
				})
			default:
				x.unbegin(c.ID)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-x.wake:
		}
	}
}

// begin reports whether the challenge is not being executed.
func (x *Inbox) begin(id string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.inflight[id] {
		return false
	}
	x.inflight[id] = true
	return true
}

func (x *Inbox) unbegin(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.inflight, id)
}

// end says that a challenge is over. It counts as being executed until the
// next listing, because the one at hand may still call it pending.
func (x *Inbox) end(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ended = append(x.ended, id)
}

func (x *Inbox) forgetEnded() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, id := range x.ended {
		delete(x.inflight, id)
	}
	x.ended = nil
}

// patience is how long a challenge may take.
func (x *Inbox) patience(cmd *api.Command) time.Duration {
	left := cmd.GetExpiresAt().AsTime().Add(x.d.Skew).Sub(x.d.Clock())
	return max(min(left, evidenceTimeout), time.Millisecond)
}

// carryOut executes one command, for at most limit when it is not 0, and
// records the outcome. When the agent stops meanwhile the command stays
// pending.
func (x *Inbox) carryOut(ctx context.Context, cmd *api.Command, limit time.Duration) {
	limited := ctx
	if limit > 0 {
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	id := cmd.GetCommandId()
	events, err := x.execute(limited, cmd)
	if err != nil && ctx.Err() != nil {
		return
	}
	now := x.d.Clock()
	switch {
	case err != nil:
		if errors.Is(err, context.DeadlineExceeded) && limit > 0 {
			err = contract.Refuse(CodeTimeout, "ask again; if it repeats, look at the guest's state",
				"the guest did not answer in time").Because(err)
		}
		r := contract.AsRefusal(err)
		x.d.Logger.Warn("command not carried out", keyCommand, id, keyVerb, verb(cmd), keyCode, r.Code, keyRemedy, r.Remedy, keyError, err)
		events = append(events, api.NewRefused(x.d.HostID, id, now, r, nil))
	case len(events) == 0:
		events = []*api.Event{api.NewDone(x.d.HostID, id, now)}
	}
	for _, e := range events {
		if e.GetCommandId() == "" {
			e.CommandId = id
		}
	}
	x.finish(ctx, id, events)
}

// finish records an outcome, asking again for as long as the agent runs: what
// was done must be reported, and must not be done twice.
func (x *Inbox) finish(ctx context.Context, id string, events []*api.Event) {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := x.d.Journal.FinishCommand(id, events...)
		if err == nil {
			x.d.Logger.Info("command finished", keyCommand, id, "events", len(events))
			return
		}
		x.d.Logger.Error("outcome not recorded, tried again; see that the disk of state_dir has space and can be written", keyCommand, id, "pause", wait.String(), keyError, err)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (x *Inbox) execute(ctx context.Context, cmd *api.Command) (events []*api.Event, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("executing command: panic: %v\n%s", p, debug.Stack())
		}
	}()
	switch cmd.GetVerb().(type) {
	case nil:
		return nil, contract.Refuse(api.CodeMalformed, "issue it again; the node's disk may be damaged", "the stored command cannot be read")
	case *api.Command_BeginEpoch:
		return nil, nil
	case *api.Command_LaunchGuest, *api.Command_RequestEvidence:
		// Accepted in time, but the agent was down for longer than the
		// issuer's patience. Stops and cordons still make sense then.
		if x.expired(cmd, x.d.Clock()) {
			return nil, contract.Refuse(api.CodeExpired, "issue it again", "the node was down until the command had expired")
		}
	case *api.Command_StopGuest, *api.Command_Cordon, *api.Command_Uncordon:
	}
	events, err = x.d.Executor.Execute(ctx, cmd)
	if err != nil {
		return events, fmt.Errorf("executing command: %w", err)
	}
	return events, nil
}
