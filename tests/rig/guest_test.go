//go:build emulated

package rig_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/firmware/ovmf"
	"github.com/confidential-node/agent/tests/emulator/psp"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/libvirt/libvirttest"
)

func TestConformanceOnARealLibvirtd(t *testing.T) {
	h := newHost(t)
	d := drive(t, h)
	spec := blankSpec(t, h)
	libvirttest.Conformance(t, libvirttest.World{
		Driver: d,
		Start: func(ctx context.Context, id string, generation uint64) error {
			s := spec
			s.GuestID, s.Generation = id, generation
			return d.Start(ctx, s)
		},
		Foreign: func(ctx context.Context, name, id string) (func() bool, error) {
			xml := fmt.Sprintf(`<domain type='qemu'><name>%s</name><uuid>%s</uuid><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>`, name, id)
			file := filepath.Join(t.TempDir(), "foreign.xml")
			if err := os.WriteFile(file, []byte(xml), 0o600); err != nil {
				return nil, err
			}
			_, err := h.Output(ctx, "virsh", "-q", "-c", rig.LibvirtURI, "create", file)
			return func() bool {
				return strings.Contains(output(t, h, "virsh", "-c", rig.LibvirtURI, "domstate", name), "running")
			}, err
		},
	})
}

// qemuPID is the guest's process.
func qemuPID(t *testing.T, h *rig.Host) int {
	t.Helper()
	text := output(t, h, "cat", "/run/libvirt/qemu/"+vm.NamePrefix+guestID+".pid")
	pid, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func sockets(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name())); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

