package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// MaxBytes of entries in one log: some three million, at a dozen per guest.
// Their hashes are a fifth as much again. From there on nothing is taken on;
// a tenth more is kept for the ends of what was.
const MaxBytes = 1 << 30

// CodeFull refuses what can no longer be written down.
const CodeFull = "audit.full"

const (
	keyFile        = "key"
	entriesFile    = "entries"
	hashesFile     = "hashes"
	checkpointFile = "checkpoint"
	witnessedFile  = "witnessed"
	lockFile       = "lock"
)

// Log is the open log.
type Log struct {
	dir      string
	signer   note.Signer
	verifier note.Verifier
	vkey     string
	now      func() time.Time
	limit    int64

	// state is what State tells, also while the disk holds up who has mu.
	state atomic.Pointer[State]

	mu                    sync.Mutex // guards below
	lock, entries, hashes *os.File
	at                    place
	checkpoint, witnessed tree
}

// Open opens the log of a host in a folder, or begins one there. It reads all
// of it; what does not check is ErrDamaged, and nothing is changed then. now
// tells the time of entries.
func Open(dir, hostID string, now func() time.Time) (l *Log, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the audit log: %w", err)
	}
	l = &Log{dir: dir, now: now, limit: MaxBytes}
	defer func() {
		if err != nil {
			err = fmt.Errorf("opening the audit log in %s: %w", dir, errors.Join(err, l.Close()))
			l = nil
		}
	}()
	if l.lock, err = os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return l, err
	}
	if err := unix.Flock(int(l.lock.Fd()), unix.LOCK_EX); err != nil {
		return l, err
	}
	defer l.unlock()
	if err := sweep(dir); err != nil {
		return l, err
	}
	if err := l.begin(hostID); err != nil {
		return l, err
	}
	if l.entries, err = os.OpenFile(filepath.Join(dir, entriesFile), os.O_RDWR, 0o600); err != nil {
		return l, missing(err)
	}
	if l.hashes, err = os.OpenFile(filepath.Join(dir, hashesFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return l, err
	}
	if err := l.loadTrees(); err != nil {
		return l, err
	}
	if err := l.catchUp(); err != nil {
		return l, err
	}
	if err := checkTrees(&hashFile{file: l.hashes, known: tlog.StoredHashCount(l.at.size)}, l.checkpoint, l.witnessed); err != nil {
		return l, err
	}
	if l.at.size == 0 {
		if err := l.append(Entry{Kind: KindBegun, Detail: l.signer.Name()}); err != nil {
			return l, err
		}
	}
	l.tell()
	return l, nil
}

// begin makes the key and the file of a new log. The file is there before the
// key, so that a log without a key was never written to.
func (l *Log) begin(hostID string) error {
	text, err := readSmall(filepath.Join(l.dir, keyFile))
	if errors.Is(err, fs.ErrNotExist) {
		info, errStat := os.Stat(filepath.Join(l.dir, entriesFile))
		if errStat == nil && info.Size() > 0 {
			return damage("there are entries and no key")
		}
		skey, errKey := newKey(hostID)
		if errKey != nil {
			return errKey
		}
		text = []byte(skey + "\n")
		err = errors.Join(os.WriteFile(filepath.Join(l.dir, entriesFile), nil, 0o600), writeFile(filepath.Join(l.dir, keyFile), text))
	}
	if err != nil {
		return err
	}
	if l.signer, l.vkey, err = parseKey(text); err != nil {
		return damage("%w", err)
	}
	l.verifier, err = note.NewVerifier(l.vkey)
	return err
}

// sweep removes what a death left of a file that was to replace another.
func sweep(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return damage("%w", err)
	}
	return err
}

func (l *Log) loadTrees() (err error) {
	if l.checkpoint, err = loadTree(filepath.Join(l.dir, checkpointFile), l.verifier); err != nil {
		return err
	}
	l.witnessed, err = loadTree(filepath.Join(l.dir, witnessedFile), l.verifier)
	if err == nil && l.witnessed.size > l.checkpoint.size {
		err = damage("what was confirmed is newer than what was offered")
	}
	return err
}

// checkTrees compares the tree with what was signed.
func checkTrees(hashes tlog.HashReader, trees ...tree) error {
	for _, t := range trees {
		if t.size == 0 {
			continue
		}
		root, err := tlog.TreeHash(t.size, hashes)
		if err != nil {
			return err
		}
		if root != t.root {
			return damage("the checkpoint of %d entries is of another tree", t.size)
		}
	}
	return nil
}

// catchUp takes what others, or an agent that died, left since this one looked
// last: it cuts off an append that was never confirmed and writes the hashes
// that are missing.
func (l *Log) catchUp() error {
	s := scanner{entries: l.entries, hashes: l.hashes, from: l.at, signed: l.checkpoint.size}
	if err := s.measure(); err != nil {
		return err
	}
	if l.at.size > 0 && s.entryBytes == l.at.bytes && s.hashBytes == tlog.StoredHashCount(l.at.size)*tlog.HashSize {
		return nil
	}
	found, err := s.scan()
	if err != nil {
		return err
	}
	if found.torn > 0 {
		if err := errors.Join(l.entries.Truncate(found.bytes), l.entries.Sync()); err != nil {
			return fmt.Errorf("cutting off a torn entry: %w", err)
		}
	}
	if err := l.putHashes(found.hashes.known, found.hashes.fresh); err != nil {
		return err
	}
	l.at = found.place
	return nil
}

