package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestKernelGuestReachesTheOutsideAsTheHost(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	m.do(t, func() error {
		who, _, err := reach(outsideAddr+service, "")
		if err == nil && who != hostAddr {
			err = fmt.Errorf("outside sees %s, want the host's %s", who, hostAddr)
		}
		return err
	})
}

func TestKernelDeniedDestinationsAreDropped(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	for _, a := range privateAddrs() {
		if _, _, err := reach(a+service, ""); err != nil {
			t.Fatalf("the host itself does not reach %s: %v", a, err)
		}
		m.do(t, func() error { return blockedDial(a + service) })
	}
}

func TestKernelOperatorMayAllowAPrivateNetwork(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, func(c *Config) { c.AllowPrivateEgress = prefixes("192.168.0.0/16", "192.168.5.0/24", "10.9.9.0/24") })
	m := w.boot(t, testGuest(1))
	m.do(t, func() error {
		_, _, err1 := reach("192.168.5.5"+service, "")
		_, _, err2 := reach("10.9.9.9"+service, "")
		return errors.Join(err1, err2, blockedDial("172.16.3.3"+service))
	})
}

func TestKernelHostOffersGuestsMetadataOnly(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	if err := errors.Join(serve(t, service), serve(t, ":80")); err != nil {
		t.Fatal(err)
	}
	m.do(t, func() error {
		_, _, err := reach("[fe80::1%eth0]:80", "")
		for _, a := range []string{
			"[fe80::1%eth0]" + service, m.link.HostAddr.Addr().String() + service, hostAddr + service,
			m.link.HostAddr.Addr().String() + ":80", hostAddr + ":80",
		} {
			err = errors.Join(err, blockedDial(a))
		}
		return err
	})
	// Another address of the host's on the same link is not metadata's.
	if err := up(m.link.Device, "fe80::2/64"); err != nil {
		t.Fatal(err)
	}
	m.do(t, func() error { return blockedDial("[fe80::2%eth0]:80") })
}

func TestKernelGuestsDoNotReachEachOther(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	second := testGuest(2)
	second.Ports = []Publish{{20000, 7000}}
	a, b := w.boot(t, testGuest(1)), w.boot(t, second)
	w.outside.do(t, func() error {
		who, _, err := reach(hostAddr+":20000", "")
		if err == nil && who != outsideAddr {
			err = fmt.Errorf("guest sees %s, want %s", who, outsideAddr)
		}
		return errors.Join(err, blockedDial(hostAddr+":20001"), blockedDial(b.link.GuestAddr.Addr().String()+service))
	})
	a.do(t, func() error {
		return errors.Join(blockedDial(b.link.GuestAddr.Addr().String()+service),
			blockedDial(hostAddr+":20000"), blockedDial(a.link.HostAddr.Addr().String()+":20000"),
			blockedDial(b.link.HostAddr.Addr().String()+":20000"), blockedDial(fmt.Sprintf("[%s%%eth0]%s", b.link.GuestLinkLocal, service)))
	})
	b.do(t, func() error { return blockedDial(a.link.GuestAddr.Addr().String() + service) })
}

