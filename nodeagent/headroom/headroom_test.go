package headroom

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/skip"
)

func plenty() Facts {
	return Facts{
		Folders:     []Disk{{Folder: Folder{Name: "state_dir", KeepBytes: 1 << 20}, Bytes: 1 << 20, Inodes: keepInodes, AllInodes: 1000}},
		Descriptors: Descriptors{Open: 10, Limit: 10 + keepDescriptors}, MemoryMiB: keepMemoryMiB + 100,
	}
}

// One row per rule: the smallest change that closes admission.
func TestEveryShortageIsTypedAndHasARemedy(t *testing.T) {
	t.Parallel()
	if l := Judge(plenty()); len(l.Shortages) != 0 || l.MemoryMiB != 100 {
		t.Fatalf("of plenty is left %+v", l)
	}
	failed := func(err error) func(*Facts) { return func(f *Facts) { f.Folders[0].Err = fmt.Errorf("x: %w", err) } }
	for code, change := range map[string]func(*Facts){
		CodeDiskFull:     func(f *Facts) { f.Folders[0].Bytes-- },
		CodeInodes:       func(f *Facts) { f.Folders[0].Inodes-- },
		CodeDiskReadOnly: func(f *Facts) { f.Folders[0].ReadOnly = true },
		CodeDiskFailing:  failed(syscall.EIO),
		CodeDiskQuota:    failed(syscall.EDQUOT),
		CodeDiskSilent:   failed(context.DeadlineExceeded),
		CodeUnknown:      failed(syscall.ENOENT),
		CodeDescriptors:  func(f *Facts) { f.Descriptors.Open++ },
		CodeFileTable:    func(f *Facts) { f.Descriptors.Err = syscall.ENFILE },
		CodeMemory:       func(f *Facts) { f.MemoryMiB = keepMemoryMiB },
	} {
		f := plenty()
		change(&f)
		l := Judge(f)
		if len(l.Shortages) != 1 || l.Shortages[0].Code != code || l.Shortages[0].Remedy == "" || l.Shortages[0].Message == "" {
			t.Errorf("%s: %+v", code, l.Shortages)
		}
	}
	f := plenty()
	f.MemoryErr = syscall.ENOMEM
	if l := Judge(f); len(l.Shortages) != 1 || l.Shortages[0].Code != CodeMemory {
		t.Errorf("memory that cannot be asked for: %+v", l)
	}
	f = plenty()
	f.Folders[0].Inodes, f.Folders[0].AllInodes, f.MemoryMiB = 0, 0, keepMemoryMiB+1
	if l := Judge(f); len(l.Shortages) != 0 || l.MemoryMiB != 1 {
		t.Errorf("a file system without a table of inodes, little memory: %+v", l)
	}
}

func TestErrorsThatSayNothingOfTheHostAreNotExplained(t *testing.T) {
	t.Parallel()
	for _, err := range []error{nil, errors.New("no"), syscall.ENOENT, context.DeadlineExceeded} {
		if r := Explain(err); r != nil {
			t.Errorf("%v is explained as %v", err, r)
		}
		if got := Typed(err); !errors.Is(got, err) {
			t.Errorf("%v becomes %v", err, got)
		}
	}
	full := fmt.Errorf("opening: %w", syscall.ENOSPC)
	if r, refused := errors.AsType[*contract.Refusal](Typed(full)); !refused || r.Code != CodeDiskFull || !errors.Is(r, full) {
		t.Errorf("a full disk becomes %v", r)
	}
	own := contract.Refuse("a.b", "c", "d").Because(full)
	if r, _ := errors.AsType[*contract.Refusal](Typed(own)); r != own {
		t.Errorf("a refusal becomes %v", r)
	}
}

// A disk that hangs costs its callers the deadline and the agent one
// goroutine, says so, and is seen to be back.
func TestADiskThatHangsHoldsNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hang, looks := make(chan struct{}), atomic.Int32{}
		g := &Gauge{root: t.TempDir(), log: hclog.NewNullLogger(), folders: []*folder{
			newFolder(Folder{Name: "cache_dir"}, func(f Folder) Disk { looks.Add(1); <-hang; return Disk{Folder: f} }),
			newFolder(Folder{Name: "state_dir"}, func(f Folder) Disk { return Disk{Folder: f} }),
		}}
		for range 3 {
			begun := time.Now()
			disks := g.Look(t.Context()).Folders
			if waited := time.Since(begun); waited != patience {
				t.Errorf("a look took %s", waited)
			}
			if r := judgeDisk(disks[0]); r == nil || r.Code != CodeDiskSilent || judgeDisk(disks[1]) != nil {
				t.Errorf("saw %+v", disks)
			}
		}
		if looks.Load() != 1 {
			t.Errorf("%d goroutines hang", looks.Load())
		}
		close(hang)
		synctest.Wait()
		if r := judgeDisk(g.Look(t.Context()).Folders[0]); r != nil || looks.Load() != 2 {
			t.Errorf("after it is back: %v, %d looks", r, looks.Load())
		}
	})
}

