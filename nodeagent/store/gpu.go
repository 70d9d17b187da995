package store

import (
	"go.etcd.io/bbolt"

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
