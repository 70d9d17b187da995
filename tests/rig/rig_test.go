//go:build emulated

package rig_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/libvirt"
)

func TestMain(m *testing.M) {
	if rig.Capable() {
		rig.Enter()
	}
	os.Exit(m.Run())
}

const guestID = "01234567-89ab-cdef-0123-456789abcdef"

// host starts a provider host with a tap, a socket that accepts like a PSP,
// and firmware-only boot files.
func host(t *testing.T) (*rig.Host, *libvirt.Driver, vm.Spec) {
	t.Helper()
	if !rig.Capable() {
		skip.Missing(t, "root")
	}
	h, err := rig.NewHost(t.Context(), 0, hostLog(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("closing the host: %v", err)
		}
	})
	socket := h.Path("/run/psp.sock")
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	dir := "/run/guest"
	if err := os.Mkdir(h.Path(dir), 0o711); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"firmware", "kernel", "initrd", "table"} {
		data := make([]byte, 1<<20)
		if name == "kernel" { // enough of a boot header for QEMU to take it
			copy(data[0x1f1:], []byte{1})
			copy(data[0x202:], "HdrS\x0c\x02")
			data[0x211] = 1
			copy(data[0x22c:], "\xff\xff\xff\x7f") // highest address of the initrd
		}
		if err := os.WriteFile(h.Path(filepath.Join(dir, name)), data, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Output(t.Context(), "ip", "tuntap", "add", "na0", "mode", "tap", "user", "libvirt-qemu"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Output(t.Context(), "ip", "link", "set", "na0", "up"); err != nil {
		t.Fatal(err)
	}
	d := libvirt.New("qemu+unix:///system?socket="+h.Path("/run/libvirt/libvirt-sock"), hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("driver: %v", err)
		}
	})
	wait, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	if err := d.WaitConnected(wait); err != nil {
		t.Fatal(err)
	}
	return h, d, vm.Spec{
		GuestID: guestID, Generation: 1, VCPUs: 1, MemoryMiB: 256, CPUModel: "EPYC-v4",
		Firmware: dir + "/firmware", Kernel: dir + "/kernel", Initrd: dir + "/initrd", Cmdline: "x",
		NIC: vm.NIC{Tap: "na0", MAC: "52:54:00:00:00:01"},
		TEE: vm.TEE{Emulated: &vm.Emulated{Policy: 0x30000, HostData: make([]byte, 32), HashTable: dir + "/table", HashTableGPA: 0x810c00, PSPSocket: "/run/psp.sock"}},
	}
}

// hostLog keeps what the host's daemons say for a test that fails.
func hostLog(t *testing.T) io.Writer {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "host.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = file.Close()
		if text, err := os.ReadFile(file.Name()); err == nil && t.Failed() {
			t.Logf("host:\n%s", text)
		}
	})
	return file
}

func next(t *testing.T, events <-chan vm.Event, want vm.State) {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case e := <-events:
			if e.GuestID == guestID && e.State == want {
				return
			}
		case <-timeout:
			t.Fatalf("no event %q", want)
		}
	}
}

func TestAGuestSurvivesItsLibvirtdAndIsFoundAgain(t *testing.T) {
	h, d, spec := host(t)
	events, cancel := d.Subscribe()
	defer cancel()
	if err := d.Start(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context(), spec); err != nil {
		t.Errorf("starting again is not idempotent: %v", err)
	}
	other := spec
	other.Generation = 2
	if err := d.Start(t.Context(), other); err == nil || !strings.Contains(err.Error(), "vm.generation-conflict") {
		t.Errorf("another generation: %v", err)
	}
	next(t, events, vm.StateRunning)
	if err := h.KillLibvirtd(); err != nil {
		t.Fatal(err)
	}
	for { // until the driver has noticed
		if _, err := d.List(t.Context()); err != nil {
			break
		}
	}
	if err := h.StartLibvirtd(t.Context()); err != nil {
		t.Fatal(err)
	}
	wait, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if err := d.WaitConnected(wait); err != nil {
		t.Fatal(err)
	}
	found, err := d.List(t.Context())
	if err != nil || len(found) != 1 || found[0] != (vm.Observed{GuestID: guestID, Generation: 1, State: vm.StateRunning}) {
		t.Fatalf("after the restart: %+v, %v", found, err)
	}
	for range 2 {
		if err := d.Destroy(t.Context(), guestID); err != nil {
			t.Errorf("destroying is not idempotent: %v", err)
		}
	}
	next(t, events, vm.StateGone)
}

func TestAForeignDomainIsLeftAlone(t *testing.T) {
	h, d, _ := host(t)
	const xml = `<domain type='qemu'><name>theirs</name><uuid>` + guestID + `</uuid><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>`
	file := filepath.Join(rig.ScratchDir, "theirs.xml")
	if err := os.WriteFile(h.Path(file), []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := h.Output(t.Context(), "virsh", "-c", "qemu:///system", "create", file); err != nil {
		t.Fatal(out, err)
	}
	if found, err := d.List(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("listed as ours: %+v, %v", found, err)
	}
	if err := d.Destroy(t.Context(), guestID); err == nil {
		t.Error("a foreign domain may be destroyed")
	}
	if out, err := h.Output(t.Context(), "virsh", "-c", "qemu:///system", "domstate", "theirs"); err != nil || !strings.Contains(out, "running") {
		t.Errorf("the foreign domain is %q, %v", out, err)
	}
}

func TestNamespacesReachTheOutsideAndNothingElse(t *testing.T) {
	h, _, _ := host(t)
	routes, err := h.Output(t.Context(), "ip", "route")
	if err != nil || strings.Contains(routes, "default") || !strings.Contains(routes, "198.51.100.0/24") {
		t.Errorf("routes of the host are %q, %v", routes, err)
	}
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", rig.OutsideAddr+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close() //nolint:errcheck // a test
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Output(t.Context(), "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/%s", rig.BrokerName, port)); err != nil {
		t.Errorf("the host does not reach the outside: %v", err)
	}
}
