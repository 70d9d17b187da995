package store

import (
	"encoding/binary"
	"fmt"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
)

// AppendEvents appends events of no command to the outbox.
func (s *Store) AppendEvents(events ...*api.Event) error {
	return s.append(events, 0, func(*bbolt.Tx) error { return nil })
}

// room refuses when the outbox would hold more than it may, in events or
// bytes. extra events are allowed above the limit, and bytes in proportion.
func (s *Store) room(tx *bbolt.Tx, extra, events int, size int64) error {
	n, err := length(tx)
	if err != nil {
		return err
	}
	waiting := s.outboxBytes.Load()
	most := s.limitBytes + s.limitBytes*int64(extra)/int64(s.limit)
	if n+events > s.limit+extra || waiting+size > most {
		return fmt.Errorf("%w: %d events of %d bytes wait", ErrOutboxFull, n, waiting)
	}
	return nil
}

// append runs with and appends events in one transaction, to at most extra
// events above the limit. Nothing in the outbox is ever dropped for others:
// what does not fit is refused before it is done.
func (s *Store) append(events []*api.Event, extra int, with func(*bbolt.Tx) error) error {
	var size int64
	err := s.update(func(tx *bbolt.Tx) error {
		size = 0
		if err := with(tx); err != nil || len(events) == 0 {
			return err
		}
		last, err := sequenceOf(tx)
		if err != nil {
			return err
		}
		first := last + 1
		payloads := make([][]byte, 0, len(events))
		for i, event := range events {
			stored := proto.CloneOf(event)
			stored.Sequence = first + uint64(i)
			raw, err := proto.Marshal(stored)
			if err != nil {
				return fmt.Errorf("encoding event: %w", err)
			}
			payloads = append(payloads, raw)
			size += int64(len(raw) + headerSize)
		}
		if err := s.room(tx, extra, len(events), size); err != nil {
			return err
		}
		b := tx.Bucket([]byte("outbox"))
		for i, payload := range payloads {
			if err := put(b, binary.BigEndian.AppendUint64(nil, first+uint64(i)), recordEvent, payload); err != nil {
				return err
			}
		}
		return putSequence(tx, last+uint64(len(events)))
	})
	if err == nil && len(events) > 0 {
		s.outboxBytes.Add(size)
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
	return err
}

// sequenceOf is the sequence of the last event there ever was.
func sequenceOf(tx *bbolt.Tx) (uint64, error) {
	payload, err := unseal(recordSequence, []byte("sequence"), tx.Bucket([]byte("meta")).Get([]byte("sequence")))
	if err != nil {
		return 0, err
	}
	if len(payload) != 8 {
		return 0, fmt.Errorf("%w: no sequence", ErrDamaged)
	}
	return binary.BigEndian.Uint64(payload), nil
}

func putSequence(tx *bbolt.Tx, last uint64) error {
	return put(tx.Bucket([]byte("meta")), []byte("sequence"), recordSequence, binary.BigEndian.AppendUint64(nil, last))
}

// length counts the outbox without walking it: sequences have no gaps, events
// leave from the front only.
func length(tx *bbolt.Tx) (int, error) {
	first, _ := tx.Bucket([]byte("outbox")).Cursor().First()
	last, err := sequenceOf(tx)
	if first == nil || err != nil {
		return 0, err
	}
	return int(last - binary.BigEndian.Uint64(first) + 1), nil
}

// NextEvents returns the oldest events, at most limit and about
// maxNextBytes, but at least one if there is one.
func (s *Store) NextEvents(limit int) (events []*api.Event, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		size := 0
		c := tx.Bucket([]byte("outbox")).Cursor()
		for key, raw := c.First(); key != nil && len(events) < limit && size < maxNextBytes; key, raw = c.Next() {
			payload, err := unseal(recordEvent, key, raw)
			if err != nil {
				return err
			}
			event := &api.Event{}
			if err := proto.Unmarshal(payload, event); err != nil {
				return fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			events = append(events, event)
			size += len(raw)
		}
		return nil
	})
	return events, err
}

// DropEvents forgets events up to and including a sequence: the control plane
// has confirmed them.
func (s *Store) DropEvents(upTo uint64) error {
	var size int64
	err := s.update(func(tx *bbolt.Tx) error {
		size = 0
		c := tx.Bucket([]byte("outbox")).Cursor()
		for key, raw := c.First(); key != nil && binary.BigEndian.Uint64(key) <= upTo; key, raw = c.First() {
			size += int64(len(raw))
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		s.outboxBytes.Add(-size)
	}
	return err
}

// weigh counts the bytes of an outbox that was left by an earlier agent.
func (s *Store) weigh() error {
	return s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("outbox")).ForEach(func(_, raw []byte) error {
			s.outboxBytes.Add(int64(len(raw)))
			return nil
		})
	})
}

// OutboxLen is the number of events not yet dropped.
func (s *Store) OutboxLen() (n int, err error) {
	err = s.view(func(tx *bbolt.Tx) error { n, err = length(tx); return err })
	return n, err
}

// OutboxWhole is the share of a full outbox.
const OutboxWhole = 100

// OutboxShare is how full the outbox is, in percent of its limit in events or
// bytes, whichever is nearer. From OutboxWhole on nothing new is taken on;
// the outcomes of what was taken on before go up to a tenth beyond.
func (s *Store) OutboxShare() (int, error) {
	n, err := s.OutboxLen()
	return int(max(int64(n)*OutboxWhole/int64(s.limit), s.outboxBytes.Load()*OutboxWhole/s.limitBytes)), err
}

// OutboxChanged receives after events were appended.
func (s *Store) OutboxChanged() <-chan struct{} { return s.changed }
