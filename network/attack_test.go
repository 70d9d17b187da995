package network

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// marker is in every frame of an attacker.
const marker = "\xfa\xceATTACK\xce\xfa"

// attack is frames that must reach nobody.
type attack struct {
	name   string
	frames [][]byte
}

// attacker crafts frames in the place of a guest.
type attacker struct {
	t     *testing.T
	guest Guest
	link  Link
	// gateway is the MAC address of the host's end.
	gateway net.HardwareAddr
	other   *machine
}

func broadcastMAC() net.HardwareAddr { return net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} }

func (a attacker) frame(parts ...gopacket.SerializableLayer) []byte {
	a.t.Helper()
	for i, p := range parts {
		var network gopacket.NetworkLayer
		if i > 0 {
			network, _ = parts[i-1].(gopacket.NetworkLayer)
		}
		c, ok := p.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		})
		if !ok || network == nil {
			continue
		}
		if err := c.SetNetworkLayerForChecksum(network); err != nil {
			a.t.Fatal(err)
		}
	}
	buf := gopacket.NewSerializeBuffer()
	opts := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buf, opts, parts...); err != nil {
		a.t.Fatal(err)
	}
	// Beyond the packet: padding of the frame.
	return append(bytes.Clone(buf.Bytes()), marker...)
}

func (a attacker) eth(kind layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: a.guest.MAC, DstMAC: a.gateway, EthernetType: kind}
}

func (a attacker) to(dst net.HardwareAddr, kind layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: a.guest.MAC, DstMAC: dst, EthernetType: kind}
}

func (a attacker) own() net.IP  { return a.link.GuestAddr.Addr().AsSlice() }
func (a attacker) own6() net.IP { return a.link.GuestLinkLocal.AsSlice() }

func ip4(src, dst net.IP, proto layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Id: 7, SrcIP: src, DstIP: dst, Protocol: proto}
}

func ip6(src, dst net.IP, next layers.IPProtocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 255, SrcIP: src, DstIP: dst, NextHeader: next}
}

func udp(from, to uint16) *layers.UDP {
	return &layers.UDP{SrcPort: layers.UDPPort(from), DstPort: layers.UDPPort(to)}
}

func syn(to uint16) *layers.TCP {
	return &layers.TCP{SrcPort: 40000, DstPort: layers.TCPPort(to), SYN: true, Window: 1000, Seq: 1}
}

func icmp6(kind uint8) *layers.ICMPv6 {
	return &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, 0)}
}

func text() gopacket.Payload { return gopacket.Payload(marker) }

func ip(s string) net.IP { return net.ParseIP(s) }

// attacks is everything that must be dropped and counted.
func (a attacker) attacks() []attack {
	return slices.Concat(a.spoofs(), a.arps(), a.neighbourDiscovery(), a.servers(), a.ethertypes(), a.oddities(), a.scans())
}

// spoofs send as somebody else, to an address that a guest may reach.
func (a attacker) spoofs() []attack {
	var macs, ips, ip6s attack
	macs.name, ips.name, ip6s.name = "spoofed MAC address", "spoofed IPv4 source", "spoofed IPv6 source"
	for _, mac := range []net.HardwareAddr{a.other.guest.MAC, a.gateway, broadcastMAC(), {0x02, 0, 0, 0, 0, 1}} {
		e := a.eth(layers.EthernetTypeIPv4)
		e.SrcMAC = mac
		macs.frames = append(macs.frames, a.frame(e, ip4(a.own(), ip(outsideAddr), layers.IPProtocolUDP), udp(1, 7001), text()))
	}
	for _, src := range []string{
		a.other.link.GuestAddr.Addr().String(), a.link.HostAddr.Addr().String(), hostAddr, outsideAddr, "203.0.113.9",
		"0.0.0.0", "127.0.0.1", "255.255.255.255", "10.213.0.4", "224.0.0.1",
	} {
		ips.frames = append(ips.frames, a.frame(a.eth(layers.EthernetTypeIPv4), ip4(ip(src), ip(outsideAddr), layers.IPProtocolUDP), udp(1, 7001), text()))
	}
	for _, src := range []string{a.other.link.GuestLinkLocal.String(), "fe80::bad", "fe80::1", "2001:db8::2", "::1", "::", "fd00::5"} {
		ip6s.frames = append(ip6s.frames, a.frame(a.eth(layers.EthernetTypeIPv6), ip6(ip(src), ip(metadataAddr), layers.IPProtocolTCP), syn(metadataPort), text()))
	}
	return []attack{macs, ips, ip6s}
}

