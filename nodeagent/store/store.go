// Package store is the agent's memory on disk: the issuer epoch, the commands
// it has accepted, the guests with the intents of their launches, the cordon,
// and the outbox of events the control plane has not confirmed yet. It decides
// nothing about them. A nil error from a change means that it survives a power
// failure. One process at a time may hold a store; a Store is safe for
// concurrent use.
//
// # Layout, version 3
//
//	meta      schema, sequence -> u32, u64; epoch, cordon, forwarding, report, seen
//	commands  id -> Command record
//	guests    id -> Guest record
//	outbox    u64 big-endian sequence -> Event (protobuf) record
//	gpus      address -> GPU record (package gpu/pool)
//
// Version 1 had no guests. Version 2 had its deadlines by the wall clock
// alone, the sequence of the last event in bbolt's own counter, and checksums
// that left the keys out. An older layout is migrated when it is opened, step
// by step in one transaction; a newer one is refused.
//
// Every value is a record: a type byte, a version byte, the CRC-32C of key and
// payload (big endian), the payload. bbolt itself does not notice flipped
// bits, so whatever byte of the file changes, it is noticed or means nothing:
// the file's structure is checked before bbolt maps it (pages.go), a record
// that does not check is an error, never a value, and a page that cannot be
// walked later becomes an error instead of a crash.
//
// A store that is set aside takes the knowledge of what was carried out along.
// The new one has another id and is in no epoch: everything is refused until
// an issuer begins one for that very id, and what was issued before that
// moment is refused for good, whatever numbers the issuer begins with.
package store

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

const (
	// schemaVersion of the layout above.
	schemaVersion = 3
	// lockTimeout is how long another holder is waited for.
	lockTimeout = 2 * time.Second
	// lockRetry is how often it is asked for.
	lockRetry = 50 * time.Millisecond
	// maxOutbox closes admission before the disk fills with events.
	maxOutbox = 100_000
	// maxOutboxBytes does so for large events: about 800 pieces of evidence.
	maxOutboxBytes = 512 << 20
	// maxNextBytes of events are in memory at a time.
	maxNextBytes = 4 << 20
	// headerSize of a record.
	headerSize = 6
)

// Record types.
const (
	recordSchema byte = iota + 1
	recordEpoch
	recordCommand
	recordEvent
	recordGuest
	recordCordon
	recordForwarding // of earlier agents; nobody reads it
	recordReport
	recordSequence
	recordSeen
	recordGPU
)

// ErrDamaged means that a record or page does not check.
var ErrDamaged = errors.New("store is damaged")

// ErrOutboxFull means that the control plane has not confirmed events for so
// long that no more are taken.
var ErrOutboxFull = errors.New("outbox is full")

// CodeInUse refuses a store that another agent holds.
const CodeInUse = "store.in-use"

var _ inbox.Journal = (*Store)(nil)

// Store is one open store.
type Store struct {
	db      *bbolt.DB
	changed chan struct{}
	// limit of events in the outbox, and reserve above it for the outcomes of
	// what was admitted before.
	limit, reserve int
	limitBytes     int64
	// outboxBytes follows the transactions; two appends at once may exceed
	// the limit by one of them.
	outboxBytes atomic.Int64
}

// buckets and the kind of their records; that of meta's goes by the key.
func buckets() map[string]byte {
	return map[string]byte{"meta": 0, "commands": recordCommand, "guests": recordGuest, "outbox": recordEvent, bucketGPUs: recordGPU}
}

// metaKinds are the records of meta.
func metaKinds() map[string]byte {
	return map[string]byte{
		"schema": recordSchema, "epoch": recordEpoch, "cordon": recordCordon, "forwarding": recordForwarding,
		"report": recordReport, "sequence": recordSequence, "seen": recordSeen,
	}
}

// kindOf is the kind of the record at a key; 0, which no record has, for a key
// that is nobody's.
func kindOf(bucket string, key []byte) byte {
	if bucket == "meta" {
		return metaKinds()[string(key)]
	}
	return buckets()[bucket]
}

// Open opens the store at path, in a folder made 0700, and checks it whole. A
// damaged one is set aside as path.corrupt-TIME and a new one begun: its epoch
// is 0, so nothing is carried out twice. A store that another agent holds is
// a refusal.
func Open(path string, now func() time.Time, logger hclog.Logger) (*Store, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("creating state directory: %w", err)
	}
	s, err := open(path)
	if errors.Is(err, errLocked) || errors.Is(err, berrors.ErrTimeout) {
		return nil, contract.Refuse(CodeInUse, "stop the other agent, or give this one another state_dir",
			"%s holds the store in %s", holder(path), filepath.Dir(path)).Because(err)
	}
	if err == nil || !damaged(err) {
		return s, err
	}
	aside := path + asideSuffix + now().UTC().Format("20060102T150405Z")
	logger.Error("store is damaged; set aside, and a new one begun", "path", path, "aside", aside, "err", err)
	if err := os.Rename(path, aside); err != nil {
		return nil, fmt.Errorf("setting a damaged store aside: %w", err)
	}
	return open(path)
}