func (l *Log) putHashes(at int64, hashes []tlog.Hash) error {
	data := make([]byte, 0, len(hashes)*tlog.HashSize)
	for _, h := range hashes {
		data = append(data, h[:]...)
	}
	if _, err := l.hashes.WriteAt(data, at*tlog.HashSize); err != nil {
		return fmt.Errorf("writing the audit log's hashes: %w", err)
	}
	return nil
}

// exclusively runs f while no other process changes the log.
func (l *Log) exclusively(f func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lock == nil {
		return errors.New("the audit log is closed")
	}
	if err := unix.Flock(int(l.lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("locking the audit log: %w", err)
	}
	defer l.unlock()
	defer l.tell()
	if err := l.catchUp(); err != nil {
		return err
	}
	return f()
}

func (l *Log) tell() {
	l.state.Store(&State{l.signer.Name(), l.at.size, l.checkpoint.size, l.witnessed.size, l.at.bytes})
}

func (l *Log) unlock() { _ = unix.Flock(int(l.lock.Fd()), unix.LOCK_UN) } // the descriptor's end unlocks too

// Append writes an entry; after nil it survives a power failure. Index and,
// when it is zero, At are set here.
func (l *Log) Append(e Entry) error {
	return l.exclusively(func() error { return l.append(e) })
}

func (l *Log) append(e Entry) error {
	e.Index = l.at.size
	if e.At.IsZero() {
		e.At = l.now().UTC()
	}
	line, err := formatEntry(e)
	if err != nil {
		return err
	}
	size := int64(len(line)) + 1
	limit := l.limit
	if !e.takesOn() {
		limit += limit / 10
	}
	if l.at.bytes+size > limit {
		return contract.Refuse(CodeFull, "run nodeagent audit export, stop the agent, move the folder "+l.dir+
			" to where it is kept, start the agent, and let the control plane accept the new log", "the audit log has %d bytes", l.at.bytes)
	}
	// Nothing is made durable that cannot be finished: what fails is undone,
	// and what cannot be undone is found by the next catchUp.
	hashes, err := tlog.StoredHashes(e.Index, line, &hashFile{file: l.hashes, known: tlog.StoredHashCount(e.Index)})
	if err != nil {
		return err
	}
	if _, err = l.entries.WriteAt(append(line, '\n'), l.at.bytes); err == nil {
		err = l.entries.Sync()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing the audit log: %w", err), l.entries.Truncate(l.at.bytes))
	}
	if err := l.putHashes(tlog.StoredHashCount(e.Index), hashes); err != nil {
		return errors.Join(err, l.hashes.Truncate(tlog.StoredHashCount(e.Index)*tlog.HashSize), l.entries.Truncate(l.at.bytes))
	}
	l.at = place{e.Index + 1, l.at.bytes + size}
	return nil
}

// Offer is what a heartbeat carries to the witness.
type Offer struct {
	// Key verifies Checkpoint, a signed note.
	Key        string
	Checkpoint []byte
	// Size of the tree that Checkpoint is of.
	Size int64
	// From is the size of the tree that Proof starts at, 0 for the first.
	From  int64
	Proof []tlog.Hash
}

// Offer returns the checkpoint to show to the witness. It stays the same until
// it was Confirmed: whether an offer without an answer arrived cannot be
// known, and the next proof must start from what the witness has.
func (l *Log) Offer() (o Offer, err error) {
	err = l.exclusively(func() error {
		if l.checkpoint.size == l.witnessed.size && l.at.size > l.checkpoint.size {
			if err := l.sign(); err != nil {
				return err
			}
		}
		o = Offer{Key: l.vkey, Checkpoint: l.checkpoint.text, Size: l.checkpoint.size, From: l.witnessed.size}
		if o.From == 0 || o.From == o.Size {
			return nil
		}
		o.Proof, err = tlog.ProveTree(o.Size, o.From, l.reader())
		return err
	})
	return o, err
}

func (l *Log) reader() tlog.HashReader {
	return &hashFile{file: l.hashes, known: tlog.StoredHashCount(l.at.size)}
}

// sign makes a checkpoint of everything, which is on disk first.
func (l *Log) sign() error {
	if err := l.hashes.Sync(); err != nil {
		return fmt.Errorf("writing the audit log's hashes: %w", err)
	}
	root, err := tlog.TreeHash(l.at.size, l.reader())
	if err != nil {
		return err
	}
	t, err := signTree(l.signer, l.at.size, root)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(l.dir, checkpointFile), t.text); err != nil {
		return err
	}
	l.checkpoint = t
	return nil
}

// Confirmed notes that the witness has a checkpoint that was offered.
func (l *Log) Confirmed(checkpoint []byte) error {
	return l.exclusively(func() error {
		if !bytes.Equal(checkpoint, l.checkpoint.text) || l.checkpoint.size == l.witnessed.size {
			return nil
		}
		if err := writeFile(filepath.Join(l.dir, witnessedFile), l.checkpoint.text); err != nil {
			return err
		}
		l.witnessed = l.checkpoint
		return nil
	})
}

// State is how far the log is.
type State struct {
	Name                        string
	Size, Checkpoint, Witnessed int64
	Bytes                       int64
}

// State returns how far the log is. It never waits for the disk.
func (l *Log) State() State { return *l.state.Load() }

// Close releases the files.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, f := range []**os.File{&l.lock, &l.entries, &l.hashes} {
		if *f != nil {
			errs = append(errs, (*f).Close())
			*f = nil
		}
	}
	return errors.Join(errs...)
}