func TestKernelSpoofedSendersAreDropped(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m, other := w.boot(t, testGuest(1)), w.boot(t, testGuest(2))
	if err := serve(t, ":80"); err != nil {
		t.Fatal(err)
	}
	var heard *net.UDPConn
	w.outside.do(t, func() (err error) {
		heard, err = net.ListenUDP("udp", &net.UDPAddr{Port: 7001})
		return err
	})
	send := func(from string, to netip.Addr, text string) error {
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(from)}, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 7001)))
		if err != nil {
			return err
		}
		_, err = c.Write([]byte(text))
		return errors.Join(err, c.Close())
	}
	v4 := netip.MustParseAddr(outsideAddr)
	forged := []string{other.link.GuestAddr.Addr().String(), m.link.HostAddr.Addr().String(), hostAddr, "198.51.100.77", "203.0.113.5"}
	m.do(t, func() error {
		var err error
		for _, a := range forged {
			err = errors.Join(err, up("eth0", a+"/32"))
		}
		l, lookup := netlink.LinkByName("eth0")
		if err = errors.Join(err, lookup); err != nil {
			return err
		}
		for _, a := range forged {
			err = errors.Join(err, send(a, v4, "forged "+a))
		}
		for _, a := range forged {
			addr, parse := netlink.ParseAddr(a + "/32")
			err = errors.Join(err, parse, netlink.AddrDel(l, addr))
		}
		// A stolen link-local address, and a global one.
		err = errors.Join(err, up("eth0", "fe80::bad/64", "2001:db8:1::2/64"), route("eth0", "2001:db8::/64", metadataAddr))
		if _, _, stolen := reach("[fe80::1%eth0]:80", "[fe80::bad%eth0]:0"); stolen == nil {
			err = errors.Join(err, errors.New("metadata answers a stolen link-local address"))
		}
		err = errors.Join(err, send("2001:db8:1::2", netip.MustParseAddr("2001:db8::1"), "forged IPv6"))
		// A stolen MAC.
		err = errors.Join(err, netlink.LinkSetHardwareAddr(l, other.guest.MAC), send("", v4, "forged MAC"),
			netlink.LinkSetHardwareAddr(l, m.guest.MAC))
		return errors.Join(err, send("", v4, "honest"))
	})
	buf := make([]byte, 64)
	if err := heard.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	// The honest datagram was sent last, over the same links.
	n, from, err := heard.ReadFromUDP(buf)
	if err != nil || string(buf[:n]) != "honest" {
		t.Errorf("the outside hears %q from %v, %v", buf[:n], from, err)
	}
}

// arp is an ARP request; linklayer is from.
func arp(from net.HardwareAddr, sender netip.Addr, target netip.Addr) []byte {
	f := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, from...)
	f = append(f, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1)
	f = append(f, from...)
	f = append(f, sender.AsSlice()...)
	f = append(f, make([]byte, 6)...)
	return append(f, target.AsSlice()...)
}

// solicit is a neighbour solicitation for fe80::1 with a valid checksum.
func solicit(from net.HardwareAddr, src netip.Addr) []byte {
	dst := netip.MustParseAddr(metadataAddr)
	msg := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, dst.AsSlice()...)
	msg = append(msg, 1, 1)
	msg = append(msg, from...)
	pseudo := append(src.AsSlice(), dst.AsSlice()...)
	pseudo = append(pseudo, 0, 0, 0, byte(len(msg)), 0, 0, 0, unix.IPPROTO_ICMPV6)
	var sum uint32
	for _, part := range [][]byte{pseudo, msg} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(msg[2:], ^uint16(sum))
	f := append([]byte{0x33, 0x33, 0xff, 0, 0, 1}, from...)
	f = append(f, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(msg)), unix.IPPROTO_ICMPV6, 255)
	f = append(f, src.AsSlice()...)
	f = append(f, dst.AsSlice()...)
	return append(f, msg...)
}

func neighbours(t *testing.T, tap string) (out []netip.Addr) {
	t.Helper()
	l, err := netlink.LinkByName(tap)
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.NeighList(l.Attrs().Index, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range list {
			if ip, ok := netip.AddrFromSlice(n.IP); ok && !ip.IsMulticast() {
				out = append(out, ip.Unmap())
			}
		}
	}
	return out
}