// asideSuffix and the time follow the name of a store that was set aside.
const asideSuffix = ".corrupt-"

// SetAside are the files that were set aside for path and that nobody has
// removed.
func SetAside(path string) []string {
	found, err := filepath.Glob(path + asideSuffix + "*")
	if err != nil {
		return nil // a state directory whose name is a pattern
	}
	return found
}

// damaged tells a broken file from a broken disk or missing rights.
func damaged(err error) bool {
	return errors.Is(err, ErrDamaged) || errors.Is(err, berrors.ErrInvalid) || errors.Is(err, berrors.ErrChecksum) || errors.Is(err, berrors.ErrVersionMismatch)
}

func open(path string) (s *Store, err error) {
	err = guard(func() error {
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout, OpenFile: openChecked})
		if err != nil {
			return fmt.Errorf("opening store %s: %w", path, err)
		}
		s = &Store{db: db, changed: make(chan struct{}, 1), limit: maxOutbox, reserve: maxOutbox / 10, limitBytes: maxOutboxBytes}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = s.prepare()
	if err == nil {
		err = s.weigh()
	}
	if err != nil {
		return nil, errors.Join(err, guard(s.db.Close))
	}
	return s, nil
}

// prepare makes what a new store needs, migrates an older layout and refuses
// one it does not know. Nothing is written before the whole file was checked.
func (s *Store) prepare() error {
	version, err := s.version()
	switch {
	case err != nil:
		return err
	case version > schemaVersion:
		return contract.Refuse("store.newer", "install the newer version of the agent again", "the store has layout %d, this build knows %d", version, schemaVersion)
	}
	if err := s.check(version); err != nil || version == schemaVersion {
		return err
	}
	return s.update(func(tx *bbolt.Tx) error {
		if version == 0 {
			return create(tx)
		}
		for _, migrate := range migrations()[version-1:] {
			if err := migrate(tx); err != nil {
				return fmt.Errorf("migrating store from layout %d: %w", version, err)
			}
		}
		return putSchema(tx)
	})
}

// version of the layout, 0 when the file holds nothing at all yet.
func (s *Store) version() (version uint32, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		if first, _ := tx.Cursor().First(); first == nil {
			return nil
		}
		meta := tx.Bucket([]byte("meta"))
		if meta == nil {
			return fmt.Errorf("%w: no bucket %q", ErrDamaged, "meta")
		}
		raw := meta.Get([]byte("schema"))
		payload, err := unseal(recordSchema, []byte("schema"), raw)
		if err != nil {
			payload, err = unsealOld(recordSchema, raw)
		}
		if err != nil {
			return err
		}
		if len(payload) == 4 {
			version = binary.BigEndian.Uint32(payload)
		}
		if version == 0 {
			return fmt.Errorf("%w: no layout version", ErrDamaged)
		}
		return nil
	})
	return version, err
}

// create makes an empty store of the current layout.
func create(tx *bbolt.Tx) error {
	for name := range buckets() {
		if _, err := tx.CreateBucketIfNotExists([]byte(name)); err != nil {
			return err
		}
	}
	epoch := inbox.Epoch{}
	if _, err := rand.Read(epoch.StoreID[:]); err != nil {
		return err
	}
	if err := putJSON(tx.Bucket([]byte("meta")), []byte("epoch"), recordEpoch, epoch); err != nil {
		return err
	}
	if err := putSequence(tx, 0); err != nil {
		return err
	}
	return putSchema(tx)
}

func putSchema(tx *bbolt.Tx) error {
	return put(tx.Bucket([]byte("meta")), []byte("schema"), recordSchema, binary.BigEndian.AppendUint32(nil, schemaVersion))
}

