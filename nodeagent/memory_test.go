package main

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestMemoryIsReturnedAtRest(t *testing.T) {
	const mib = 1 << 20
	var r rest
	for _, step := range []struct {
		what     string
		resident int
		cpu      time.Duration // since the step before
		due      bool
		left     int // after it was returned
	}{
		{"its start", 45 * mib, time.Second, false, 0},
		{"at rest after it", 46 * mib, time.Millisecond, true, 30 * mib},
		{"a heartbeat", 33 * mib, time.Millisecond, false, 0},
		{"a launch", 50 * mib, time.Second, false, 0},
		{"the guest begins", 50 * mib, 51 * time.Millisecond, false, 0},
		{"at rest beside a guest", 50 * mib, 49 * time.Millisecond, true, 38 * mib},
		{"what the guest needs", 42 * mib, 0, false, 0},
		{"the guest ended, the kernel reclaimed", 32 * mib, 0, false, 0},
		{"more than is known since", 37 * mib, 0, true, 32 * mib},
	} {
		now := usage{step.resident, r.cpu + step.cpu}
		if due := r.due(now); due != step.due {
			t.Errorf("%s: memory is returned: %v, want %v", step.what, due, step.due)
		}
		if step.due {
			r = rest{step.left, now.cpu}
		}
	}
}

func TestOwnUsageIsReal(t *testing.T) {
	before, err := ownUsage()
	if err != nil {
		t.Fatal(err)
	}
	burst := bytes.Repeat([]byte{1}, 64<<20)
	sum := sha256.Sum256(burst)
	after, err := ownUsage()
	if err != nil {
		t.Fatal(err)
	}
	if grown := after.resident - before.resident; grown < 32<<20 {
		t.Errorf("64 MiB in use made the process %d bytes larger", grown)
	}
	if after.cpu <= before.cpu {
		t.Errorf("a digest of 64 MiB (%x) took no CPU time", sum)
	}
}

// Whatever can be written, or is no file, may hold secrets and is not paged
// out; nor is the state.
func TestOnlyProgramsArePagedOut(t *testing.T) {
	got := programs(strings.NewReader(`00400000-00424000 r--p 00000000 fe:00 5332997                            /usr/bin/nodeagent
00424000-00c3b000 r-xp 00024000 fe:00 5332997                            /usr/bin/nodeagent (deleted)
01523000-01592000 rw-p 01122000 fe:00 5332997                            /usr/bin/nodeagent
01592000-035db000 rw-p 00000000 00:00 0
7f0000000000-7f0000100000 r--p 00000000 00:00 0
7f1000000000-7f1000008000 r--s 00000000 fe:00 77                         /var/lib/node agent/state.db
7f1100000000-7f1100008000 ---p 00000000 fe:00 78                         /usr/lib/libguard.so
7ffd10000000-7ffd10002000 r-xp 00000000 00:00 0                          [vdso]
7ffd20000000-7ffd20002000 r- 00000000 fe:00 79                            /usr/lib/libshort.so
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
nonsense
`))
	want := []mapping{{0x400000, 0x424000}, {0x424000, 0xc3b000}, {0x7f1100000000, 0x7f1100008000}}
	if !slices.Equal(got, want) {
		t.Errorf("paged out: %x, want %x", got, want)
	}
}

func TestPagesOfFilesAreReturned(t *testing.T) {
	const size = 16 << 20
	path := filepath.Join(t.TempDir(), "program")
	content := bytes.Repeat([]byte{7}, size)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // opened for reading
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type == unix.TMPFS_MAGIC {
		t.Skipf("needs temporary files on a disk: theirs is a tmpfs, which has nowhere to page out to (%v)", err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	pages, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(pages) //nolint:errcheck // ends with the process at the latest
	if !bytes.Equal(pages, content) {
		t.Fatal("the file is not what was written")
	}
	before := resident(t, pages)
	pageOutPrograms()
	if after := resident(t, pages); after > before/4 {
		t.Errorf("%d of %d pages are still in memory", after, before)
	}
	if !bytes.Equal(pages, content) {
		t.Error("the file changed on its way")
	}
}

// resident counts the pages that the kernel has in memory.
func resident(t *testing.T, pages []byte) int {
	t.Helper()
	in := make([]byte, len(pages)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&pages[0])), uintptr(len(pages)), uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, b := range in {
		n += int(b & 1)
	}
	return n
}
