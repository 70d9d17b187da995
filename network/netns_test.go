package network

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
	"unsafe"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/tests/skip"
)

// Tests in kernel_test.go run the real nft and netlink. Each one runs the test
// binary again in a network namespace of its own, so that nothing of the
// machine's network is seen or touched and the end of the process cleans up.
//
//	guest ns: eth0 ─ frames copied by this process, as QEMU does ─ na0000000N :host ns: uplink ─ veth ─ outside ns
const insideEnv = "NODEAGENT_NETWORK_TEST"

// inside returns true in the namespace; elsewhere it runs the test there.
func inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideEnv) == t.Name() {
		return true
	}
	t.Parallel()
	if os.Geteuid() != 0 {
		skip.Missing(t, "root")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		skip.Missing(t, "nft (package nftables)")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		skip.Missing(t, "/dev/net/tun")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
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

// space is a namespace with a thread of its own.
type space struct{ work chan func() }

func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		_, err := netns.New()
		ready <- err
		for f := range s.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(s.work) })
	s.do(t, func() error {
		// Waiting for duplicates would take each guest a second and a half.
		return errors.Join(os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644), up("lo"))
	})
	return s
}

// do runs f in the namespace.
func (s *space) do(t *testing.T, f func() error) {
	t.Helper()
	if err := s.try(f); err != nil {
		t.Fatal(err)
	}
}

func (s *space) try(f func() error) error {
	done := make(chan error, 1)
	s.work <- func() { done <- f() }
	return <-done
}

func up(link string, addrs ...string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrReplace(l, addr); err != nil {
			return fmt.Errorf("adding %s to %s: %w", a, link, err)
		}
	}
	return netlink.LinkSetUp(l)
}

func route(link, dst, via string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	_, to, err := net.ParseCIDR(dst)
	if err != nil {
		return err
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: to, Gw: net.ParseIP(via)})
}

// world is a host with its outside.
type world struct {
	host    *Host
	outside *space
}

const (
	outsideAddr = "198.51.100.1"
	hostAddr    = "198.51.100.2"
	service     = ":7000"
)

// privateAddrs are served by the outside and must not be reached by guests.
func privateAddrs() []string {
	return []string{"10.9.9.9", "172.16.3.3", "192.168.5.5", "169.254.169.254", "100.64.1.1"}
}

// newWorld plugs the host's uplink into an outside that has private networks
// behind it, and starts a service there that says who is calling.
func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	w := &world{outside: newSpace(t)}
	cfg := testConfig()
	cfg.RunDir = t.TempDir()
	if change != nil {
		change(&cfg)
	}
	host, err := New(cfg, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	w.host = host
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "uplink"
	var tid int
	w.outside.do(t, func() error { tid = unix.Gettid(); return nil })
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "up0", PeerNamespace: netlink.NsPid(tid)}); err != nil {
		t.Fatal(err)
	}
	w.outside.do(t, func() error {
		addrs := []string{outsideAddr + "/24", "2001:db8::1/64"}
		for _, a := range privateAddrs() {
			addrs = append(addrs, a+"/32")
		}
		return errors.Join(up("up0", addrs...), route("up0", "10.213.0.0/16", hostAddr), serve(t, service))
	})
	if err := errors.Join(up("lo"), up("uplink", hostAddr+"/24", "2001:db8::2/64"), route("uplink", "0.0.0.0/0", outsideAddr)); err != nil {
		t.Fatal(err)
	}
	if err := host.HoldForwarding(); err != nil {
		t.Fatal(err)
	}
	return w
}

// serve answers every connection with the caller's address and stays open. It
// must run on a thread of the namespace.
func serve(t *testing.T, addr string) error {
	t.Helper()
	l, err := net.Listen("tcp", addr) //nolint:noctx // ends with the test
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				buf := make([]byte, 64)
				_, err := io.WriteString(conn, conn.RemoteAddr().String()+"\n")
				for err == nil {
					var n int
					if n, err = conn.Read(buf); err == nil {
						_, err = conn.Write(buf[:n])
					}
				}
			}()
		}
	}()
	return nil
}

// reach dials and returns what the service says.
func reach(addr, from string) (string, net.Conn, error) {
	d := net.Dialer{Timeout: 3 * time.Second}
	if from != "" {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from))
		d.Timeout = blocked
	}
	conn, err := d.DialContext(context.Background(), "tcp", addr)
	if err != nil {
		return "", nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", nil, err
	}
	buf := make([]byte, 64)
	n, err := conn.Read(buf)
	if err != nil {
		return "", nil, err
	}
	who, _, err := net.SplitHostPort(strings.TrimSpace(string(buf[:n])))
	return who, conn, err
}

// blocked is how long an attempt that must fail is given. A first SYN over
// these links is answered within a millisecond.
const blocked = 300 * time.Millisecond

func blockedDial(addr string) error {
	d := net.Dialer{Timeout: blocked}
	conn, err := d.DialContext(context.Background(), "tcp", addr)
	if err != nil {
		return nil //nolint:nilerr // what is wanted
	}
	return errors.Join(fmt.Errorf("%s was reached", addr), conn.Close())
}

// machine is a guest: a namespace behind a tap.
type machine struct {
	*space
	guest Guest
	link  Link
	tap   *os.File
}

// boot starts a machine on a guest's tap.
func (w *world) boot(t *testing.T, g Guest) *machine {
	t.Helper()
	if err := w.host.Add(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	return w.plug(t, g)
}

// plug starts a machine on the tap of a guest that has its network.
func (w *world) plug(t *testing.T, g Guest) *machine {
	t.Helper()
	l, err := Describe(w.host.cfg, g)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{space: newSpace(t), guest: g, link: l}
	if m.tap, err = openTap(l.Tap); err != nil {
		t.Fatal(err)
	}
	var nic *os.File
	m.do(t, func() (err error) {
		if nic, err = openTap("eth0"); err != nil {
			return err
		}
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(eth, g.MAC); err != nil {
			return err
		}
		return errors.Join(up("eth0", l.GuestAddr.String()), route("eth0", "0.0.0.0/0", l.HostAddr.Addr().String()), serve(t, service))
	})
	go copyFrames(m.tap, nic)
	go copyFrames(nic, m.tap)
	t.Cleanup(func() { _, _ = m.tap.Close(), nic.Close() }) // ends the copying
	eventually(t, "the guest has a link-local address", func() bool { return m.try(m.ready) == nil })
	return m
}

func (m *machine) ready() error {
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addrs, err := netlink.AddrList(eth, netlink.FAMILY_V6)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip == m.link.GuestLinkLocal && a.Flags&unix.IFA_F_TENTATIVE == 0 {
			return nil
		}
	}
	return fmt.Errorf("no %s among %v", m.link.GuestLinkLocal, addrs)
}

// openTap attaches to a tap, or makes one.
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var req struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], name)
	req.flags = unix.IFF_TAP | unix.IFF_NO_PI
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return nil, errors.Join(fmt.Errorf("attaching to %s: %w", name, errno), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

func copyFrames(to, from *os.File) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil && !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EAGAIN) {
			return // EIO: the other link is down, frames are lost
		}
	}
}

// nftTool runs nft as an administrator would.
func nftTool(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %q: %v: %s", args, err, out)
	}
	return string(out)
}
