package inbox

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

// Codes of commands that were taken and are not carried out.
const (
	// CodeTimeout: no guest answered the challenge in time.
	CodeTimeout = "evidence.timeout"
	// CodePoison: the agent died too often while it executed the command.
	CodePoison = "command.poison"
	// CodeStopped: the guest was stopped before its launch began.
	CodeStopped = "launch.stopped"
	// CodeQueueFull: too many commands wait already; refused on receipt.
	CodeQueueFull = "command.queue-full"
)

// Verbs that are treated apart, as verb names them.
const (
	verbLaunch    = "launch_guest"
	verbStop      = "stop_guest"
	verbChallenge = "request_evidence"
)

const (
	// maxDeaths of the agent during one command. One may be a power failure,
	// two bad luck.
	maxDeaths = 3
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
	if err := x.load(); err != nil {
		return err
	}
	evidence, ctx := errgroup.WithContext(ctx)
	evidence.Go(func() error {
		for ctx.Err() == nil {
			for c, ok := x.queue.nextChallenge(); ok; c, ok = x.queue.nextChallenge() {
				evidence.Go(func() error {
					defer x.poke() // a slot is free
					defer x.queue.challengeOver()
					return x.carryOut(ctx, c)
				})
			}
			if c, ok := x.queue.next(); ok {
				if err := x.carryOut(ctx, c); err != nil {
					return err
				}
				continue
			}
			select {
			case <-ctx.Done():
			case <-x.wake:
			}
		}
		return nil
	})
	return evidence.Wait()
}

// load begins with what an earlier agent left.
func (x *Inbox) load() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	pending, err := x.d.Journal.PendingCommands()
	if err != nil {
		return fmt.Errorf("listing pending commands: %w", err)
	}
	stops, err := x.d.Journal.Stops()
	if err != nil {
		return fmt.Errorf("listing stops: %w", err)
	}
	x.queue.reset(pending)
	x.fences = fences{}
	for _, c := range stops {
		x.fences.add(c, x.d.Clock().Wall)
	}
	return nil
}

// patience is how long a challenge may take.
func (x *Inbox) patience(c Command) time.Duration {
	return max(min(x.left(c), evidenceTimeout), time.Millisecond)
}

// left is how long a stored command is still valid: what its window had left
// when it was received, by the time that has passed since then.
func (x *Inbox) left(c Command) time.Duration {
	return c.ExpiresAt.Add(x.d.Skew).Sub(c.ReceivedAt.Wall) - x.d.Clock().Sub(c.ReceivedAt)
}

// carryOut executes one waiting command and records the outcome. When the
// agent stops meanwhile the command stays pending. An error means that the
// store is damaged.
func (x *Inbox) carryOut(ctx context.Context, c Command) error {
	if c.Verb == verbLaunch && !c.Begun && x.fences.hold(c) {
		x.refuse(ctx, c, contract.Refuse(CodeStopped, "launch with a new guest_id or a higher generation",
			"guest %s was stopped before this launch began", c.Guest))
		return nil
	}
	if x.d.Ready != nil {
		select {
		case <-x.d.Ready:
		case <-ctx.Done():
			return nil
		}
	}
	c, err := x.take(ctx, c.ID)
	if err != nil || ctx.Err() != nil {
		return err
	}
	if c.Deaths > maxDeaths {
		x.refuse(ctx, c, contract.Refuse(CodePoison, "look for the cause in the agent's log on the host; then issue it again",
			"the agent died %d times while it carried out the command", c.Deaths-1))
		return nil
	}
	if c.IsStop() {
		x.fences.add(c, x.d.Clock().Wall)
	}
	cmd, err := api.ParseCommand(c.Payload)
	if err != nil {
		cmd = &api.Command{CommandId: c.ID}
	}
	events, over := x.outcome(ctx, c, cmd)
	if !over || !x.finish(ctx, c.ID, events) {
		x.release(c.ID)
	}
	return nil
}

