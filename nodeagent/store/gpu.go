package store

import (
	"errors"
	"fmt"
	"path/filepath"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
)

// bucketGPUs is of layout 3 and later.
const bucketGPUs = "gpus"

// GPUs returns all GPU records by address.
func (s *Store) GPUs() (records []pool.Record, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(bucketGPUs)).ForEach(func(key, raw []byte) error {
			var r pool.Record
			if err := getJSON(key, raw, recordGPU, &r); err != nil {
				return err
			}
			records = append(records, r)
			return nil
		})
	})
	return records, err
}

// ReadGPUs reads the records of a store that no agent has open, and changes
// nothing. It refuses with CodeInUse one that an agent has, store.newer and
// store.older one of another layout; no store is fs.ErrNotExist.
func ReadGPUs(path string) (records []pool.Record, err error) {
	var s *Store
	err = guard(func() error {
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout, OpenFile: openChecked})
		s = &Store{db: db}
		return err
	})
	if errors.Is(err, errLocked) || errors.Is(err, berrors.ErrTimeout) {
		return nil, contract.Refuse(CodeInUse, "ask that agent: name its admin socket with --socket, or wait until it answers",
			"%s holds the store in %s", holder(path), filepath.Dir(path)).Because(err)
	}
	if err != nil {
		return nil, fmt.Errorf("reading store %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, guard(s.db.Close)) }()
	version, err := s.version()
	switch {
	case err != nil:
		return nil, err
	case version > schemaVersion:
		return nil, contract.Refuse("store.newer", "use the nodeagent of the agent's version", "the store has layout %d, this build knows %d", version, schemaVersion)
	case version < schemaVersion:
		return nil, contract.Refuse("store.older", "start the agent of this version once, it brings the store up to date", "the store has layout %d, this build's is %d", version, schemaVersion)
	}
	return s.GPUs()
}

// PutGPUs stores all of the records or none.
func (s *Store) PutGPUs(records ...pool.Record) error {
	return s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte(bucketGPUs))
		for _, r := range records {
			if err := putJSON(b, []byte(r.Address), recordGPU, r); err != nil {
				return err
			}
		}
		return nil
	})
}

// DeleteGPU forgets a GPU. One that is not known is no error.
func (s *Store) DeleteGPU(a vfio.Address) error {
	return s.update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(bucketGPUs)).Delete([]byte(a))
	})
}
