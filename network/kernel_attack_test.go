package network

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// drops sums the counters of the rules that drop.
func drops(t *testing.T) int {
	t.Helper()
	return dropsBy(t, "", "")
}

// dropsBy sums those of one chain and reason, "" for any.
func dropsBy(t *testing.T, chain, why string) (n int) {
	t.Helper()
	var doc struct {
		Nftables []struct {
			Rule *struct {
				Chain, Comment string
				Expr           []map[string]json.RawMessage
			}
		}
	}
	if err := json.Unmarshal([]byte(nftTool(t, "--json", "list", "ruleset")), &doc); err != nil {
		t.Fatal(err)
	}
	for _, o := range doc.Nftables {
		if o.Rule == nil || chain != "" && o.Rule.Chain != chain || why != "" && o.Rule.Comment != why {
			continue
		}
		for _, e := range o.Rule.Expr {
			var c struct{ Packets int }
			if raw, ok := e["counter"]; ok {
				if err := json.Unmarshal(raw, &c); err != nil {
					t.Fatal(err)
				}
				n += c.Packets
			}
		}
	}
	return n
}

// ear counts frames of an attacker that arrive in a namespace.
type ear struct {
	heard atomic.Int64
	last  atomic.Value
}

// listenIn hears every frame of a link. It must run on a thread of the
// namespace.
func (e *ear) listenIn(t *testing.T, link string) error {
	t.Helper()
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	all := uint16(unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index}); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	f := os.NewFile(uintptr(fd), "frames of "+link)
	t.Cleanup(func() { _ = f.Close() }) // ends the listening
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			if bytes.Contains(buf[:n], []byte(marker)) {
				e.heard.Add(1)
				e.last.Store(fmt.Sprintf("on %s: % x", link, buf[:n]))
			}
		}
	}()
	return nil
}

// hostServices are what a host may run; a guest reaches none of them. The ear
// hears what a socket gets.
func (e *ear) hostServices(t *testing.T) {
	t.Helper()
	for _, port := range []int{22, 53, 67, 68, 111, 443, 546, 547, 2375, 5353, 6443, 16509} {
		c, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
		l, tcpErr := net.Listen("tcp", fmt.Sprint(":", port)) //nolint:noctx // ends with the test
		if err := errors.Join(err, tcpErr); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = c.Close(), l.Close() })
		go func() {
			buf := make([]byte, 2048)
			for {
				n, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				e.heard.Add(1)
				e.last.Store(fmt.Sprintf("UDP port %d from %v: %q", port, from, buf[:n]))
			}
		}()
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				e.heard.Add(1)
				e.last.Store(fmt.Sprintf("TCP port %d from %v", port, conn.RemoteAddr()))
				_ = conn.Close()
			}
		}()
	}
}

