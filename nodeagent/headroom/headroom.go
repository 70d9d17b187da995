// Package headroom says what a host has left of what the agent needs beside
// the guests' own shares: bytes, inodes and an answer of every file system a
// launch writes to, the agent's file descriptors, memory that can be had. It
// also explains, in one place, the errors by which a host says that there is
// none left.
//
// It looks and judges; it frees nothing and decides about no guest. A disk
// that hangs holds one goroutine of a Gauge per folder and no caller: every
// look has its deadline. A Gauge is safe for concurrent use.
package headroom

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

const (
	// keepInodes of a file system: a launch makes some dozen files.
	keepInodes = 256
	// keepDescriptors of the agent: a launch fetches over up to 64 idle
	// connections, and every guest that runs needs its own.
	keepDescriptors = 128
	// keepMemoryMiB of the host after a guest has taken its share: QEMU's own,
	// and the page tables.
	keepMemoryMiB = 256
	// patience with one file system. A disk that takes longer for one small
	// file would not carry a launch.
	patience = 5 * time.Second
	// lookEvery is how often changes are looked for, to be told in the log.
	lookEvery = 15 * time.Second
)

// Folder is one that launches write to.
type Folder struct {
	// Name is the setting that names it; paths stay on the host.
	Name, Path string
	// KeepBytes are left free.
	KeepBytes uint64
}

// Facts are what a look saw.
type Facts struct {
	Folders     []Disk
	Descriptors Descriptors
	// MemoryMiB is MemAvailable.
	MemoryMiB uint64
	// MemoryErr is why it is not known.
	MemoryErr error
}

// Disk is the file system of a folder.
type Disk struct {
	Folder
	Bytes uint64
	// Inodes is 0 of 0 where a file system has no table of them.
	Inodes, AllInodes uint64
	ReadOnly          bool
	// Err is how a small file could not be written and synced there.
	Err error
}

// Descriptors are the agent's own.
type Descriptors struct {
	Open, Limit uint64
	Err         error
}

// Left is what admission needs to know.
type Left struct {
	// Shortages close admission.
	Shortages []*contract.Refusal
	// MemoryMiB a guest may take.
	MemoryMiB uint64
}

// Judge says what is short.
func Judge(f Facts) Left {
	l := Left{MemoryMiB: max(f.MemoryMiB, keepMemoryMiB) - keepMemoryMiB}
	for _, d := range f.Folders {
		if r := judgeDisk(d); r != nil {
			l.Shortages = append(l.Shortages, r)
		}
	}
	switch d := f.Descriptors; {
	case d.Err != nil:
		l.Shortages = append(l.Shortages, unknown("the agent's file descriptors", d.Err))
	case d.Open+keepDescriptors > d.Limit:
		l.Shortages = append(l.Shortages, contract.Refuse(CodeDescriptors, remedyDescriptors,
			"the agent has %d file descriptors open of %d, %d are kept", d.Open, d.Limit, keepDescriptors))
	}
	switch {
	case f.MemoryErr != nil:
		l.Shortages = append(l.Shortages, unknown("the host's memory", f.MemoryErr))
	case l.MemoryMiB == 0:
		l.Shortages = append(l.Shortages, contract.Refuse(CodeMemory, "let guests end, or see on the host which program takes the memory",
			"%d MiB of memory can be had on the host, %d are kept", f.MemoryMiB, keepMemoryMiB))
	}
	return l
}

func judgeDisk(d Disk) *contract.Refusal {
	const mib = 1 << 20
	noInodes := contract.Refuse(CodeInodes, "remove files on the host's disk of "+d.Name+", then launch again",
		"the file system of %s has %d inodes free, %d are kept", d.Name, d.Inodes, keepInodes)
	fewInodes := d.AllInodes > 0 && d.Inodes < keepInodes
	switch {
	case errors.Is(d.Err, context.DeadlineExceeded):
		return contract.Refuse(CodeDiskSilent, "look in the host's kernel log for the disk of "+d.Name+", and at what keeps it busy",
			"the file system of %s took no small file within %s", d.Name, patience)
	case fewInodes && errors.Is(d.Err, unix.ENOSPC):
		return noInodes
	case d.Err != nil:
		if r := Explain(d.Err); r != nil {
			r.Message = d.Name + ": " + r.Message
			return r
		}
		return unknown("the file system of "+d.Name, d.Err)
	case d.ReadOnly:
		return contract.Refuse(CodeDiskReadOnly, remedyReadOnly, "the file system of %s is read-only", d.Name)
	case d.Bytes < d.KeepBytes:
		return contract.Refuse(CodeDiskFull, remedyFull, "the file system of %s has %d MiB free, %d are kept", d.Name, d.Bytes/mib, d.KeepBytes/mib)
	case fewInodes:
		return noInodes
	}
	return nil
}

func unknown(what string, err error) *contract.Refusal {
	if r := Explain(err); r != nil {
		return r
	}
	return contract.Refuse(CodeUnknown, "look at the agent's log on the host", "how it stands with %s could not be found out", what).Because(err)
}

// Gauge looks at one host.
type Gauge struct {
	folders []*folder
	root    string
	log     hclog.Logger

	mu   sync.Mutex // guards last
	last Left
}

