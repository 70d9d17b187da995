package store

import (
	"encoding/binary"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
)

// AppendEvents appends events of no command to the outbox.
func (s *Store) AppendEvents(events ...*api.Event) error {
	return s.append(events, s.limit, func(*bbolt.Tx) error { return nil })
}

// room refuses when more than limit events wait.
func room(tx *bbolt.Tx, limit int) error {
	if n := length(tx.Bucket([]byte("outbox"))); n > limit {
		return fmt.Errorf("%w: %d events wait", ErrOutboxFull, n)
	}
	return nil
}

// append runs with and appends events in one transaction, to at most limit
// events.
func (s *Store) append(events []*api.Event, limit int, with func(*bbolt.Tx) error) error {
	err := s.update(func(tx *bbolt.Tx) error {
		if err := with(tx); err != nil {
			return err
		}
		if len(events) == 0 {
			return nil
		}
		b := tx.Bucket([]byte("outbox"))
		if err := room(tx, limit-len(events)); err != nil {
			return err
		}
		for _, event := range events {
			sequence, err := b.NextSequence()
			if err != nil {
				return err
			}
			stored, ok := proto.Clone(event).(*api.Event)
			if !ok {
				return errors.New("cloning event")
			}
			stored.Sequence = sequence
			raw, err := proto.Marshal(stored)
			if err != nil {
				return fmt.Errorf("encoding event: %w", err)
			}
			if err := b.Put(binary.BigEndian.AppendUint64(nil, sequence), seal(recordEvent, raw)); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && len(events) > 0 {
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
	return err
}

// length counts the outbox without walking it: sequences have no gaps, events
// leave from the front only.
func length(b *bbolt.Bucket) int {
	first, _ := b.Cursor().First()
	if first == nil {
		return 0
	}
	return int(b.Sequence() - binary.BigEndian.Uint64(first) + 1)
}

// NextEvents returns the oldest events, at most limit.
func (s *Store) NextEvents(limit int) (events []*api.Event, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		c := tx.Bucket([]byte("outbox")).Cursor()
		for key, raw := c.First(); key != nil && len(events) < limit; key, raw = c.Next() {
			payload, err := unseal(recordEvent, raw)
			if err != nil {
				return err
			}
			event := &api.Event{}
			if err := proto.Unmarshal(payload, event); err != nil {
				return fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			events = append(events, event)
		}
		return nil
	})
	return events, err
}

// DropEvents forgets events up to and including a sequence: the control plane
// has confirmed them.
func (s *Store) DropEvents(upTo uint64) error {
	return s.update(func(tx *bbolt.Tx) error {
		c := tx.Bucket([]byte("outbox")).Cursor()
		for key, _ := c.First(); key != nil && binary.BigEndian.Uint64(key) <= upTo; key, _ = c.First() {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
}

// OutboxLen is the number of events not yet dropped.
func (s *Store) OutboxLen() (n int, err error) {
	err = s.view(func(tx *bbolt.Tx) error { n = length(tx.Bucket([]byte("outbox"))); return nil })
	return n, err
}

// OutboxChanged receives after events were appended.
func (s *Store) OutboxChanged() <-chan struct{} { return s.changed }
