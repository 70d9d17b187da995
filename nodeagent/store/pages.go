package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The layout of a bbolt file, version 2 (go.etcd.io/bbolt v1.5.0,
// internal/common: page.go, meta.go, inode.go, bucket.go). Little endian on
// every machine the agent runs on.
const (
	pageHeader   = 16 // id u64, flags u16, count u16, overflow u32
	pageElement  = 16 // branch: pos, ksize u32, page u64; leaf: flags, pos, ksize, vsize u32
	bucketHeader = 16 // root u64, sequence u64

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagFreelist = 0x10
	leafIsBucket = 0x01

	metaSize     = 64
	metaMagic    = 0xED0CDAED
	metaVersion  = 2
	noFreelist   = ^uint64(0)
	manyFree     = 0xFFFF // count of a freelist whose length is its first entry
	minPageSize  = 512
	maxPageSize  = 1 << 16
	maxPageDepth = 64 // of branch pages, and of buckets in buckets
)

// openChecked opens and locks a store's file as bbolt would, and checks its
// structure before bbolt maps it. bbolt follows page numbers, lengths and
// counts blindly: a flipped bit makes it fault in a goroutine of its own,
// loop for ever, or allocate without bound, none of which can be caught.
func openChecked(path string, flag int, mode os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, flag, mode)
	if err != nil {
		return nil, err
	}
	if err := lock(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	info, err := f.Stat()
	if err == nil && info.Size() > 0 {
		err = checkFile(f, info.Size())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// errLocked means that another process holds the file.
var errLocked = errors.New("file is locked")

// lock takes the lock bbolt will ask for again, on the same open file.
func lock(f *os.File) error {
	deadline := time.Now().Add(lockTimeout)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("locking %s: %w", f.Name(), err)
		case time.Now().After(deadline):
			return fmt.Errorf("locking %s: %w", f.Name(), errLocked)
		}
		<-time.After(lockRetry)
	}
}

// walker visits every page that the newest valid meta page leads to.
type walker struct {
	file     io.ReaderAt
	pageSize uint64
	pages    uint64 // high-water mark: pages from here on are not in use
	seen     []bool
}

func damage(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

// checkFile walks the whole structure: every page is reachable exactly once
// or free, lies inside the file, and says nothing that leads out of it. A page
// in use is as bbolt writes it to the last byte: elements follow each other
// without a gap, and zeros follow them. So no element can be lost by a count
// that shrank, and none appear.
func checkFile(file io.ReaderAt, size int64) error {
	meta, err := newestMeta(file)
	if err != nil {
		return err
	}
	field := func(offset int) uint64 { return binary.LittleEndian.Uint64(meta[offset:]) }
	w := walker{file: file, pageSize: uint64(binary.LittleEndian.Uint32(meta[8:])), pages: field(40)}
	root, freelist := field(16), field(32)
	if w.pages < 4 || w.pages > uint64(size)/w.pageSize {
		return damage("%d pages do not fit %d bytes", w.pages, size)
	}
	w.seen = make([]bool, w.pages)
	w.seen[0], w.seen[1] = true, true
	if err := w.tree(root, 0); err != nil {
		return err
	}
	if freelist == noFreelist {
		return damage("no freelist")
	}
	if err := w.free(freelist); err != nil {
		return err
	}
	for id, seen := range w.seen {
		if !seen {
			return damage("page %d is neither used nor free", id)
		}
	}
	return nil
}

// newestMeta returns the meta page bbolt will use. The other one must be that
// of the transaction before: bbolt would go back to it silently when the
// newest does not check, and forget what the last transaction said. Each is
// written in one sector, so that a power failure leaves none half written.
func newestMeta(file io.ReaderAt) ([]byte, error) {
	first, ok := readMeta(file, 0)
	if !ok {
		return nil, damage("the first meta page is not valid")
	}
	second, ok := readMeta(file, int64(binary.LittleEndian.Uint32(first[8:])))
	if !ok || !bytes.Equal(first[:12], second[:12]) {
		return nil, damage("the second meta page is not valid")
	}
	switch binary.LittleEndian.Uint64(first[48:]) - binary.LittleEndian.Uint64(second[48:]) {
	case 1:
		return first, nil
	case ^uint64(0):
		return second, nil
	}
	return nil, damage("the meta pages are not of one transaction and the next")
}

func readMeta(file io.ReaderAt, offset int64) ([]byte, bool) {
	meta := make([]byte, metaSize)
	if _, err := file.ReadAt(meta, offset+pageHeader); err != nil {
		return nil, false
	}
	sum := fnv.New64a()
	sum.Write(meta[:metaSize-8])
	pageSize := binary.LittleEndian.Uint32(meta[8:])
	ok := binary.LittleEndian.Uint32(meta) == metaMagic && binary.LittleEndian.Uint32(meta[4:]) == metaVersion &&
		sum.Sum64() == binary.LittleEndian.Uint64(meta[metaSize-8:]) &&
		pageSize >= minPageSize && pageSize <= maxPageSize && pageSize&(pageSize-1) == 0
	return meta, ok
}

// take reads a page with its overflow and marks it seen.
func (w *walker) take(id uint64) (flags uint16, count uint64, data []byte, err error) {
	if id < 2 || id >= w.pages || w.seen[id] {
		return 0, 0, nil, damage("page %d is out of range or reached twice", id)
	}
	header := make([]byte, pageHeader)
	if _, err := w.file.ReadAt(header, int64(id*w.pageSize)); err != nil {
		return 0, 0, nil, fmt.Errorf("reading page %d: %w", id, err)
	}
	overflow := uint64(binary.LittleEndian.Uint32(header[12:]))
	if binary.LittleEndian.Uint64(header) != id || overflow >= w.pages-id {
		return 0, 0, nil, damage("page %d calls itself otherwise or is longer than the file", id)
	}
	for i := id; i <= id+overflow; i++ {
		if w.seen[i] {
			return 0, 0, nil, damage("page %d is reached twice", i)
		}
		w.seen[i] = true
	}
	data = make([]byte, (1+overflow)*w.pageSize)
	if _, err := w.file.ReadAt(data, int64(id*w.pageSize)); err != nil {
		return 0, 0, nil, fmt.Errorf("reading page %d: %w", id, err)
	}
	return binary.LittleEndian.Uint16(header[8:]), uint64(binary.LittleEndian.Uint16(header[10:])), data, nil
}

// tree walks a bucket's pages.
func (w *walker) tree(id uint64, depth int) error {
	if depth > maxPageDepth {
		return damage("deeper than %d pages", maxPageDepth)
	}
	flags, count, page, err := w.take(id)
	if err != nil {
		return err
	}
	switch {
	case flags == flagLeaf:
		return w.leaf(page, count, depth)
	case flags == flagBranch && count > 0:
		return w.branch(page, count, depth)
	}
	return damage("page %d is of another kind", id)
}

func (w *walker) branch(page []byte, count uint64, depth int) error {
	var last []byte
	end := pageHeader + count*pageElement
	for i := range count {
		at := pageHeader + i*pageElement
		e, err := cut(page, at, pageElement)
		if err != nil {
			return err
		}
		key, err := cut(page, end, u32(e, 4))
		if err != nil {
			return err
		}
		if at+u32(e, 0) != end {
			return damage("an element does not follow the one before")
		}
		end += uint64(len(key))
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return damage("keys are out of order")
		}
		last = key
		if err := w.tree(binary.LittleEndian.Uint64(e[8:]), depth+1); err != nil {
			return err
		}
	}
	return empty(page, end)
}

func (w *walker) leaf(page []byte, count uint64, depth int) error {
	var last []byte
	end := pageHeader + count*pageElement
	for i := range count {
		at := pageHeader + i*pageElement
		e, err := cut(page, at, pageElement)
		if err != nil {
			return err
		}
		key, err := cut(page, end, u32(e, 8))
		if err != nil {
			return err
		}
		value, err := cut(page, end+u32(e, 8), u32(e, 12))
		if err != nil {
			return err
		}
		if at+u32(e, 4) != end {
			return damage("an element does not follow the one before")
		}
		end += uint64(len(key) + len(value))
		if len(key) == 0 || (i > 0 && bytes.Compare(last, key) >= 0) {
			return damage("keys are empty or out of order")
		}
		last = key
		switch u32(e, 0) {
		case 0:
		case leafIsBucket:
			if err := w.bucket(value, depth); err != nil {
				return err
			}
		default:
			return damage("an element of an unknown kind")
		}
	}
	return empty(page, end)
}

// empty reports damage when anything is behind a page's last element.
func empty(page []byte, end uint64) error {
	if end > uint64(len(page)) || len(bytes.TrimLeft(page[end:], "\x00")) > 0 {
		return damage("there is something behind the last element of a page")
	}
	return nil
}

// bucket follows a bucket's root, or walks the page inside its value.
func (w *walker) bucket(value []byte, depth int) error {
	if len(value) < bucketHeader {
		return damage("a bucket's value is cut short")
	}
	inline := value[bucketHeader:]
	if root := binary.LittleEndian.Uint64(value); root != 0 {
		if len(inline) > 0 {
			return damage("a bucket has both a page of its own and one inside")
		}
		return w.tree(root, depth+1)
	}
	// Number and overflow of a page that is none are 0.
	if len(inline) < pageHeader || binary.LittleEndian.Uint64(inline) != 0 || u32(inline, 12) != 0 ||
		binary.LittleEndian.Uint16(inline[8:]) != flagLeaf || depth > maxPageDepth {
		return damage("a bucket's inline page is malformed")
	}
	return w.leaf(inline, uint64(binary.LittleEndian.Uint16(inline[10:])), depth+1)
}

// free marks the free pages.
func (w *walker) free(id uint64) error {
	flags, count, page, err := w.take(id)
	if err != nil {
		return err
	}
	at := uint64(pageHeader)
	if flags != flagFreelist {
		return damage("the freelist is none")
	}
	if count == manyFree {
		count, at = binary.LittleEndian.Uint64(page[at:]), at+8
	}
	if count > uint64(len(page))/8 {
		return damage("the freelist is longer than its page")
	}
	ids, err := cut(page, at, count*8)
	if err != nil {
		return err
	}
	for i := range count {
		id := binary.LittleEndian.Uint64(ids[i*8:])
		if id < 2 || id >= w.pages || w.seen[id] {
			return damage("free page %d is out of range or in use", id)
		}
		w.seen[id] = true
	}
	return nil
}

func u32(b []byte, offset int) uint64 { return uint64(binary.LittleEndian.Uint32(b[offset:])) }

// cut returns size bytes at an offset, if they are there.
func cut(b []byte, at, size uint64) ([]byte, error) {
	if at > uint64(len(b)) || size > uint64(len(b))-at {
		return nil, damage("an element leads out of its page")
	}
	return b[at : at+size], nil
}