// outcome executes a command and returns what to report, unless the agent
// stopped meanwhile.
func (x *Inbox) outcome(ctx context.Context, c Command, cmd *api.Command) (events []*api.Event, over bool) {
	events, err := x.attempt(ctx, c, cmd)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, false
	case err != nil:
		r := contract.AsRefusal(err)
		x.d.Logger.Warn("command not carried out", keyCommand, c.ID, keyVerb, c.Verb, keyCode, r.Code, keyRemedy, r.Remedy, keyError, err)
		events = append(events, api.NewRefused(x.d.HostID, c.ID, x.d.Clock().Wall, r, nil))
	case len(events) == 0:
		events = []*api.Event{api.NewDone(x.d.HostID, c.ID, x.d.Clock().Wall)}
	}
	for _, e := range events {
		if e.GetCommandId() == "" {
			e.CommandId = c.ID
		}
	}
	return events, true
}

// attempt executes a command, a challenge for as long as somebody waits.
func (x *Inbox) attempt(ctx context.Context, c Command, cmd *api.Command) ([]*api.Event, error) {
	if cmd.GetRequestEvidence() == nil {
		return x.execute(ctx, c, cmd)
	}
	ctx, cancel := context.WithTimeout(ctx, x.patience(c))
	defer cancel()
	events, err := x.execute(ctx, c, cmd)
	if errors.Is(err, context.DeadlineExceeded) {
		err = contract.Refuse(CodeTimeout, "ask again; if it repeats, look at the guest's state",
			"the guest did not answer in time").Because(err)
	}
	return events, err
}

// refuse ends a command that is not executed.
func (x *Inbox) refuse(ctx context.Context, c Command, r *contract.Refusal) {
	x.d.Logger.Warn("command not carried out", keyCommand, c.ID, keyVerb, c.Verb, keyCode, r.Code, keyRemedy, r.Remedy, keyError, r)
	x.finish(ctx, c.ID, []*api.Event{api.NewRefused(x.d.HostID, c.ID, x.d.Clock().Wall, r, nil)})
}

// take records that a command begins, asking again for as long as the agent
// runs: nothing is done that is not on disk first.
func (x *Inbox) take(ctx context.Context, id string) (Command, error) {
	var c Command
	err := x.insist(ctx, "command not begun", id, func() (err error) { c, err = x.d.Journal.TakeCommand(id); return err })
	if errors.Is(err, ErrUnreadable) {
		return c, fmt.Errorf("beginning command %s: %w", id, err)
	}
	return c, nil
}

// release says that the agent ends in good order, and not because of the
// command. It is not worth waiting for: a death too many costs little.
func (x *Inbox) release(id string) {
	if err := x.d.Journal.ReleaseCommand(id); err != nil {
		x.d.Logger.Warn("command counts as interrupted", keyCommand, id, keyError, err)
	}
}

// finish records an outcome: what was done must be reported, and must not be
// done twice. It returns false when the agent ended first.
func (x *Inbox) finish(ctx context.Context, id string, events []*api.Event) bool {
	if err := x.insist(ctx, "outcome not recorded", id, func() error { return x.d.Journal.FinishCommand(id, events...) }); err != nil {
		return false
	}
	x.d.Logger.Info("command finished", keyCommand, id, "events", len(events))
	return true
}

// insist writes to the store until it succeeds, the record is damaged, or ctx
// ends.
func (x *Inbox) insist(ctx context.Context, failed, id string, write func() error) error {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := write()
		if err == nil || errors.Is(err, ErrUnreadable) {
			return err
		}
		x.d.Logger.Error(failed+", tried again; see that the disk of state_dir has space and can be written", keyCommand, id, "pause", wait.String(), keyError, err)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

func (x *Inbox) execute(ctx context.Context, c Command, cmd *api.Command) (events []*api.Event, err error) {
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
		if x.left(c) < 0 {
			return nil, contract.Refuse(api.CodeExpired, "issue it again", "the node was down until the command had expired")
		}
	case *api.Command_StopGuest, *api.Command_Cordon, *api.Command_Uncordon, *api.Command_GrantUpload, *api.Command_SettleUpload:
	}
	events, err = x.d.Executor.Execute(ctx, cmd)
	if err != nil {
		return events, fmt.Errorf("executing command: %w", err)
	}
	return events, nil
}
