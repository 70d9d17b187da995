// Package teetest plays the kernel's two interfaces for attestation reports:
// configfs-tsm and /dev/sev-guest. Both keep state and answer what the kernel
// answers (Linux 6.12, drivers/virt/coco/tsm.c and sev-guest.c); what they do
// not know is an error. A Platform is for one goroutine.
package teetest

import (
	"bytes"
	"encoding/binary"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	reportSize = 0x4A0
	offVMPL    = 0x30
	offData    = 0x50
	inSize     = 64
	maxVMPL    = 3
	folder     = "/sys/kernel/config/tsm/report"
)

// Platform is a processor with a guest's kernel in front of it.
type Platform struct {
	// Provider is the driver that answers in configfs; "" is none.
	Provider string
	// VMPL is the level the kernel runs at.
	VMPL uint32
	// SaysVMPL, when not nil, is the level that reports name instead.
	SaysVMPL *uint32
	// Table is the host's certificate table.
	Table []byte
	// Busy is how many requests are answered with "later", Disturbed how many
	// are overwritten by somebody else on their way.
	Busy, Disturbed int
	// Wiped is a kernel that has given up its key to the processor.
	Wiped bool
	// Asked counts the requests that came through to the processor.
	Asked int

	entries map[string]*entry
	made    int
}

// entry is one request's folder.
type entry struct {
	in            []byte
	level         uint32
	written, read uint64
	answered      bool
	out, aux      []byte
}

// Open is how many requests were not taken away.
func (p *Platform) Open() int { return len(p.entries) }

// report is the processor's answer to a request at a level.
func (p *Platform) report(data []byte, level uint32) []byte {
	r := make([]byte, reportSize)
	if p.SaysVMPL != nil {
		level = *p.SaysVMPL
	}
	binary.LittleEndian.PutUint32(r[offVMPL:], level)
	copy(r[offData:], data)
	return r
}

// ConfigFS is the Platform's configfs-tsm.
type ConfigFS struct{ *Platform }

func fail(op, name string, errno unix.Errno) error {
	return &fs.PathError{Op: op, Path: name, Err: errno}
}

// MkdirTemp makes a request's folder.
func (c ConfigFS) MkdirTemp(dir, pattern string) (string, error) {
	name := path.Join(dir, pattern+strconv.Itoa(c.made))
	if dir != folder {
		return "", fail("mkdir", name, unix.EPERM)
	}
	if c.Provider == "" {
		return "", fail("mkdir", name, unix.ENXIO)
	}
	if c.entries == nil {
		c.entries = map[string]*entry{}
	}
	c.made++
	c.entries[name] = &entry{}
	return name, nil
}

// RemoveAll takes a request away, as rmdir does.
func (c ConfigFS) RemoveAll(name string) error {
	if c.entries[name] == nil {
		return fail("rmdir", name, unix.ENOENT)
	}
	delete(c.entries, name)
	return nil
}

// ReadFile reads one attribute.
func (c ConfigFS) ReadFile(name string) ([]byte, error) {
	e := c.entries[path.Dir(name)]
	if e == nil {
		return nil, fail("open", name, unix.ENOENT)
	}
	number := func(v uint64) ([]byte, error) { return []byte(strconv.FormatUint(v, 10) + "\n"), nil }
	switch path.Base(name) {
	case "provider":
		return []byte(c.Provider + "\n"), nil
	case "generation":
		return number(e.written)
	case "privlevel_floor":
		return number(uint64(c.VMPL))
	case "outblob", "auxblob":
		if errno := c.answer(e); errno != 0 {
			return nil, fail("read", name, errno)
		}
		if path.Base(name) == "auxblob" {
			return bytes.Clone(e.aux), nil
		}
		return bytes.Clone(e.out), nil
	case "inblob", "privlevel":
		return nil, fail("open", name, unix.EACCES)
	}
	return nil, fail("open", name, unix.ENOENT)
}

// answer asks the processor, unless it has answered this generation already.
func (c ConfigFS) answer(e *entry) unix.Errno {
	switch {
	case c.Provider == "":
		return unix.ENOTTY
	case len(e.in) == 0:
		return unix.EINVAL
	}
	if c.Disturbed > 0 {
		c.Disturbed--
		e.in = bytes.Repeat([]byte{0xee}, inSize)
		e.written++
	}
	switch {
	case e.answered && e.read == e.written:
		return 0
	case len(e.in) != inSize:
		return unix.EINVAL
	case c.Wiped:
		return unix.ENOTTY
	case c.Busy > 0:
		c.Busy--
		return unix.EBUSY
	}
	c.Asked++
	if e.level < c.VMPL { // the processor says: invalid parameter
		return unix.EINVAL
	}
	e.out, e.aux = c.report(e.in, e.level), c.Table
	e.read, e.answered = e.written, true
	return 0
}

// WriteFile writes one attribute; each write is a generation.
func (c ConfigFS) WriteFile(name string, contents []byte) error {
	e := c.entries[path.Dir(name)]
	if e == nil {
		return fail("open", name, unix.ENOENT)
	}
	// So many writes without a read between that the generation would look as
	// if it had been answered.
	if e.answered && e.written == e.read-1 {
		return fail("write", name, unix.EBUSY)
	}
	switch path.Base(name) {
	case "inblob":
		if len(contents) > inSize {
			return fail("write", name, unix.EFBIG)
		}
		e.in = bytes.Clone(contents)
	case "privlevel":
		v, err := strconv.ParseUint(strings.TrimSpace(string(contents)), 0, 32)
		if err != nil || v > maxVMPL || uint32(v) < c.VMPL {
			return fail("write", name, unix.EINVAL)
		}
		e.level = uint32(v)
	case "provider", "generation", "privlevel_floor", "outblob", "auxblob":
		return fail("open", name, unix.EACCES)
	default:
		return fail("open", name, unix.ENOENT)
	}
	e.written++
	return nil
}
