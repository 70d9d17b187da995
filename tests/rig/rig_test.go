//go:build emulated

package rig_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
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
	if name := os.Getenv(scenarioEnv); name != "" {
		os.Exit(runScenario(name))
	}
	os.Exit(m.Run())
}

const (
	guestID  = "01234567-89ab-cdef-0123-456789abcdef"
	guestDir = "/run/guest"
	pspPath  = "/run/psp.sock"
)

// newHost starts a provider host that ends with the test.
func newHost(t *testing.T) *rig.Host {
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
	return h
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

// drive connects a driver to the host's libvirtd from the outside.
func drive(t *testing.T, h *rig.Host) *libvirt.Driver {
	t.Helper()
	d := libvirt.New(h.LibvirtURI(), hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("driver: %v", err)
		}
	})
	waitConnected(t, d)
	return d
}

func waitConnected(t *testing.T, d *libvirt.Driver) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := d.WaitConnected(ctx); err != nil {
		t.Fatal(err)
	}
}

func output(t *testing.T, h *rig.Host, name string, args ...string) string {
	t.Helper()
	out, err := h.Output(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// addTap makes a persistent tap that QEMU's user may open.
func addTap(t *testing.T, h *rig.Host, name string) {
	t.Helper()
	output(t, h, "ip", "tuntap", "add", name, "mode", "tap", "user", "libvirt-qemu")
	output(t, h, "ip", "link", "set", name, "up")
}

// write puts a file on the host as boot copies are put: for QEMU's user to
// read, in a folder it can pass but not list.
func write(t *testing.T, h *rig.Host, name string, data []byte) string {
	t.Helper()
	if err := os.MkdirAll(h.Path(guestDir), 0o711); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(guestDir, name)
	if err := os.WriteFile(h.Path(path), data, 0o444); err != nil {
		t.Fatal(err)
	}
	return path
}

// pspSocket listens where the domain's channel connects to.
func pspSocket(t *testing.T, h *rig.Host) *net.UnixListener {
	t.Helper()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.Path(pspPath), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	if err := os.Chmod(h.Path(pspPath), 0o666); err != nil {
		t.Fatal(err)
	}
	return listener
}

// blankKernel has enough of a boot header for QEMU to take it.
func blankKernel() []byte {
	kernel := make([]byte, 1<<20)
	copy(kernel[0x1f1:], []byte{1})
	copy(kernel[0x202:], "HdrS\x0c\x02")
	kernel[0x211] = 1
	copy(kernel[0x22c:], "\xff\xff\xff\x7f") // highest address of the initrd
	return kernel
}

// blankSpec is a guest whose firmware is empty: QEMU starts it, and it hangs.
func blankSpec(t *testing.T, h *rig.Host) vm.Spec {
	t.Helper()
	pspSocket(t, h)
	addTap(t, h, "na0")
	blank := make([]byte, 1<<20)
	return vm.Spec{
		GuestID: guestID, Generation: 1, VCPUs: 1, MemoryMiB: 256, CPUModel: "EPYC-v4",
		Firmware: write(t, h, "firmware", blank), Kernel: write(t, h, "kernel", blankKernel()), Initrd: write(t, h, "initrd", blank), Cmdline: "x",
		NIC: vm.NIC{Tap: "na0", MAC: "52:54:00:00:00:01"},
		TEE: vm.TEE{Emulated: &vm.Emulated{
			Policy: 0x30000, HostData: make([]byte, 32), HashTable: write(t, h, "table", blank), HashTableGPA: 0x810c00, PSPSocket: pspPath,
		}},
	}
}

func TestNamespacesReachTheOutsideAndNothingElse(t *testing.T) {
	h := newHost(t)
	routes := output(t, h, "ip", "route")
	if strings.Contains(routes, "default") || strings.Count(routes, "\n") != 1 || !strings.Contains(routes, "198.51.100.0/24 dev "+rig.Uplink) {
		t.Errorf("routes of the host are %q", routes)
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
	output(t, h, "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/%s", rig.BrokerName, port))
	// The outside sees one link per host, and none of the machine's.
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Name != "lo" && l.Name != "outside" && l.Name != "host0" {
			t.Errorf("the outside sees link %s", l.Name)
		}
	}
}

func TestWhatAHostWritesIsItsOwn(t *testing.T) {
	h := newHost(t)
	mark := "rig-" + strconv.Itoa(os.Getpid())
	for _, dir := range []string{"/run", "/etc", "/var/lib", "/var/cache", "/var/lib/libvirt", "/etc/libvirt"} {
		path := filepath.Join(dir, mark)
		output(t, h, "touch", path)
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is seen outside the host: %v", path, err)
		}
		if _, err := os.Stat(h.Path(path)); err != nil {
			t.Errorf("Path does not lead to %s: %v", path, err)
		}
	}
	shared := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(shared, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text := output(t, h, "cat", shared); text != "content" {
		t.Errorf("the host reads %q from the scratch folder", text)
	}
	if dir := strings.TrimSpace(output(t, h, "mktemp", "-u")); !strings.HasPrefix(dir, "/run/tmp/") {
		t.Errorf("the host's temporary files go to %s", dir)
	}
}

func TestTheNextHostNeedNotAskQEMUAgain(t *testing.T) {
	const dir = "/var/cache/libvirt/qemu/capabilities"
	cached := func(h *rig.Host) string {
		output(t, h, "virsh", "-q", "-c", rig.LibvirtURI, "domcapabilities", "--virttype", "qemu", "--arch", "x86_64")
		return output(t, h, "bash", "-c", "cat "+dir+"/*.xml | sha256sum; stat -c %y "+dir+"/*.xml")
	}
	if !rig.Capable() {
		skip.Missing(t, "root")
	}
	h, err := rig.NewHost(t.Context(), 0, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	first := cached(h)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = newHost(t)
	before := output(t, h, "bash", "-c", "cat "+dir+"/*.xml | sha256sum; stat -c %y "+dir+"/*.xml")
	if !strings.HasPrefix(before, strings.Fields(first)[0]) || cached(h) != before {
		t.Errorf("the second host's libvirtd asked QEMU again: %q, then %q", before, cached(h))
	}
}

// A thread left in the host's network namespace would be taken for a process
// of the host and killed with it.
func TestListeningOnAHostLeavesEveryThreadAtHome(t *testing.T) {
	h := newHost(t)
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		ln, err := h.Listen(t.Context(), "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, port, err := net.SplitHostPort(ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		output(t, h, "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/"+port)
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
	}
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(threads) == 0 {
		t.Fatal(threads, err)
	}
	for _, thread := range threads {
		if at, err := os.Readlink(thread); err == nil && at != home {
			t.Errorf("%s is %s, home is %s", thread, at, home)
		}
	}
}