// folder is looked at by one goroutine at a time.
type folder struct {
	Folder
	look func(Folder) Disk
	slot chan *look // holds the look under way, or nil
}

type look struct {
	done chan struct{}
	disk Disk
}

// New returns a gauge of the host whose /proc is below root.
func New(root string, folders []Folder, logger hclog.Logger) *Gauge {
	g := &Gauge{root: root, log: logger.Named("headroom")}
	for _, f := range folders {
		g.folders = append(g.folders, newFolder(f, lookAt))
	}
	return g
}

func newFolder(f Folder, lookAt func(Folder) Disk) *folder {
	out := &folder{Folder: f, look: lookAt, slot: make(chan *look, 1)}
	out.slot <- nil
	return out
}

// Look looks, for some seconds at most.
func (g *Gauge) Look(ctx context.Context) Facts {
	var f Facts
	looks := make([]*look, len(g.folders))
	for i, folder := range g.folders {
		looks[i] = folder.begin()
	}
	for i, folder := range g.folders {
		f.Folders = append(f.Folders, folder.end(ctx, looks[i]))
	}
	f.Descriptors = g.descriptors()
	f.MemoryMiB, f.MemoryErr = g.memory()
	return f
}

// Left looks and judges.
func (g *Gauge) Left(ctx context.Context) Left {
	l := Judge(g.Look(ctx))
	if ctx.Err() == nil { // or it saw little
		g.mu.Lock()
		defer g.mu.Unlock()
		g.last = l
	}
	return l
}

// Last is what the last look saw, of some 15 seconds ago at most while Run
// runs: for whoever must not wait for a disk.
func (g *Gauge) Last() Left {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last
}

// begin starts a look, or joins the one under way.
func (f *folder) begin() *look {
	l := <-f.slot
	if l != nil {
		select {
		case <-l.done:
			l = nil
		default:
		}
	}
	if l == nil {
		l = &look{done: make(chan struct{})}
		go func() {
			l.disk = f.look(f.Folder)
			close(l.done)
		}()
	}
	f.slot <- l
	return l
}

func (f *folder) end(ctx context.Context, l *look) Disk {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-l.done:
		return l.disk
	case <-ctx.Done():
		return Disk{Folder: f.Folder, Err: ctx.Err()}
	}
}

// lookAt asks the file system and has it keep a small file.
func lookAt(f Folder) Disk {
	d := Disk{Folder: f}
	var stat unix.Statfs_t
	if err := unix.Statfs(f.Path, &stat); err != nil {
		d.Err = fmt.Errorf("asking for free space: %w", err)
		return d
	}
	d.Bytes, d.Inodes, d.AllInodes = stat.Bavail*uint64(stat.Bsize), stat.Ffree, stat.Files
	if d.ReadOnly = stat.Flags&unix.ST_RDONLY != 0; !d.ReadOnly {
		d.Err = tryFile(f.Path)
	}
	return d
}

// tryFile writes and syncs a file without a name: no death leaves it behind.
// Where a file system knows no such files, that it answers is enough.
func tryFile(dir string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("making a file: %w", err)
	}
	file := os.NewFile(uintptr(fd), dir)
	_, err = file.Write(make([]byte, os.Getpagesize()))
	if err == nil {
		err = file.Sync()
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("writing a file: %w", err)
	}
	return nil
}

func (g *Gauge) descriptors() Descriptors {
	entries, err := os.ReadDir(filepath.Join(g.root, "proc/self/fd"))
	if err != nil {
		return Descriptors{Err: fmt.Errorf("counting file descriptors: %w", err)}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return Descriptors{Err: fmt.Errorf("asking for the limit of file descriptors: %w", err)}
	}
	return Descriptors{Open: uint64(len(entries)), Limit: limit.Cur}
}

func (g *Gauge) memory() (mib uint64, err error) {
	file, err := os.Open(filepath.Join(g.root, "proc/meminfo"))
	if err != nil {
		return 0, fmt.Errorf("reading memory: %w", err)
	}
	defer file.Close() //nolint:errcheck // read only
	return parseAvailable(file)
}

// parseAvailable reads MemAvailable in MiB.
func parseAvailable(r io.Reader) (uint64, error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "MemAvailable:"); ok {
			kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("reading memory: %w", err)
			}
			return kib / 1024, nil
		}
	}
	return 0, errors.Join(errors.New("reading memory: there is no MemAvailable"), lines.Err())
}

// Run tells in the log when admission closes and opens for want of headroom.
// It ends with ctx.
func (g *Gauge) Run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var said []string
	for {
		left := g.Left(ctx)
		if ctx.Err() != nil {
			return nil
		}
		said = g.tell(said, left.Shortages)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// tell logs what is new, and returns what is known.
func (g *Gauge) tell(said []string, shortages []*contract.Refusal) []string {
	var now []string
	for _, r := range shortages {
		now = append(now, r.Code)
		if !slices.Contains(said, r.Code) {
			g.log.Warn("admission is closed: the host is short of something; guests go on", "code", r.Code, "remedy", r.Remedy, "err", r)
		}
	}
	if len(now) == 0 && len(said) > 0 {
		g.log.Info("admission is open again, the host has headroom", "was", said)
	}
	return now
}
