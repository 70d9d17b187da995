package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// memoryEvery is how often the agent looks whether it is at rest, restCPU
	// what it uses of a CPU in that time if it is, grownLimit how much its
	// resident memory may have grown since it was last returned.
	memoryEvery = 5 * time.Second
	restCPU     = 50 * time.Millisecond
	grownLimit  = 4 << 20
)

// returnMemory gives the operating system back what a burst of work left
// behind: a firmware image that was measured is some megabytes, an agent at
// rest needs two, and most of the program's code runs at its start or once per
// guest. Go would collect garbage after two minutes without work, and return
// it later still; the host's memory is for guests.
func returnMemory(ctx context.Context) error {
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	var r rest
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if u, err := ownUsage(); err == nil && r.due(u) {
				debug.FreeOSMemory()
				pageOutPrograms()
				r.returned()
			}
		}
	}
}

// usage is what the process takes of the host.
type usage struct {
	resident int           // bytes
	cpu      time.Duration // since its start
}

func ownUsage() (usage, error) {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return usage{}, fmt.Errorf("reading own memory: %w", err)
	}
	var size, resident int // pages, proc_pid_statm(5)
	if _, err := fmt.Sscan(string(statm), &size, &resident); err != nil {
		return usage{}, fmt.Errorf("reading own memory in /proc/self/statm: %w", err)
	}
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return usage{}, fmt.Errorf("reading own CPU time: %w", err)
	}
	return usage{resident * os.Getpagesize(), time.Duration(r.Utime.Nano() + r.Stime.Nano())}, nil
}

// rest knows what was last seen, and how much the process held when it last
// returned memory. Growth that is alive is asked for once and then known.
type rest struct {
	known int
	cpu   time.Duration
}

// due says that the agent is at rest and holds more than it was known to need.
// Amid work it does not: what is paged out would be read again at once.
func (r *rest) due(now usage) bool {
	used := now.cpu - r.cpu
	r.cpu = now.cpu
	r.known = min(r.known, now.resident)
	return used < restCPU && now.resident > r.known+grownLimit
}

// returned notes what is left after memory was returned, a cost that is no work.
func (r *rest) returned() {
	if left, err := ownUsage(); err == nil {
		*r = rest{left.resident, left.cpu}
	}
}

// pageOutPrograms has the kernel take back the pages of the program and its
// libraries; what is needed again comes back from the disk. With large pages in
// the page cache (ext4 since Linux 6.16) they else stay in memory as a whole
// after a few reads, and unmapping alone (MADV_DONTNEED) brings them back at the
// next one. A kernel that cannot (before Linux 5.4) keeps them, which is no
// error.
func pageOutPrograms() {
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close() //nolint:errcheck // opened for reading
	for _, m := range programs(maps) {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_PAGEOUT)
	}
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// programs are the private mappings of files that can't be written through
// (proc_pid_maps(5)). What can be may hold secrets, and MADV_PAGEOUT writes such
// pages to swap; the shared one is the state file, and an agent whose state
// hangs must still be able to say so.
func programs(maps io.Reader) []mapping {
	var files []mapping
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var (
			m             mapping
			mode, device  string
			offset, inode uint64
		)
		n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s %x %s %d", &m.start, &m.end, &mode, &offset, &device, &inode)
		if n == 6 && inode != 0 && len(mode) == 4 && mode[1] == '-' && mode[3] == 'p' {
			files = append(files, m)
		}
	}
	return files
}
