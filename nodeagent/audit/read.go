package audit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"
)

// Report is what Verify found to hold.
type Report struct {
	// Name of the log, and the key that its checkpoints verify with.
	Name string `json:"name"`
	Key  string `json:"key"`
	// Entries are intact; Signed of them a checkpoint covers, Witnessed the
	// control plane has confirmed.
	Entries   int64 `json:"entries"`
	Signed    int64 `json:"signed"`
	Witnessed int64 `json:"witnessed"`
	Bytes     int64 `json:"bytes"`
	// TornBytes at the end are of an append that was never confirmed.
	TornBytes int64 `json:"torn_bytes"`
	// Root (base64) of the tree of all entries.
	Root string `json:"root"`
}

// snapshot is a log as a reader sees it.
type snapshot struct {
	scanner
	vkey                  string
	name                  string
	checkpoint, witnessed tree
	files                 []*os.File
}

func (s *snapshot) close() {
	for _, f := range s.files {
		_ = f.Close() // read only
	}
}

func (s *snapshot) open(dir, name string) (*os.File, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if err == nil {
		s.files = append(s.files, f)
	}
	return f, err
}

// read opens a log for reading, checks all of it and gives every entry to
// visit. It reads what was there when it began; appends go on meanwhile.
func read(dir string, visit func(e Entry, line []byte, signed bool) error) (*snapshot, scanned, error) {
	s := &snapshot{}
	fail := func(err error) (*snapshot, scanned, error) {
		s.close()
		return nil, scanned{}, fmt.Errorf("reading the audit log in %s: %w", dir, err)
	}
	lock, err := s.open(dir, lockFile)
	if err != nil {
		return fail(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_SH); err != nil {
		return fail(err)
	}
	key, err := readSmall(filepath.Join(dir, keyFile))
	if err != nil {
		return fail(missing(err))
	}
	signer, vkey, err := parseKey(key)
	if err != nil {
		return fail(damage("%w", err))
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		return fail(err)
	}
	l := &Log{dir: dir, verifier: verifier}
	if err := l.loadTrees(); err != nil {
		return fail(err)
	}
	s.name, s.vkey, s.checkpoint, s.witnessed = signer.Name(), vkey, l.checkpoint, l.witnessed
	s.scanner = scanner{signed: l.checkpoint.size, visit: visit}
	if s.entries, err = s.open(dir, entriesFile); err != nil {
		return fail(missing(err))
	}
	if s.hashes, err = s.open(dir, hashesFile); err != nil {
		return fail(missing(err))
	}
	if err := errors.Join(s.measure(), unix.Flock(int(lock.Fd()), unix.LOCK_UN)); err != nil {
		return fail(err)
	}
	found, err := s.scan()
	if err == nil {
		err = checkTrees(found.hashes, s.checkpoint, s.witnessed)
	}
	if err != nil {
		return fail(err)
	}
	return s, found, nil
}

// Verify reads a log whole and compares it with its checkpoints. What does not
// check is ErrDamaged.
func Verify(dir string) (Report, error) {
	s, found, err := read(dir, nil)
	if err != nil {
		return Report{}, err
	}
	defer s.close()
	r := Report{
		Name: s.name, Key: s.vkey, Entries: found.size, Signed: s.checkpoint.size, Witnessed: s.witnessed.size,
		Bytes: found.bytes, TornBytes: found.torn,
	}
	if found.size > 0 {
		root, err := tlog.TreeHash(found.size, found.hashes)
		if err != nil {
			return Report{}, err
		}
		r.Root = root.String()
	}
	return r, nil
}

// List gives every entry to visit, oldest first, of a log that checks up to
// there.
func List(dir string, visit func(Entry) error) error {
	s, _, err := read(dir, func(e Entry, _ []byte, _ bool) error { return visit(e) })
	if err == nil {
		s.close()
	}
	return err
}

// ErrUnsigned means that there is no checkpoint yet.
var ErrUnsigned = errors.New("the audit log has no checkpoint yet; the agent makes one with its first heartbeat")

// tileHeight is C2SP's.
const tileHeight = 8

// Export writes what a checkpoint covers into a new folder in the layout of
// C2SP tlog-tiles, with the key that verifies it as "key.pub".
func Export(dir, to string) (Report, error) {
	if err := os.Mkdir(to, 0o755); err != nil {
		return Report{}, fmt.Errorf("exporting the audit log: %w", err)
	}
	var bundle []byte
	var width, number int64
	put := func() error {
		if width == 0 {
			return nil
		}
		err := writeTile(to, filepath.Join("tile", "entries", tileName(number, width)), bundle)
		bundle, width, number = nil, 0, number+1
		return err
	}
	s, found, err := read(dir, func(_ Entry, line []byte, signed bool) error {
		if !signed {
			return nil
		}
		bundle = append(binary.BigEndian.AppendUint16(bundle, uint16(len(line))), line...) //nolint:gosec // shorter than maxEntry
		if width++; width == 1<<tileHeight {
			return put()
		}
		return nil
	})
	if err != nil {
		return Report{}, err
	}
	defer s.close()
	if s.checkpoint.size == 0 {
		return Report{}, ErrUnsigned
	}
	if err := put(); err != nil {
		return Report{}, err
	}
	for _, t := range tlog.NewTiles(tileHeight, 0, s.checkpoint.size) {
		data, err := tlog.ReadTileData(t, found.hashes)
		if err != nil {
			return Report{}, fmt.Errorf("exporting the audit log: %w", err)
		}
		if err := writeTile(to, filepath.Join("tile", fmt.Sprint(t.L), tileName(t.N, int64(t.W))), data); err != nil {
			return Report{}, err
		}
	}
	err = errors.Join(writeTile(to, "checkpoint", s.checkpoint.text), writeTile(to, "key.pub", []byte(s.vkey+"\n")))
	return Report{
		Name: s.name, Key: s.vkey, Entries: s.checkpoint.size, Signed: s.checkpoint.size, Witnessed: s.witnessed.size, Root: s.checkpoint.root.String(),
	}, err
}

// tileName is the path of a tile: groups of three digits, all but the last
// with an x before them, and the width of one that is not full.
func tileName(number, width int64) string {
	name := fmt.Sprintf("%03d", number%1000)
	for number /= 1000; number > 0; number /= 1000 {
		name = filepath.Join(fmt.Sprintf("x%03d", number%1000), name)
	}
	if width < 1<<tileHeight {
		name = filepath.Join(name+".p", fmt.Sprint(width))
	}
	return name
}

func writeTile(to, name string, data []byte) error {
	path := filepath.Join(to, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
		return fmt.Errorf("exporting the audit log: %w", err)
	}
	return nil
}
