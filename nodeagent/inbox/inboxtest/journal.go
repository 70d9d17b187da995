// Package inboxtest holds a journal in memory that obeys the rules of the real
// one: what a nil error promised is there after Reopen, a failed call changed
// nothing, ids are forgotten only below the floor. It is for tests only and
// safe for concurrent use.
package inboxtest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

// Journal is commands and outbox of one node.
type Journal struct {
	mu       sync.Mutex
	epoch    inbox.Epoch
	commands map[string]inbox.Command
	outbox   []*api.Event
	last     uint64
	changed  chan struct{}
	fail     func(op string) error
}

// New returns an empty journal with this store id.
func New(storeID byte) *Journal {
	j := &Journal{commands: map[string]inbox.Command{}, changed: make(chan struct{})}
	j.epoch.StoreID[0] = storeID
	return j
}

// FailWith makes every call ask f first; its error is the call's.
func (j *Journal) FailWith(f func(op string) error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.fail = f
}

func (j *Journal) checkLocked(op string) error {
	if j.fail == nil {
		return nil
	}
	return j.fail(op)
}

// Epoch implements inbox.Journal.
func (j *Journal) Epoch() (inbox.Epoch, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.epoch, j.checkLocked("Epoch")
}

// BeginEpoch implements inbox.Journal.
func (j *Journal) BeginEpoch(number uint64, since time.Time) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.checkLocked("BeginEpoch"); err != nil {
		return err
	}
	if number <= j.epoch.Number {
		return fmt.Errorf("beginning epoch %d: the store is in %d", number, j.epoch.Number)
	}
	j.epoch.Number, j.epoch.Floor, j.epoch.Since = number, 0, since
	return nil
}

// KnownCommand implements inbox.Journal.
func (j *Journal) KnownCommand(id string) (bool, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	_, known := j.commands[id]
	return known, j.checkLocked("KnownCommand")
}

// AddCommand implements inbox.Journal.
func (j *Journal) AddCommand(c inbox.Command) (bool, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.checkLocked("AddCommand"); err != nil {
		return false, err
	}
	if _, known := j.commands[c.ID]; known {
		return false, nil
	}
	if c.Epoch != j.epoch.Number || c.Sequence <= j.epoch.Floor {
		return false, fmt.Errorf("adding command: epoch %d, sequence %d is not in epoch %d above %d", c.Epoch, c.Sequence, j.epoch.Number, j.epoch.Floor)
	}
	c.Payload = slices.Clone(c.Payload)
	j.commands[c.ID] = c
	return true, nil
}

// PendingCommands implements inbox.Journal. The order is random.
func (j *Journal) PendingCommands() ([]inbox.Command, error) {
	return j.list("PendingCommands", func(c inbox.Command) bool { return !c.Done })
}

// Stops implements inbox.Journal.
func (j *Journal) Stops() ([]inbox.Command, error) {
	return j.list("Stops", inbox.Command.IsStop)
}

func (j *Journal) list(op string, want func(inbox.Command) bool) ([]inbox.Command, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []inbox.Command
	for c := range maps.Values(j.commands) {
		if want(c) {
			c.Payload = nil
			out = append(out, c)
		}
	}
	return out, j.checkLocked(op)
}

// TakeCommand implements inbox.Journal.
func (j *Journal) TakeCommand(id string) (inbox.Command, error) {
	return j.change("TakeCommand", id, func(c *inbox.Command) { c.Begun, c.Deaths = true, c.Deaths+1 })
}

// ReleaseCommand implements inbox.Journal.
func (j *Journal) ReleaseCommand(id string) error {
	_, err := j.change("ReleaseCommand", id, func(c *inbox.Command) { c.Deaths-- })
	return err
}

func (j *Journal) change(op, id string, f func(*inbox.Command)) (inbox.Command, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.checkLocked(op); err != nil {
		return inbox.Command{}, err
	}
	c, known := j.commands[id]
	if !known || c.Done {
		return c, errors.New("changing command: it is unknown or done")
	}
	f(&c)
	j.commands[id] = c
	return c, nil
}

// FinishCommand implements inbox.Journal.
func (j *Journal) FinishCommand(id string, events ...*api.Event) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.checkLocked("FinishCommand"); err != nil {
		return err
	}
	c, known := j.commands[id]
	if !known || c.Done {
		return errors.New("finishing command: it is unknown or done")
	}
	c.Done, c.Payload = true, nil
	j.commands[id] = c
	j.appendLocked(events)
	return nil
}

// AppendEvents implements inbox.Journal.
func (j *Journal) AppendEvents(events ...*api.Event) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.checkLocked("AppendEvents"); err != nil {
		return err
	}
	j.appendLocked(events)
	return nil
}

func (j *Journal) appendLocked(events []*api.Event) {
	for _, e := range events {
		e = proto.CloneOf(e)
		j.last++
		e.Sequence = j.last
		j.outbox = append(j.outbox, e)
	}
	close(j.changed)
	j.changed = make(chan struct{})
}

// OutboxLen implements inbox.Journal.
func (j *Journal) OutboxLen() (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.outbox), j.checkLocked("OutboxLen")
}

// OutboxChanged is closed when the next event is appended.
func (j *Journal) OutboxChanged() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.changed
}

// NextEvents returns the oldest events.
func (j *Journal) NextEvents(limit int) ([]*api.Event, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.outbox[:min(limit, len(j.outbox))]), j.checkLocked("NextEvents")
}

// DropEvents forgets events up to a sequence.
func (j *Journal) DropEvents(upTo uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.checkLocked("DropEvents"); err != nil {
		return err
	}
	j.outbox = slices.DeleteFunc(j.outbox, func(e *api.Event) bool { return e.GetSequence() <= upTo })
	return nil
}

// Forget drops done commands that expired before now and raises the floor, as
// a store does from time to time.
func (j *Journal) Forget(now time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	maps.DeleteFunc(j.commands, func(_ string, c inbox.Command) bool {
		gone := c.Done && c.ExpiresAt.Before(now)
		if gone && c.Epoch == j.epoch.Number {
			j.epoch.Floor = max(j.epoch.Floor, c.Sequence)
		}
		return gone
	})
}