func TestKernelGuestCannotFillTheHostsNeighbourTables(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	for i := range 200 {
		src := netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 14: byte(i), 15: 0x77})
		sender := netip.AddrFrom4([4]byte{10, 213, 0, byte(i)})
		mac := net.HardwareAddr{0x52, 0x54, 0, 9, 9, byte(i)}
		for _, frame := range [][]byte{
			solicit(m.guest.MAC, src), solicit(mac, m.link.GuestLinkLocal), arp(mac, sender, m.link.HostAddr.Addr()),
			arp(m.guest.MAC, sender, m.link.HostAddr.Addr()), arp(m.guest.MAC, sender, netip.MustParseAddr(hostAddr)),
		} {
			if _, err := m.tap.Write(frame); err != nil {
				t.Fatal(err)
			}
		}
	}
	// An honest exchange after the flood, so that all frames were seen.
	m.do(t, func() error { _, _, err := reach(outsideAddr+service, ""); return err })
	for _, ip := range neighbours(t, m.link.Device) {
		if ip != m.link.GuestAddr.Addr() && ip != m.link.GuestLinkLocal {
			t.Errorf("the host learnt %s from the guest", ip)
		}
	}
}

func TestKernelConnectionsOfOneGuestAreLimited(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m, other := w.boot(t, testGuest(1)), w.boot(t, testGuest(2))
	flood := func() error {
		eth, err := netlink.LinkByName("eth0")
		if err = errors.Join(err, netlink.LinkSetTxQLen(eth, 2*maxConnections)); err != nil {
			return err
		}
		c, err := net.ListenUDP("udp", nil)
		if err != nil {
			return err
		}
		to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(outsideAddr + ":10000"))
		for range maxConnections + 500 {
			to.Port++
			if _, err := c.WriteToUDP([]byte("x"), to); err != nil {
				return err
			}
		}
		return c.Close()
	}
	held := func() (n int) {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Forward.SrcIP.Equal(m.link.GuestAddr.Addr().AsSlice()) {
				n++
			}
		}
		return n
	}
	eventually(t, "the guest holds all it may", func() bool {
		m.do(t, flood) // again and again: queues on a busy host lose some
		return held() >= maxConnections
	})
	m.do(t, func() error { return blockedDial(outsideAddr + service) })
	if n := held(); n != maxConnections {
		t.Errorf("the guest holds %d connections, limit is %d", n, maxConnections)
	}
	other.do(t, func() error { _, _, err := reach(outsideAddr+service, ""); return err })
}

func TestKernelPacketsOfOneGuestAreLimited(t *testing.T) {
	if !inside(t) {
		return
	}
	const flood = 3000
	w := newWorld(t, func(c *Config) { c.MaxGuestPackets = 200 })
	m, other := w.boot(t, testGuest(1)), w.boot(t, testGuest(2))
	m.do(t, func() error {
		eth, err := netlink.LinkByName("eth0")
		if err = errors.Join(err, netlink.LinkSetTxQLen(eth, 2*flood)); err != nil {
			return err
		}
		c, err := (&net.Dialer{}).DialContext(t.Context(), "udp", outsideAddr+":9")
		if err != nil {
			return err
		}
		for range flood {
			if _, err := c.Write([]byte("x")); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return c.Close()
	})
	other.do(t, func() error { _, _, err := reach(outsideAddr+service, ""); return err })
	const why = "packets of one guest"
	eventually(t, "the flood is over", func() bool { return dropsBy(t, "in_"+m.link.Tap, why) > flood/3 })
	if n := dropsBy(t, "in_"+other.link.Tap, why); n > 0 {
		t.Errorf("%d packets of the other guest were dropped", n)
	}
	eventually(t, "the guest may send again", func() bool {
		return m.try(func() error { _, _, err := reach(outsideAddr+service, ""); return err }) == nil
	})
}

func TestKernelARPOfOneGuestIsLimited(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	for range 4 * neighbourBurst {
		if _, err := m.tap.Write(arp(m.guest.MAC, m.link.GuestAddr.Addr(), m.link.HostAddr.Addr())); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "most of it is dropped", func() bool { return dropsBy(t, "in_"+m.link.Tap, "ARP is broadcast") > 2*neighbourBurst })
	m.do(t, func() error { _, _, err := reach(outsideAddr+service, ""); return err })
}