// arps poison: replies and announcements for the host, neighbours, the router.
func (a attacker) arps() []attack {
	out := attack{name: "ARP poisoning"}
	for _, claimed := range []string{a.link.HostAddr.Addr().String(), a.other.link.GuestAddr.Addr().String(), hostAddr, outsideAddr} {
		for _, op := range []uint16{layers.ARPRequest, layers.ARPReply} {
			for _, target := range []string{claimed, a.link.HostAddr.Addr().String()} {
				out.frames = append(out.frames, a.frame(a.to(broadcastMAC(), layers.EthernetTypeARP), &layers.ARP{
					AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: op,
					SourceHwAddress: a.guest.MAC, SourceProtAddress: ip(claimed).To4(), DstHwAddress: make([]byte, 6), DstProtAddress: ip(target).To4(),
				}))
			}
		}
	}
	return []attack{out}
}

func (a attacker) neighbourDiscovery() []attack {
	nd := attack{name: "neighbour discovery spoofing"}
	all := net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
	for _, claimed := range []string{metadataAddr, a.other.link.GuestLinkLocal.String(), "2001:db8::1", "2001:db8::2"} {
		options := layers.ICMPv6Options{{Type: layers.ICMPv6OptTargetAddress, Data: a.guest.MAC}}
		advert := &layers.ICMPv6NeighborAdvertisement{Flags: 0x60, TargetAddress: ip(claimed), Options: options}
		nd.frames = append(nd.frames,
			a.frame(a.to(all, layers.EthernetTypeIPv6), ip6(a.own6(), ip("ff02::1"), layers.IPProtocolICMPv6), icmp6(layers.ICMPv6TypeNeighborAdvertisement), advert),
			a.frame(a.to(all, layers.EthernetTypeIPv6), ip6(ip(claimed), ip("ff02::1"), layers.IPProtocolICMPv6), icmp6(layers.ICMPv6TypeNeighborAdvertisement), advert))
	}
	// A solicitation answers with the address it comes from.
	source := layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: a.guest.MAC}}
	nd.frames = append(nd.frames, a.frame(a.to(all, layers.EthernetTypeIPv6), ip6(ip("fe80::77"), ip(metadataAddr), layers.IPProtocolICMPv6),
		icmp6(layers.ICMPv6TypeNeighborSolicitation), &layers.ICMPv6NeighborSolicitation{TargetAddress: ip(metadataAddr), Options: source}))
	ra := attack{name: "rogue router"}
	prefix := append([]byte{64, 0xc0, 0, 1, 0x51, 0x80, 0, 0, 0x38, 0x40, 0, 0, 0, 0}, ip("2001:db8:666::").To16()...)
	for _, src := range []net.IP{a.own6(), ip(metadataAddr)} {
		ra.frames = append(ra.frames,
			a.frame(a.to(all, layers.EthernetTypeIPv6), ip6(src, ip("ff02::1"), layers.IPProtocolICMPv6), icmp6(layers.ICMPv6TypeRouterAdvertisement),
				&layers.ICMPv6RouterAdvertisement{HopLimit: 64, RouterLifetime: 1800, Options: layers.ICMPv6Options{{Type: layers.ICMPv6OptPrefixInfo, Data: prefix}}}),
			a.frame(a.to(all, layers.EthernetTypeIPv6), ip6(src, ip(metadataAddr), layers.IPProtocolICMPv6), icmp6(layers.ICMPv6TypeRedirect),
				&layers.ICMPv6Redirect{TargetAddress: a.own6(), DestinationAddress: ip("2001:db8::1")}),
			a.frame(a.to(all, layers.EthernetTypeIPv6), ip6(src, ip("ff02::2"), layers.IPProtocolICMPv6), icmp6(layers.ICMPv6TypeRouterSolicitation),
				&layers.ICMPv6RouterSolicitation{}))
	}
	return []attack{nd, ra}
}