func TestAGuestSurvivesItsLibvirtdAndIsFoundAgain(t *testing.T) {
	h := newHost(t)
	d := drive(t, h)
	spec := blankSpec(t, h)
	events, cancel := d.Subscribe()
	defer cancel()
	if err := d.Start(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	libvirttest.Await(t, events, guestID, vm.StateRunning)
	pid, open := qemuPID(t, h), sockets(t)
	for range 3 {
		if err := h.KillLibvirtd(); err != nil {
			t.Fatal(err)
		}
		if err := h.StartLibvirtd(t.Context()); err != nil {
			t.Fatal(err)
		}
		// The notice that events may be missing comes after every connect.
		libvirttest.Await(t, events, "", "")
		found, err := d.List(t.Context())
		if want := (vm.Observed{GuestID: guestID, Generation: 1, State: vm.StateRunning, VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB}); err != nil || len(found) != 1 || found[0] != want {
			t.Fatalf("after the restart: %+v, %v", found, err)
		}
		if now := qemuPID(t, h); now != pid {
			t.Fatalf("the guest's process was %d and is %d", pid, now)
		}
	}
	if now := sockets(t); now != open {
		t.Errorf("%d sockets open before, %d after three restarts", open, now)
	}
	if err := d.Destroy(t.Context(), guestID); err != nil {
		t.Fatal(err)
	}
	libvirttest.Await(t, events, guestID, vm.StateGone)
	if err := syscall.Kill(pid, 0); err == nil {
		t.Errorf("process %d lives on", pid)
	}
}

func TestAFrozenLibvirtdIsAnErrorAndNotAnEmptyList(t *testing.T) {
	h := newHost(t)
	d := drive(t, h)
	pids := strings.Fields(output(t, h, "cat", "/run/libvirtd.pid"))
	pid, err := strconv.Atoi(pids[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if found, err := d.List(ctx); err == nil || found != nil {
		t.Errorf("listed %+v from a daemon that is frozen", found)
	}
	if err := d.Destroy(ctx, guestID); err == nil {
		t.Error("silence is taken for a guest's end")
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if found, err := d.List(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("after it goes on: %+v, %v", found, err)
	}
}

func TestAKilledGuestIsSeenAndItsDisksStayRoots(t *testing.T) {
	h := newHost(t)
	d := drive(t, h)
	spec := blankSpec(t, h)
	spec.Disks = []vm.Disk{{Path: write(t, h, "blob", make([]byte, 4096)), Serial: "0123456789abcdef0123"}}
	events, cancel := d.Subscribe()
	defer cancel()
	if err := d.Start(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	libvirttest.Await(t, events, guestID, vm.StateRunning)
	if owner := output(t, h, "stat", "-c", "%U %a", spec.Disks[0].Path); owner != "root 444\n" {
		t.Errorf("while the guest runs its blob belongs to %s", owner)
	}
	if user := output(t, h, "stat", "-c", "%U", fmt.Sprintf("/proc/%d", qemuPID(t, h))); user != "libvirt-qemu\n" {
		t.Errorf("QEMU runs as %s", user)
	}
	if err := syscall.Kill(qemuPID(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	libvirttest.Await(t, events, guestID, vm.StateGone)
	if found, err := d.List(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("after its end: %+v, %v", found, err)
	}
}

// bootFiles are a real AmdSev OVMF and a Debian kernel, as packages hold them.
func bootFiles(t *testing.T) (firmware, kernel []byte) {
	t.Helper()
	dir := t.TempDir()
	read := func(deb, pattern string) []byte {
		deb = filepath.Join("..", "..", ".cache", "debs", deb)
		if _, err := os.Stat(deb); err != nil {
			skip.Missing(t, "boot files (.cache/debs of the repository)")
		}
		if out, err := exec.CommandContext(t.Context(), "dpkg-deb", "-x", deb, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s holds %v, %v", deb, found, err)
		}
		data, err := os.ReadFile(found[0])
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	return read("ovmf-amdsev.deb", "usr/share/ovmf/OVMF.amdsev.fd"), read("kernel.deb", "boot/vmlinuz-*")
}

// lines is a log that can be waited for.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.more)
	l.more = make(chan struct{})
	return l.text.Write(p)
}

func (l *lines) await(t *testing.T, text string) {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		l.mu.Lock()
		has, more, all := strings.Contains(l.text.String(), text), l.more, l.text.String()
		l.mu.Unlock()
		if has {
			return
		}
		select {
		case <-more:
		case <-limit:
			t.Fatalf("no %q in:\n%s", text, all)
		}
	}
}

func servePSP(t *testing.T, h *rig.Host) *lines {
	t.Helper()
	log := &lines{more: make(chan struct{})}
	p, err := psp.New(psp.Config{TCB: contract.TCB{SNP: 27}, Logger: hclog.New(&hclog.LoggerOptions{Output: log})})
	if err != nil {
		t.Fatal(err)
	}
	listener := pspSocket(t, h)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx, listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("PSP: %v", err)
		}
	})
	return log
}

func TestTheEmulatedGuestBootsWhatIsMeasuredAndNothingElse(t *testing.T) {
	firmware, kernel := bootFiles(t)
	h := newHost(t)
	d := drive(t, h)
	log := servePSP(t, h)
	parsed, err := ovmf.Parse(firmware)
	if err != nil {
		t.Fatal(err)
	}
	initrd := []byte("no initrd: the kernel ends in a panic, and panic=-1 reboots\n")
	spec := func(id, tap, cmdline string) (vm.Spec, measure.KernelDigests) {
		addTap(t, h, tap)
		digests := measure.KernelDigests{Kernel: sha256.Sum256(kernel), Initrd: sha256.Sum256(initrd), Cmdline: cmdline}
		table := measure.HashTable(digests.Kernel, digests.Initrd, digests.Cmdline)
		console := filepath.Join(guestDir, tap+".console")
		return vm.Spec{
			GuestID: id, Generation: 1, VCPUs: 2, MemoryMiB: 512, CPUModel: "EPYC-v4",
			Firmware: write(t, h, tap+".fd", firmware), Kernel: write(t, h, tap+".kernel", kernel), Initrd: write(t, h, tap+".initrd", initrd),
			Cmdline: cmdline, NIC: vm.NIC{Tap: tap, MAC: "52:54:00:00:00:01"}, ConsoleLog: console,
			TEE: vm.TEE{Emulated: &vm.Emulated{
				Policy: 0x30000, HostData: make([]byte, 32), HashTable: write(t, h, tap+".table", table[:]),
				HashTableGPA: uint64(parsed.HashTable.Base), PSPSocket: pspPath,
			}},
		}, digests
	}
	const swappedID = "01234567-89ab-cdef-0123-456789abcd00"
	cmdline := "console=ttyS0 panic=-1"
	good, digests := spec(guestID, "na0", cmdline)
	swapped, _ := spec(swappedID, "na1", cmdline)
	swapped.Cmdline += " init=/bin/sh" // after the table was made
	events, cancel := d.Subscribe()
	defer cancel()
	for _, s := range []vm.Spec{swapped, good} {
		if err := d.Start(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	// The node's prediction and the PSP's measurement of libvirt's QEMU agree.
	want, err := measure.Digest(measure.Input{Firmware: firmware, Kernel: &digests, VCPUs: 2, CPUModel: "EPYC-v4", GuestFeatures: 1})
	if err != nil {
		t.Fatal(err)
	}
	log.await(t, hex.EncodeToString(want[:]))
	// It panics for want of an init, reboots, and a reboot is the end.
	libvirttest.Await(t, events, guestID, vm.StateGone)
	console, err := os.ReadFile(h.Path(good.ConsoleLog))
	if err != nil || !bytes.Contains(console, []byte("Linux version")) || !bytes.Contains(console, []byte("Kernel panic")) {
		t.Errorf("the measured guest did not boot: %v\n%.2000s", err, console)
	}
	// The other was started first, has had as long, and hangs in the firmware.
	console, err = os.ReadFile(h.Path(swapped.ConsoleLog))
	if err != nil || bytes.Contains(console, []byte("Linux version")) {
		t.Errorf("the swapped guest booted: %v\n%.2000s", err, console)
	}
	found, err := d.List(t.Context())
	if err != nil || len(found) != 1 || found[0].GuestID != swappedID || found[0].State != vm.StateRunning {
		t.Errorf("guests are %+v, %v", found, err)
	}
	if err := d.Destroy(t.Context(), swappedID); err != nil {
		t.Error(err)
	}
}
