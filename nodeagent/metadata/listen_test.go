package metadata

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/skip"
)

const insideEnv = "NODEAGENT_METADATA_TEST"

// inside returns true in a network namespace of the test's own; elsewhere it
// runs the test there.
func inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideEnv) == t.Name() {
		return true
	}
	t.Parallel()
	if os.Geteuid() != 0 {
		skip.Missing(t, "root")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), insideEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) {
		skip.Missing(t, "network namespaces")
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("in its namespace: %v\n%s", err, out)
	}
	return false
}

// device makes one end of a pair that stands for a tap.
func device(t *testing.T, name string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: name + "g"}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName(name + "g")
	if err = errors.Join(err, netlink.LinkSetUp(veth), netlink.LinkSetUp(peer)); err != nil {
		t.Fatal(err)
	}
	return veth
}

func giveAddress(t *testing.T, l netlink.Link) {
	t.Helper()
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(contract.MetadataAddr), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
	if err := netlink.AddrAdd(l, addr); err != nil {
		t.Fatal(err)
	}
}

func TestListenerWaitsForTheAddressOfItsDevice(t *testing.T) {
	if !inside(t) {
		return
	}
	one, two := device(t, "na00000001"), device(t, "na00000002")
	giveAddress(t, two)
	srv := New(hclog.NewNullLogger(), time.Now)
	defer func() {
		if err := srv.Shutdown(); err != nil {
			t.Error(err)
		}
	}()
	open := func(id, dev string) error {
		x := testSession(&sink{})
		x.ID, x.Device = id, dev
		return srv.Open(t.Context(), x)
	}
	if err := open("two", "na00000002"); err != nil {
		t.Fatal(err)
	}
	opened := make(chan error)
	go func() { opened <- open("one", "na00000001") }()
	timer := time.NewTimer(5 * listenRetry)
	defer timer.Stop()
	select {
	case err := <-opened:
		t.Fatalf("opened before the address was there: %v", err)
	case <-timer.C:
	}
	giveAddress(t, one)
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	// A device of the same name made anew, as after a quick relaunch.
	if err := errors.Join(srv.Close("one"), netlink.LinkDel(one)); err != nil {
		t.Fatal(err)
	}
	giveAddress(t, device(t, "na00000001"))
	if err := open("one", "na00000001"); err != nil {
		t.Fatal(err)
	}
	// Only that device's own address answers.
	lo, err := netlink.LinkByName("lo")
	if err = errors.Join(err, netlink.LinkSetUp(lo)); err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{"127.0.0.1:80", "[::1]:80"} {
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(t.Context(), "tcp", addr)
		if err == nil {
			conn.Close() //nolint:errcheck // a client's end
			t.Errorf("the service answers on %s", addr)
		}
	}
}

func TestListenerGivesUpWithTheContext(t *testing.T) {
	if !inside(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	srv := New(hclog.NewNullLogger(), time.Now)
	if err := srv.Open(ctx, testSession(&sink{})); err == nil || !strings.Contains(err.Error(), "no such device") {
		t.Errorf("opening on a missing device: %v", err)
	}
}