// servers offer addresses by DHCP, to the host and to neighbours.
func (a attacker) servers() []attack {
	offer := &layers.DHCPv4{
		Operation: layers.DHCPOpReply, HardwareType: layers.LinkTypeEthernet, HardwareLen: 6, Xid: 1,
		YourClientIP: ip("198.51.100.66"), ClientHWAddr: a.other.guest.MAC,
		Options: layers.DHCPOptions{layers.NewDHCPOption(layers.DHCPOptMessageType, []byte{byte(layers.DHCPMsgTypeOffer)})},
	}
	four, six := attack{name: "rogue DHCP server"}, attack{name: "rogue DHCPv6 server"}
	for _, dst := range []string{"255.255.255.255", a.link.HostAddr.Addr().String(), a.other.link.GuestAddr.Addr().String(), hostAddr} {
		for _, src := range []net.IP{a.own(), ip("0.0.0.0")} {
			four.frames = append(four.frames,
				a.frame(a.to(broadcastMAC(), layers.EthernetTypeIPv4), ip4(src, ip(dst), layers.IPProtocolUDP), udp(67, 68), offer),
				a.frame(a.to(broadcastMAC(), layers.EthernetTypeIPv4), ip4(src, ip(dst), layers.IPProtocolUDP), udp(68, 67), offer))
		}
	}
	advertise := &layers.DHCPv6{MsgType: layers.DHCPv6MsgTypeAdvertise, TransactionID: []byte{1, 2, 3}}
	for _, dst := range []string{metadataAddr, "ff02::1:2", "ff02::1", "2001:db8::2"} {
		six.frames = append(six.frames,
			a.frame(a.eth(layers.EthernetTypeIPv6), ip6(a.own6(), ip(dst), layers.IPProtocolUDP), udp(547, 546), advertise),
			a.frame(a.eth(layers.EthernetTypeIPv6), ip6(a.own6(), ip(dst), layers.IPProtocolUDP), udp(546, 547), advertise))
	}
	return []attack{four, six}
}

// ethertypes are frames that are not plain IP or ARP.
func (a attacker) ethertypes() []attack {
	tagged := attack{name: "VLAN tags"}
	inner := func(parts ...gopacket.SerializableLayer) []byte {
		return a.frame(append(parts, ip4(a.own(), ip(outsideAddr), layers.IPProtocolUDP), udp(1, 7001), text())...)
	}
	for _, id := range []uint16{0, 1, 5, 4094} {
		tagged.frames = append(tagged.frames,
			inner(a.eth(layers.EthernetTypeDot1Q), &layers.Dot1Q{VLANIdentifier: id, Type: layers.EthernetTypeIPv4}),
			inner(a.eth(layers.EthernetTypeQinQ), &layers.Dot1Q{VLANIdentifier: id, Type: layers.EthernetTypeIPv4}),
			inner(a.eth(layers.EthernetTypeQinQ), &layers.Dot1Q{VLANIdentifier: id, Type: layers.EthernetTypeDot1Q}, &layers.Dot1Q{VLANIdentifier: 7, Type: layers.EthernetTypeIPv4}),
			inner(a.eth(layers.EthernetTypeDot1Q), &layers.Dot1Q{VLANIdentifier: id, Type: layers.EthernetTypeDot1Q}, &layers.Dot1Q{VLANIdentifier: 7, Type: layers.EthernetTypeIPv4}))
	}
	other := attack{name: "other protocols than IP"}
	// MPLS, PPPoE, EAPOL, LLDP, PTP, RARP, IPX, AoE, RoCE, MACsec, a length (LLC: spanning tree), local experiments.
	for _, kind := range []layers.EthernetType{0x8847, 0x8863, 0x8864, 0x888e, 0x88cc, 0x88f7, 0x8035, 0x8137, 0x88a2, 0x8915, 0x88e5, 0x0026, 0x88b5, 0xffff} {
		other.frames = append(other.frames, a.frame(a.to(net.HardwareAddr{0x01, 0x80, 0xc2, 0, 0, 0}, kind), gopacket.Payload(bytes.Repeat([]byte(marker), 6))))
	}
	return []attack{tagged, other}
}

