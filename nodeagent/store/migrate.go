package store

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"

	"go.etcd.io/bbolt"
)

// migrations in order: the first brings version 1 to 2, and so on.
func migrations() []func(*bbolt.Tx) error {
	return []func(*bbolt.Tx) error{
		func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("guests")); return err },
		bindRecords,
	}
}

// unsealOld checks a record of version 1, whose checksum leaves the key out.
func unsealOld(kind byte, raw []byte) ([]byte, error) {
	if kind == 0 || len(raw) < headerSize || raw[0] != kind || raw[1] != 1 ||
		binary.BigEndian.Uint32(raw[2:]) != crc32.Checksum(raw[headerSize:], castagnoli()) {
		return nil, fmt.Errorf("%w: a record of kind %d does not check", ErrDamaged, kind)
	}
	return raw[headerSize:], nil
}

// bindRecords brings layout 2 to 3: every record is sealed anew with its key,
// moments become those of both clocks, and the outbox counts in meta.
func bindRecords(tx *bbolt.Tx) error {
	if _, err := tx.CreateBucket([]byte(bucketGPUs)); err != nil {
		return err
	}
	for name := range buckets() {
		b := tx.Bucket([]byte(name))
		next := map[string][]byte{} // a bucket must not change while it is walked
		err := b.ForEach(func(key, raw []byte) error {
			kind := kindOf(name, key)
			payload, err := unsealOld(kind, raw)
			if err != nil {
				return err
			}
			if payload, err = withInstants(kind, payload); err != nil {
				return fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			next[string(key)] = seal(kind, key, payload)
			return nil
		})
		if err != nil {
			return err
		}
		for key, record := range next {
			if err := b.Put([]byte(key), record); err != nil {
				return err
			}
		}
	}
	outbox := tx.Bucket([]byte("outbox"))
	if err := putSequence(tx, outbox.Sequence()); err != nil {
		return err
	}
	return outbox.SetSequence(0)
}

// fields of a JSON object, each as it was written.
type fields map[string]json.RawMessage

// withInstants turns the wall times of a record into Instants of no boot.
func withInstants(kind byte, payload []byte) ([]byte, error) {
	var f fields
	switch kind {
	case recordCommand:
		if err := json.Unmarshal(payload, &f); err != nil {
			return nil, err
		}
		f.instant("ReceivedAt")
	case recordGuest:
		if err := json.Unmarshal(payload, &f); err != nil {
			return nil, err
		}
		f.instant("AcceptedAt")
		for inner, times := range map[string][]string{"Stop": {"Deadline"}, "GiveUp": {"Deadline"}, "Phases": nil} {
			if err := f.within(inner, times); err != nil {
				return nil, err
			}
		}
	default:
		return payload, nil
	}
	return json.Marshal(f)
}

func (f fields) instant(name string) {
	if wall, there := f[name]; there {
		f[name] = fmt.Appendf(nil, `{"Wall":%s}`, wall)
	}
}

// within does so in an object inside; nil names are all of its fields.
func (f fields) within(name string, times []string) error {
	if f[name] == nil {
		return nil
	}
	var inner fields
	if err := json.Unmarshal(f[name], &inner); err != nil {
		return err
	}
	if times == nil {
		for name := range inner {
			times = append(times, name)
		}
	}
	for _, t := range times {
		inner.instant(t)
	}
	var err error
	f[name], err = json.Marshal(inner)
	return err
}