// check walks every record once.
func (s *Store) check(version uint32) error {
	open := unseal
	if version < firstBound {
		open = func(kind byte, _, raw []byte) ([]byte, error) { return unsealOld(kind, raw) }
	}
	return s.view(func(tx *bbolt.Tx) error {
		seen := 0
		err := tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			if _, known := buckets()[string(name)]; !known {
				return fmt.Errorf("%w: unknown bucket", ErrDamaged)
			}
			if version >= firstBound && b.Sequence() != 0 {
				return fmt.Errorf("%w: a counter that is not in use has moved", ErrDamaged)
			}
			seen++
			return b.ForEach(func(key, raw []byte) error {
				_, err := open(kindOf(string(name), key), key, raw)
				return err
			})
		})
		if err != nil || version == 0 {
			return err
		}
		if version == schemaVersion && seen != len(buckets()) {
			return fmt.Errorf("%w: %d buckets of %d", ErrDamaged, seen, len(buckets()))
		}
		if version < firstBound {
			return nil
		}
		if _, err = sequenceOf(tx); err != nil {
			return err
		}
		_, err = epochOf(tx)
		return err
	})
}

// Close releases the store.
func (s *Store) Close() error { return guard(s.db.Close) }

// guard turns a fault while reading a damaged, memory-mapped file into an
// error. bbolt panics, or the kernel signals, on pages that lead nowhere.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, r)
		}
	}()
	return f()
}

func (s *Store) view(f func(*bbolt.Tx) error) error {
	return guard(func() error { return s.db.View(f) })
}

func (s *Store) update(f func(*bbolt.Tx) error) error {
	return guard(func() error { return s.db.Update(f) })
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// firstBound is the first layout whose checksums cover the keys.
const firstBound = 3

// seal wraps a payload as a record of version 2, which is good at this key
// only.
func seal(kind byte, key, payload []byte) []byte {
	out := append([]byte{kind, 2}, make([]byte, 4)...)
	binary.BigEndian.PutUint32(out[2:], sumOf(key, payload))
	return append(out, payload...)
}

func sumOf(key, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli()), castagnoli(), payload)
}

// unseal checks a record and returns its payload.
func unseal(kind byte, key, raw []byte) ([]byte, error) {
	if kind == 0 || len(raw) < headerSize || raw[0] != kind || raw[1] != 2 || binary.BigEndian.Uint32(raw[2:]) != sumOf(key, raw[headerSize:]) {
		return nil, fmt.Errorf("%w: a record of kind %d does not check", ErrDamaged, kind)
	}
	return raw[headerSize:], nil
}

// put seals a payload under its key.
func put(b *bbolt.Bucket, key []byte, kind byte, payload []byte) error {
	return b.Put(key, seal(kind, key, payload))
}

func putJSON(b *bbolt.Bucket, key []byte, kind byte, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding record: %w", err)
	}
	return put(b, key, kind, payload)
}

func getJSON(key, raw []byte, kind byte, v any) error {
	payload, err := unseal(kind, key, raw)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(payload, v); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// metaJSON reads a record of meta; v stays as it is when there is none.
func (s *Store) metaJSON(key string, v any) error {
	return s.view(func(tx *bbolt.Tx) error {
		raw := tx.Bucket([]byte("meta")).Get([]byte(key))
		if raw == nil {
			return nil
		}
		return getJSON([]byte(key), raw, metaKinds()[key], v)
	})
}

func epochOf(tx *bbolt.Tx) (e inbox.Epoch, err error) {
	meta := tx.Bucket([]byte("meta"))
	if meta == nil {
		return e, fmt.Errorf("%w: no bucket %q", ErrDamaged, "meta")
	}
	err = getJSON([]byte("epoch"), meta.Get([]byte("epoch")), recordEpoch, &e)
	return e, err
}

// Epoch returns the epoch this store is in.
func (s *Store) Epoch() (e inbox.Epoch, err error) {
	err = s.view(func(tx *bbolt.Tx) (err error) { e, err = epochOf(tx); return err })
	return e, err
}

// BeginEpoch moves to a higher epoch, with floor 0; since is when the issuer
// began it, by its own clock.
func (s *Store) BeginEpoch(number uint64, since time.Time) error {
	return s.update(func(tx *bbolt.Tx) error {
		e, err := epochOf(tx)
		if err != nil {
			return err
		}
		if number <= e.Number {
			return fmt.Errorf("epoch %d is not higher than %d", number, e.Number)
		}
		next := inbox.Epoch{Number: number, StoreID: e.StoreID, Since: since}
		return putJSON(tx.Bucket([]byte("meta")), []byte("epoch"), recordEpoch, next)
	})
}

// LastSeen is when the host's clocks last agreed, to the agent's knowledge.
func (s *Store) LastSeen() (seen clock.Instant, err error) {
	err = s.metaJSON("seen", &seen)
	return seen, err
}

// SaveLastSeen replaces it.
func (s *Store) SaveLastSeen(seen clock.Instant) error {
	return s.update(func(tx *bbolt.Tx) error {
		return putJSON(tx.Bucket([]byte("meta")), []byte("seen"), recordSeen, seen)
	})
}