// learnt is what a guest could teach the host.
func learnt(t *testing.T, device string) string {
	t.Helper()
	l, err := netlink.LinkByName(device)
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	routes, routeErr := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err := errors.Join(err, routeErr); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range addrs {
		out = append(out, fmt.Sprint(a.LinkIndex, " ", a.IPNet))
	}
	for _, r := range routes {
		if r.Type == unix.RTN_UNICAST {
			out = append(out, fmt.Sprint(r.LinkIndex, " ", r.Dst, " ", r.Gw))
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.NeighList(l.Attrs().Index, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range list {
			if !n.IP.IsMulticast() && n.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE|unix.NUD_NOARP) == 0 {
				out = append(out, fmt.Sprint(n.IP, " is at ", n.HardwareAddr))
			}
		}
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

const agentEnv = "NODEAGENT_NETWORK_AGENT"

// runAgent is a process that owns the rules, as the agent does, until it is
// killed.
func runAgent(t *testing.T) {
	t.Helper()
	h, err := New(testConfig(), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Adopt(t.Context(), []Guest{testGuest(1), testGuest(2)}); err != nil {
		t.Fatal(err)
	}
	fmt.Println("in force")
	t.Fatal(h.Run(t.Context()))
}

// startAgent returns when the rules are in force.
func startAgent(t *testing.T) *exec.Cmd {
	t.Helper()
	agent := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$")
	agent.Env = append(os.Environ(), agentEnv+"=1")
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	want := "in force\n"
	if got, err := io.ReadAll(io.LimitReader(out, int64(len(want)))); err != nil || string(got) != want {
		t.Fatalf("the agent says %q, %v", got, err)
	}
	return agent
}

// battle is two guests, one of which attacks, and everybody who listens.
type battle struct {
	w        *world
	bad      *machine
	attacker attacker
	ear      ear
}

func newBattle(t *testing.T) *battle {
	t.Helper()
	b := &battle{w: newWorld(t, nil)}
	b.bad = b.w.plug(t, testGuest(1))
	other := b.w.plug(t, testGuest(2))
	device, err := netlink.LinkByName(b.bad.link.Device)
	if err != nil {
		t.Fatal(err)
	}
	b.attacker = attacker{t, b.bad.guest, b.bad.link, device.Attrs().HardwareAddr, other}
	b.w.outside.do(t, func() error { return b.ear.listenIn(t, "up0") })
	other.do(t, func() error { return b.ear.listenIn(t, "eth0") })
	b.ear.hostServices(t)
	if err := serve(t, ":80"); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *battle) send(t *testing.T, frames [][]byte) {
	t.Helper()
	for _, f := range frames {
		if _, err := b.bad.tap.Write(f); err != nil && !errors.Is(err, unix.EIO) {
			t.Fatalf("sending % x: %v", f, err)
		}
	}
}

// allowed is what the attacker may do, and what happens after all it sent.
func (b *battle) allowed(t *testing.T) {
	t.Helper()
	b.bad.do(t, func() error {
		_, _, meta := reach("[fe80::1%eth0]:80", "")
		who, _, err := reach(outsideAddr+service, "")
		if err == nil && who != hostAddr {
			err = fmt.Errorf("outside sees %s", who)
		}
		return errors.Join(meta, err)
	})
}

// quiet fails when anything of the attack arrived.
func (b *battle) quiet(t *testing.T, when string) {
	t.Helper()
	if n := b.ear.heard.Swap(0); n > 0 {
		t.Errorf("%s: %d frames arrived, the last %v", when, n, b.ear.last.Load())
	}
}

func TestKernelAttacksAreDroppedAndCounted(t *testing.T) {
	if os.Getenv(agentEnv) != "" {
		runAgent(t)
		return
	}
	if !inside(t) {
		return
	}
	agent := startAgent(t)
	b := newBattle(t)
	b.allowed(t)
	before := learnt(t, b.bad.link.Device)
	campaign := func(when string, counted bool) {
		t.Helper()
		for _, a := range b.attacker.attacks() {
			if !counted { // a broadcast from nowhere has no reverse path to fail
				a.frames = slices.DeleteFunc(a.frames, fromNowhere)
			}
			start := drops(t)
			b.send(t, a.frames)
			if n := drops(t) - start; counted && n < len(a.frames) {
				t.Errorf("%s, %s: %d of %d frames are counted as dropped", when, a.name, n, len(a.frames))
			}
			b.quiet(t, when+", "+a.name)
		}
		if now := learnt(t, b.bad.link.Device); now != before {
			t.Errorf("%s: the host learnt\n%s\nbefore\n%s", when, now, before)
		}
	}
	campaign("the agent lives", true)
	b.allowed(t)

	// It dies in the middle of an attack.
	dead := make(chan error, 1)
	time.AfterFunc(20*time.Millisecond, func() { dead <- errors.Join(agent.Process.Kill(), ignoreExit(agent.Wait())) })
	for ended := false; !ended; {
		select {
		case err := <-dead:
			if err != nil {
				t.Fatal(err)
			}
			ended = true
		default:
			campaign("the agent dies", true)
		}
	}
	campaign("the agent is dead", true)
	b.allowed(t)

	// Nobody is left to put the rules back.
	nftTool(t, "flush", "ruleset")
	campaign("no rules and no agent", false)
	b.bad.do(t, func() error {
		return errors.Join(blockedDial(outsideAddr+service), blockedDial("[fe80::1%eth0]:80"), blockedDial("[fe80::1%eth0]:22"),
			blockedDial(hostAddr+":22"), blockedDial(b.bad.link.HostAddr.Addr().String()+":22"))
	})
	b.quiet(t, "no rules and no agent")

	startAgent(t)
	eventually(t, "the next agent serves", func() bool {
		return b.bad.try(func() error { _, _, err := reach(outsideAddr+service, ""); return err }) == nil
	})
	b.allowed(t)
	campaign("the next agent lives", true)
}

// fromNowhere is what a client sends that has no address yet.
func fromNowhere(frame []byte) bool {
	const addresses = 14 + 12 // of the IPv4 header, after Ethernet's
	return bytes.Equal(frame[addresses:addresses+8], []byte{0, 0, 0, 0, 255, 255, 255, 255})
}

func ignoreExit(err error) error {
	if errors.As(err, new(*exec.ExitError)) {
		return nil
	}
	return err
}