func TestChangesAreToldOnce(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	g := &Gauge{log: hclog.New(&hclog.LoggerOptions{Output: &out})}
	full := []*contract.Refusal{Explain(syscall.ENOSPC)}
	said := g.tell(g.tell(g.tell(nil, full), full), nil)
	if g.tell(said, nil); strings.Count(out.String(), "admission is closed") != 1 || strings.Count(out.String(), "admission is open") != 1 {
		t.Errorf("log:\n%s", out.String())
	}
}

// Heartbeats tell the last look and wait for none.
func TestTheLastLookIsKept(t *testing.T) {
	t.Parallel()
	short := true
	g := New("/", nil, hclog.NewNullLogger())
	g.folders = []*folder{newFolder(Folder{Name: "state_dir"}, func(f Folder) Disk { return Disk{Folder: f, ReadOnly: short} })}
	if l := g.Last(); len(l.Shortages) != 0 {
		t.Errorf("before any look: %+v", l)
	}
	for _, short = range []bool{true, false} {
		want := g.Left(t.Context())
		if now := g.Last(); len(now.Shortages) != len(want.Shortages) || (len(now.Shortages) != 0) != short {
			t.Errorf("short is %v: last %+v, seen %+v", short, now, want)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if g.Left(ended); len(g.Last().Shortages) != 0 {
		t.Error("a look that was broken off counts")
	}
}

func TestThisMachineCanBeLookedAt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := New("/", []Folder{{Name: "state_dir", Path: dir}}, hclog.NewNullLogger()).Look(t.Context())
	if f.MemoryErr != nil || f.MemoryMiB == 0 || f.Descriptors.Err != nil || f.Descriptors.Open == 0 || f.Descriptors.Limit < f.Descriptors.Open ||
		len(f.Folders) != 1 || f.Folders[0].Err != nil || f.Folders[0].Bytes == 0 {
		t.Errorf("saw %+v", f)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// MemAvailable is what counts: other programs' memory is not the agent's to
// give, whatever guests were promised.
func TestMemoryThatOthersTookIsNotThere(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(root, "proc"), 0o700),
		os.WriteFile(filepath.Join(root, "proc/meminfo"), []byte("MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: 1048576 kB\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if l := New(root, nil, hclog.NewNullLogger()).Left(t.Context()); l.MemoryMiB != 1024-keepMemoryMiB {
		t.Errorf("%d MiB are left", l.MemoryMiB)
	}
}

func FuzzAvailable(f *testing.F) {
	f.Add("MemTotal: 1 kB\nMemAvailable:   2048 kB\n")
	f.Add("MemAvailable: 99999999999999999999 kB")
	f.Fuzz(func(t *testing.T, text string) {
		if mib, err := parseAvailable(strings.NewReader(text)); err != nil && mib != 0 {
			t.Errorf("%d with %v", mib, err)
		}
	})
}

// What the kernel itself does with small file systems and limits is seen in a
// process of its own, in a mount namespace.
func TestTheKernelsOwnShortagesAreSeenAndEnd(t *testing.T) {
	t.Parallel()
	if dir := os.Getenv("HEADROOM_NAMESPACE"); dir != "" {
		inNamespace(t, dir)
		return
	}
	if os.Geteuid() != 0 {
		skip.Missing(t, "root")
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1", "-test.v") //nolint:gosec // this test
	cmd.Env = append(os.Environ(), "HEADROOM_NAMESPACE="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Fatalf("%v\n%s", err, out)
	}
}

func inNamespace(t *testing.T, dir string) {
	t.Helper()
	g := New("/", []Folder{{Name: "state_dir", Path: dir, KeepBytes: 1 << 20}}, hclog.NewNullLogger())
	is := func(when string, want ...string) {
		t.Helper()
		var got []string
		for _, r := range g.Left(t.Context()).Shortages {
			got = append(got, r.Code)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", when, got, want)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mount := func(flags uintptr, data string) {
		t.Helper()
		do(syscall.Mount("tmpfs", dir, "tmpfs", flags, data))
	}
	mount(0, "size=4m,nr_inodes=1000")
	is("with room")
	file := filepath.Join(dir, "big")
	do(os.WriteFile(file, make([]byte, 3<<20+1<<16), 0o600))
	is("below the reserve", CodeDiskFull)
	do(os.WriteFile(file, make([]byte, 1<<22), 0o600))
	is("full to the last byte", CodeDiskFull)
	do(os.Remove(file))
	is("after the file is gone")
	mount(syscall.MS_REMOUNT, "size=4m,nr_inodes=200")
	is("few inodes", CodeInodes)
	mount(syscall.MS_REMOUNT, "size=4m,nr_inodes=1")
	is("no inode at all", CodeInodes)
	mount(syscall.MS_REMOUNT, "size=4m,nr_inodes=1000")
	mount(syscall.MS_REMOUNT|syscall.MS_RDONLY, "size=4m")
	is("read-only", CodeDiskReadOnly)
	mount(syscall.MS_REMOUNT, "size=4m")
	is("read-write again")

	var before syscall.Rlimit
	do(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before))
	small := before
	small.Cur = keepDescriptors
	do(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &small))
	is("few descriptors", CodeDescriptors)
	small.Cur = 3
	do(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &small))
	is("no descriptor", CodeDescriptors, CodeDescriptors, CodeDescriptors)
	do(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before))
	is("with the old limit")
}
