package store

import (
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

// KnownCommand reports whether the id was added and is still remembered.
func (s *Store) KnownCommand(id string) (known bool, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		known = tx.Bucket([]byte("commands")).Get([]byte(id)) != nil
		return nil
	})
	return known, err
}

// AddCommand remembers a command; fresh is false when the id is known. A
// sequence that may have been forgotten is refused as a replay, and nothing is
// taken on while the outbox is full.
func (s *Store) AddCommand(c inbox.Command) (fresh bool, err error) {
	err = s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("commands"))
		if fresh = b.Get([]byte(c.ID)) == nil; !fresh {
			return nil
		}
		e, err := epochOf(tx)
		if err != nil {
			return err
		}
		if c.Epoch == e.Number && c.Sequence <= e.Floor {
			return contract.Refuse(api.CodeReplayed, "issue it again with a new id and a higher sequence",
				"sequence %d is not above %d, up to which commands are over", c.Sequence, e.Floor)
		}
		extra := 0
		if c.IsStop() {
			extra = s.reserve / 2 // guests can be ended; the rest is for outcomes
		}
		if err := s.room(tx, extra, 1, 0); err != nil {
			return err
		}
		return putJSON(b, []byte(c.ID), recordCommand, c)
	})
	return fresh && err == nil, err
}

// PendingCommands are those not done, without payloads.
func (s *Store) PendingCommands() ([]inbox.Command, error) {
	return s.commands(func(c inbox.Command) bool { return !c.Done })
}

// Stops are the remembered StopGuests, without payloads.
func (s *Store) Stops() ([]inbox.Command, error) {
	return s.commands(inbox.Command.IsStop)
}

func (s *Store) commands(want func(inbox.Command) bool) (out []inbox.Command, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("commands")).ForEach(func(id, raw []byte) error {
			var c inbox.Command
			if err := getJSON(id, raw, recordCommand, &c); err != nil {
				return err
			}
			if want(c) {
				c.Payload = nil
				out = append(out, c)
			}
			return nil
		})
	})
	return out, err
}

// TakeCommand marks a command begun, counts a death in advance and returns it
// whole.
func (s *Store) TakeCommand(id string) (c inbox.Command, err error) {
	err = s.update(func(tx *bbolt.Tx) error {
		c, err = changeCommand(tx, id, func(c *inbox.Command) { c.Begun, c.Deaths = true, c.Deaths+1 })
		return err
	})
	if errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", inbox.ErrUnreadable, err)
	}
	return c, err
}

// ReleaseCommand takes the death back of a command that stays pending.
func (s *Store) ReleaseCommand(id string) error {
	return s.update(func(tx *bbolt.Tx) error {
		_, err := changeCommand(tx, id, func(c *inbox.Command) { c.Deaths-- })
		return err
	})
}

func changeCommand(tx *bbolt.Tx, id string, change func(*inbox.Command)) (c inbox.Command, err error) {
	b := tx.Bucket([]byte("commands"))
	if err := getJSON([]byte(id), b.Get([]byte(id)), recordCommand, &c); err != nil {
		return c, fmt.Errorf("changing command %s: %w", id, err)
	}
	change(&c)
	return c, putJSON(b, []byte(id), recordCommand, c)
}

// FinishCommand marks a command done and appends its outcome to the outbox,
// both or neither.
func (s *Store) FinishCommand(id string, events ...*api.Event) error {
	return s.append(events, s.reserve, func(tx *bbolt.Tx) error {
		_, err := changeCommand(tx, id, func(c *inbox.Command) { c.Done, c.Deaths, c.Payload = true, 0, nil })
		return err
	})
}

// PruneCommands forgets done commands that expired before the given time, and
// raises the floor to the highest sequence it forgets.
func (s *Store) PruneCommands(before time.Time) (forgotten int, err error) {
	err = s.update(func(tx *bbolt.Tx) error {
		e, err := epochOf(tx)
		if err != nil {
			return err
		}
		b := tx.Bucket([]byte("commands"))
		var ids [][]byte
		err = b.ForEach(func(id, raw []byte) error {
			var c inbox.Command
			if err := getJSON(id, raw, recordCommand, &c); err != nil {
				return err
			}
			if c.Done && c.ExpiresAt.Before(before) {
				ids = append(ids, append([]byte(nil), id...))
				if c.Epoch == e.Number {
					e.Floor = max(e.Floor, c.Sequence)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, id := range ids {
			if err := b.Delete(id); err != nil {
				return err
			}
		}
		forgotten = len(ids)
		return putJSON(tx.Bucket([]byte("meta")), []byte("epoch"), recordEpoch, e)
	})
	return forgotten, err
}
