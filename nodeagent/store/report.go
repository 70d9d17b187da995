package store

import (
	"fmt"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
)

// LastReport is the capability report that the next one is compared with; an
// empty one, and false, before the first.
func (s *Store) LastReport() (last *api.Capability, told bool, err error) {
	last = &api.Capability{}
	err = s.view(func(tx *bbolt.Tx) error {
		raw := tx.Bucket([]byte("meta")).Get([]byte("report"))
		if raw == nil {
			return nil
		}
		payload, err := unseal(recordReport, []byte("report"), raw)
		if err != nil {
			return err
		}
		told = true
		if err := proto.Unmarshal(payload, last); err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		return nil
	})
	return last, told, err
}

// SaveReport replaces the last report and appends the events that tell what
// changed, both or neither.
func (s *Store) SaveReport(report *api.Capability, events ...*api.Event) error {
	payload, err := proto.Marshal(report)
	if err != nil {
		return fmt.Errorf("encoding report: %w", err)
	}
	return s.append(events, 0, func(tx *bbolt.Tx) error {
		return put(tx.Bucket([]byte("meta")), []byte("report"), recordReport, payload)
	})
}
