package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/mod/sumdb/tlog"
)

// ErrDamaged means that the files are not what was written.
var ErrDamaged = errors.New("audit log is damaged")

func damage(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

// place is how far a log was read.
type place struct {
	size  int64 // entries
	bytes int64 // of the entries file
}

// hashFile reads the tree's hashes: from the file what was compared, from
// memory what a crash kept from being written there.
type hashFile struct {
	file  *os.File
	known int64 // hashes in the file
	fresh []tlog.Hash
}

// ReadHashes implements tlog.HashReader.
func (h *hashFile) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		if index >= h.known {
			if at := index - h.known; at < int64(len(h.fresh)) {
				out[i] = h.fresh[at]
				continue
			}
			return nil, damage("hash %d is missing", index)
		}
		if _, err := h.file.ReadAt(out[i][:], index*tlog.HashSize); err != nil {
			return nil, fmt.Errorf("reading hash %d: %w", index, err)
		}
	}
	return out, nil
}

// stored returns the hash at an index of the file, and false when it was
// never written there.
func (h *hashFile) stored(index, length int64) (hash tlog.Hash, ok bool, err error) {
	if (index+1)*tlog.HashSize > length {
		return hash, false, nil
	}
	_, err = h.file.ReadAt(hash[:], index*tlog.HashSize)
	return hash, hash != tlog.Hash{}, err
}

// scanner compares entries with hashes, from a place that was compared before
// to the end.
type scanner struct {
	entries, hashes *os.File
	// entryBytes and hashBytes are how much of the files is read: measure.
	entryBytes, hashBytes int64
	from                  place
	// signed is how many entries a checkpoint covers.
	signed int64
	// visit, unless nil, is given every entry.
	visit func(e Entry, line []byte, signed bool) error
}

// scanned is what a scan found.
type scanned struct {
	place
	hashes *hashFile
	// torn bytes after the last entry: an append that was cut short.
	torn int64
}

// measure takes the files as they are now.
func (s *scanner) measure() error {
	entries, errEntries := s.entries.Stat()
	hashes, errHashes := s.hashes.Stat()
	if err := errors.Join(errEntries, errHashes); err != nil {
		return fmt.Errorf("reading the audit log: %w", err)
	}
	s.entryBytes, s.hashBytes = entries.Size(), hashes.Size()
	return nil
}

func (s *scanner) scan() (found scanned, err error) {
	if s.entryBytes < s.from.bytes {
		return found, damage("entries were cut off")
	}
	found = scanned{place: s.from, hashes: &hashFile{file: s.hashes, known: tlog.StoredHashCount(s.from.size)}}
	lines := bufio.NewReaderSize(io.NewSectionReader(s.entries, s.from.bytes, s.entryBytes-s.from.bytes), maxEntry)
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, bufio.ErrBufferFull) {
			return found, fmt.Errorf("reading the audit log: %w", err)
		}
		if len(line) == 0 {
			break
		}
		left := s.entryBytes - found.bytes
		torn, err := s.one(&found, line, left)
		if err != nil {
			return found, err
		}
		if torn {
			found.torn = left
			break
		}
	}
	return found, s.end(found)
}

// one takes a line. An append that a crash cut short is the last line, not
// signed for, and its hash was not written.
func (s *scanner) one(found *scanned, line []byte, left int64) (torn bool, err error) {
	i := found.size
	text, whole := bytes.CutSuffix(line, []byte{'\n'})
	var e Entry
	if s.visit != nil || i >= s.signed { // what is signed for is what was written if its hash is
		e, err = parseEntry(text, i)
	}
	if !whole {
		err = errors.Join(err, fmt.Errorf("entry %d has no end", i))
	}
	first := tlog.StoredHashIndex(0, i)
	if err != nil {
		_, written, errRead := found.hashes.stored(first, s.hashBytes)
		if errRead != nil {
			return false, errRead
		}
		if written || i < s.signed || left > maxEntry || left > int64(len(line)) {
			return false, damage("%w", err)
		}
		return true, nil
	}
	made, err := tlog.StoredHashesForRecordHash(i, tlog.RecordHash(text), found.hashes)
	if err != nil {
		return false, err
	}
	for at, want := range made {
		got, written, err := found.hashes.stored(first+int64(at), s.hashBytes)
		if err != nil {
			return false, err
		}
		if written && got != want || !written && i < s.signed {
			return false, damage("entry %d and its hashes differ", i)
		}
		if written && len(found.hashes.fresh) == 0 {
			found.hashes.known++
			continue
		}
		found.hashes.fresh = append(found.hashes.fresh, want)
	}
	found.size, found.bytes = i+1, found.bytes+int64(len(line))
	if s.visit != nil {
		return false, s.visit(e, text, i < s.signed)
	}
	return false, nil
}

// end checks that the hashes are of these entries and no more.
func (s *scanner) end(found scanned) error {
	if s.hashBytes > tlog.StoredHashCount(found.size)*tlog.HashSize {
		return damage("there are hashes of entries that are not there")
	}
	if found.size < s.signed {
		return damage("%d entries are signed for, %d are there", s.signed, found.size)
	}
	return nil
}
