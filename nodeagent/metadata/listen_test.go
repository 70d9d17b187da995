package metadata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
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

// guestEnd runs f beyond a device, where a guest is that has these addresses.
func guestEnd(t *testing.T, device string, addrs []string, f func(zone string) error) {
	t.Helper()
	peer, err := netlink.LinkByName(device + "g")
	if err != nil {
		t.Fatal(err)
	}
	thread, moved, done := make(chan int), make(chan struct{}), make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		_, err := netns.New()
		thread <- unix.Gettid()
		<-moved
		link, lookup := netlink.LinkByName(device + "g")
		if err = errors.Join(err, lookup); err != nil {
			done <- err
			return
		}
		for _, a := range addrs {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(a), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
			err = errors.Join(err, netlink.AddrAdd(link, addr))
		}
		err = errors.Join(err, netlink.LinkSetUp(link))
		if err == nil {
			err = f(fmt.Sprint(link.Attrs().Index))
		}
		done <- err
	}()
	if err := netlink.LinkSetNsPid(peer, <-thread); err != nil {
		t.Error(err)
	}
	close(moved)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What the firewall of the tap drops before, and what is refused without it: a
// guest that asks with another guest's address, on its own device.
func TestAGuestWithAnothersAddressIsNotAnswered(t *testing.T) {
	if !inside(t) {
		return
	}
	srv := New(hclog.NewNullLogger(), time.Now)
	sinks := map[string]*sink{"fe80::a": {}, "fe80::b": {}}
	for n, addr := range []string{"fe80::a", "fe80::b"} {
		name := fmt.Sprintf("na0000000%d", n+1)
		giveAddress(t, device(t, name))
		x := testSession(sinks[addr])
		x.ID, x.Device, x.Peer, x.Manifest = name, name, netip.MustParseAddr(addr), []byte(addr)
		if err := srv.Open(t.Context(), x); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(from, zone string) string {
		local := &net.TCPAddr{IP: net.ParseIP(from), Zone: zone}
		conn, err := (&net.Dialer{LocalAddr: local, Timeout: 5 * time.Second}).DialContext(t.Context(), "tcp", "[fe80::1%"+zone+"]:80")
		if err != nil {
			return err.Error()
		}
		defer conn.Close() //nolint:errcheck // a client's end
		if _, err = io.WriteString(conn, "GET /v1/manifest HTTP/1.1\r\nHost: a\r\n"+contract.MetadataHeader+": 1\r\nConnection: close\r\n\r\n"); err != nil {
			return err.Error()
		}
		answer, err := io.ReadAll(conn)
		if err != nil {
			return err.Error()
		}
		return string(answer)
	}
	for n, own := range []string{"fe80::a", "fe80::b"} {
		guestEnd(t, fmt.Sprintf("na0000000%d", n+1), []string{"fe80::a", "fe80::b", "fe80::c"}, func(zone string) error {
			for _, from := range []string{"fe80::a", "fe80::b", "fe80::c"} {
				answer := ask(from, zone)
				if strings.HasSuffix(answer, "\r\n\r\n"+own) != (from == own) || (from != own && strings.Contains(answer, "HTTP/1.1")) {
					t.Errorf("on the device of %s, %s is answered %q", own, from, answer)
				}
			}
			return nil
		})
	}
	if err := srv.Shutdown(); err != nil {
		t.Error(err)
	}
}