// oddities are IP that hides what it is.
func (a attacker) oddities() []attack {
	options, fragments, headers := attack{name: "IP options"}, attack{name: "IP fragments"}, attack{name: "IPv6 extension headers"}
	for _, o := range []layers.IPv4Option{
		{OptionType: 131, OptionLength: 7, OptionData: append([]byte{4}, ip("10.9.9.9").To4()...)}, // loose source route
		{OptionType: 137, OptionLength: 7, OptionData: append([]byte{4}, ip("10.9.9.9").To4()...)}, // strict source route
		{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}},                        // record route
		{OptionType: 68, OptionLength: 8, OptionData: []byte{5, 0, 0, 0, 0, 0}},                    // timestamp
		{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}},                               // router alert
	} {
		p := ip4(a.own(), ip(outsideAddr), layers.IPProtocolUDP)
		p.Options = []layers.IPv4Option{o}
		options.frames = append(options.frames, a.frame(a.eth(layers.EthernetTypeIPv4), p, udp(1, 7001), text()))
	}
	for _, dst := range []string{outsideAddr, "10.9.9.9", hostAddr} {
		for _, offset := range []uint16{0, 1, 3, 8000} {
			p := ip4(a.own(), ip(dst), layers.IPProtocolUDP)
			p.FragOffset = offset
			if offset < 3 {
				p.Flags = layers.IPv4MoreFragments
			}
			fragments.frames = append(fragments.frames, a.frame(a.eth(layers.EthernetTypeIPv4), p, udp(1, 7001), text()))
		}
	}
	for _, h := range []struct {
		kind layers.IPProtocol
		body []byte // after next header and length
	}{
		{layers.IPProtocolIPv6HopByHop, []byte{0, 5, 2, 0, 0, 1, 0}},             // router alert
		{layers.IPProtocolIPv6Destination, []byte{0, 1, 4, 0, 0, 0, 0}},          // padding
		{layers.IPProtocolIPv6Routing, []byte{0, 0, 0, 0, 0, 0, 0}},              // type 0
		{layers.IPProtocolIPv6Fragment, []byte{0, 0, 0, 0xbe, 0xef, 0xde, 0xad}}, // atomic
		{layers.IPProtocolIPv6Fragment, []byte{0, 0, 1, 0xbe, 0xef, 0xde, 0xad}}, // first of several
	} {
		segment := gopacket.NewSerializeBuffer()
		tcp := syn(metadataPort)
		if err := tcp.SetNetworkLayerForChecksum(ip6(a.own6(), ip(metadataAddr), layers.IPProtocolTCP)); err != nil {
			a.t.Fatal(err)
		}
		if err := gopacket.SerializeLayers(segment, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, tcp); err != nil {
			a.t.Fatal(err)
		}
		body := append([]byte{byte(layers.IPProtocolTCP)}, h.body...)
		headers.frames = append(headers.frames, a.frame(a.eth(layers.EthernetTypeIPv6), ip6(a.own6(), ip(metadataAddr), h.kind), gopacket.Payload(append(body, segment.Bytes()...))))
	}
	return []attack{options, fragments, headers}
}

// scans look for whom a guest must not find.
func (a attacker) scans() []attack {
	own := a.link.HostAddr.Addr().String()
	var out []attack
	for name, targets := range map[string][]string{
		"scan of the host":       {own, hostAddr},
		"scan of neighbours":     {a.other.link.GuestAddr.Addr().String(), a.other.link.HostAddr.Addr().String(), "10.213.255.254"},
		"scan of private ranges": {"10.9.9.9", "172.16.3.3", "172.31.255.255", "192.168.5.5"},
		"scan of link-local":     {"169.254.169.254", "169.254.0.1"},
		"scan of CGNAT":          {"100.64.1.1", "100.127.255.254"},
		"scan of multicast":      {"224.0.0.1", "224.0.0.251", "239.255.255.250"},
		"scan of special ranges": {"127.0.0.1", "0.0.0.1", "240.0.0.1", "255.255.255.255", "10.213.0.7"},
	} {
		x := attack{name: name}
		for _, dst := range targets {
			for _, port := range []uint16{22, 53, 80, 111, 443, 2375, 6443, 7000, 16509} {
				x.frames = append(x.frames,
					a.frame(a.eth(layers.EthernetTypeIPv4), ip4(a.own(), ip(dst), layers.IPProtocolTCP), syn(port), text()),
					a.frame(a.eth(layers.EthernetTypeIPv4), ip4(a.own(), ip(dst), layers.IPProtocolUDP), udp(1, port), text()))
			}
			x.frames = append(x.frames, a.frame(a.eth(layers.EthernetTypeIPv4), ip4(a.own(), ip(dst), layers.IPProtocolICMPv4),
				&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0)}, text()))
		}
		out = append(out, x)
	}
	six := attack{name: "scan by IPv6"}
	for _, dst := range []string{metadataAddr, "fe80::2", a.other.link.GuestLinkLocal.String(), "fd00::1", "fc00::1", "ff02::1", "ff02::fb", "ff05::2", "2001:db8::1", "2001:db8::2", "::1", "::ffff:10.9.9.9", "64:ff9b::a09:909"} {
		for _, port := range []uint16{22, 53, 81, 7000, 16509} {
			six.frames = append(six.frames,
				a.frame(a.eth(layers.EthernetTypeIPv6), ip6(a.own6(), netip.MustParseAddr(dst).AsSlice(), layers.IPProtocolTCP), syn(port), text()),
				a.frame(a.eth(layers.EthernetTypeIPv6), ip6(a.own6(), netip.MustParseAddr(dst).AsSlice(), layers.IPProtocolUDP), udp(1, port), text()))
		}
		six.frames = append(six.frames, a.frame(a.eth(layers.EthernetTypeIPv6), ip6(a.own6(), netip.MustParseAddr(dst).AsSlice(), layers.IPProtocolICMPv6),
			icmp6(layers.ICMPv6TypeEchoRequest), &layers.ICMPv6Echo{Identifier: 1}, text()))
	}
	return append(out, six)
}
