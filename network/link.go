package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// aliasPrefix starts the alias (ip link's "alias") of every link of ours; the
// guest's id follows.
const aliasPrefix = "nodeagent guest "

// Tap is one of our taps as the kernel has it.
type Tap struct {
	// Name of the interface.
	Name string
	// GuestID is the guest it was made for; empty when it, or the cable it
	// belongs to, is not whole.
	GuestID string
	// Up says whether the link is administratively up.
	Up bool
}

// Slot is the slot of the tap's guest; false when its name has none.
func (t Tap) Slot() (uint32, bool) {
	digits, ours := strings.CutPrefix(t.Name, tapPrefix)
	slot, err := strconv.ParseUint(digits, 16, 32)
	return uint32(slot), ours && err == nil
}

// kernelLinks is the host's links, addresses and connection table. A guest's
// are three: its tap, and a cable (veth) from the table's side of it (wire) to
// the host's (device).
//
//	QEMU ─ tap nt… ─(table's fwd)─ wire nv… ═ device na… ─ the host's IP
//
// A tap has neither address nor route: without the table, what a guest sends
// ends there.
type kernelLinks struct{ root string }

func tapName() *regexp.Regexp { return regexp.MustCompile(`^n[atv][0-9a-f]{8}$`) }

// parts are what there is of one guest's links.
type parts struct {
	slot              string
	tap, wire, device netlink.Link
}

// owner is the guest whose links are all there.
func (p parts) owner() string {
	if p.tap == nil || p.wire == nil || p.device == nil || p.tap.Attrs().Alias != p.device.Attrs().Alias {
		return ""
	}
	id, _ := strings.CutPrefix(p.tap.Attrs().Alias, aliasPrefix)
	return id
}

// isOurs: a link with our kind of name and no alias is ours when it is down:
// the agent stopped between making and naming it.
func isOurs(l netlink.Link) bool {
	a := l.Attrs()
	return strings.HasPrefix(a.Alias, aliasPrefix) || (a.Alias == "" && a.Flags&net.FlagUp == 0)
}

// scan returns what is ours, by slot.
func (k kernelLinks) scan() (map[string]parts, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	byIndex := map[int]netlink.Link{}
	for _, l := range links {
		byIndex[l.Attrs().Index] = l
	}
	out := map[string]parts{}
	for _, l := range links {
		name := l.Attrs().Name
		if !tapName().MatchString(name) || !isOurs(l) {
			continue
		}
		slot := name[2:]
		p := out[slot]
		p.slot = slot
		switch {
		case name == tapPrefix+slot && l.Type() == "tuntap":
			p.tap = l
		case name == devicePrefix+slot && l.Type() == "veth":
			wire := byIndex[l.Attrs().ParentIndex]
			if wire == nil || wire.Attrs().Name != wirePrefix+slot {
				continue
			}
			p.device, p.wire = l, wire
		default:
			continue
		}
		out[slot] = p
	}
	return out, nil
}

func (k kernelLinks) list() ([]Tap, error) {
	all, err := k.scan()
	if err != nil {
		return nil, err
	}
	out := make([]Tap, 0, len(all))
	for slot, p := range all {
		t := Tap{Name: tapPrefix + slot, GuestID: p.owner()}
		t.Up = p.tap != nil && p.tap.Attrs().Flags&net.FlagUp != 0
		out = append(out, t)
	}
	return out, nil
}

// ensure makes the guest's links, down, unless they are there. It reports
// whether it made them. A link of such a name that is not this guest's is left
// alone and refused.
func (k kernelLinks) ensure(g Guest, l Link) (made bool, err error) {
	if err := k.overlap(l); err != nil {
		return false, err
	}
	all, err := k.scan()
	if err != nil {
		return false, err
	}
	slot := strings.TrimPrefix(l.Tap, tapPrefix)
	p, some := all[slot]
	if some && p.owner() == g.ID {
		return false, k.configure(l)
	}
	if some && p.owner() == "" {
		if err := k.remove(l.Tap); err != nil {
			return false, fmt.Errorf("half-made: %w", err)
		}
	}
	for _, name := range []string{l.Tap, l.wire(), l.Device} {
		_, err := netlink.LinkByName(name)
		switch {
		case err == nil:
			return false, contract.Refuse("network.tap-taken", "remove the other link, or let its owner do so",
				"link %s exists and is not this guest's", name)
		case !errors.As(err, new(netlink.LinkNotFoundError)):
			return false, fmt.Errorf("looking for %s: %w", name, err)
		}
	}
	if err := k.make(g, l); err != nil {
		return false, errors.Join(err, k.remove(l.Tap))
	}
	return true, nil
}

func (k kernelLinks) make(g Guest, l Link) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.Device
	cable := &netlink.Veth{LinkAttrs: attrs, PeerName: l.wire()}
	attrs.Name = l.Tap
	tap := &netlink.Tuntap{
		LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Owner: g.TapUser, Group: g.TapGroup,
	}
	for _, link := range []netlink.Link{cable, tap} {
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("making %s: %w", link.Attrs().Name, err)
		}
		if err := netlink.LinkSetAlias(link, aliasPrefix+g.ID); err != nil {
			return fmt.Errorf("naming the guest of %s: %w", link.Attrs().Name, err)
		}
	}
	return k.configure(l)
}

// overlap refuses a guest range that the host itself lives in: its /30 would
// take addresses away from the host's own network.
func (k kernelLinks) overlap(l Link) error {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("listing addresses: %w", err)
	}
	own, err := netlink.LinkByName(l.Device)
	if err != nil && !errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("looking for %s: %w", l.Device, err)
	}
	for _, a := range addrs {
		if own != nil && a.LinkIndex == own.Attrs().Index {
			continue
		}
		p, ok := prefixOf(a.IPNet)
		if ok && p.Overlaps(l.HostAddr) {
			return contract.Refuse("network.range-overlap", "choose a network.guest_cidr that this host does not use",
				"the guest's addresses %s overlap the host's %s", l.HostAddr.Masked(), p)
		}
	}
	return nil
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), ones), ok
}

// setting is one value under /proc/sys/net.
type setting struct{ family, name, value string }

// settings make a device deaf to everything a guest could teach the host.
func settings() []setting {
	return []setting{
		// No address but ours, nothing learnt from the guest.
		{"ipv6", "addr_gen_mode", "1"}, // none; linux/if_link.h, IN6_ADDR_GEN_MODE_NONE
		{"ipv6", "disable_ipv6", "0"},
		{"ipv6", "forwarding", "0"},
		{"ipv6", "accept_ra", "0"},
		{"ipv6", "autoconf", "0"},
		{"ipv6", "accept_redirects", "0"},
		{"ipv6", "accept_source_route", "0"},
		{"ipv6", "proxy_ndp", "0"},
		// Strict reverse path: Documentation/networking/ip-sysctl.rst.
		{"ipv4", "rp_filter", "1"},
		{"ipv4", "accept_redirects", "0"},
		{"ipv4", "secure_redirects", "0"},
		{"ipv4", "send_redirects", "0"},
		{"ipv4", "accept_source_route", "0"},
		{"ipv4", "proxy_arp", "0"},
		{"ipv4", "route_localnet", "0"},
		// Answer only for this link's address, and only to its /30.
		{"ipv4", "arp_ignore", "2"},
		{"ipv4", "arp_announce", "2"},
		{"ipv4", "arp_accept", "0"},
	}
}

// deadEnd are the settings of a tap and of a wire: the host's IP takes nothing
// from them. No route leads there, so that strict reverse path drops all IPv4
// with a source.
func deadEnd() []setting {
	return []setting{
		{"ipv6", "disable_ipv6", "1"},
		{"ipv4", "rp_filter", "1"},
		{"ipv4", "accept_local", "0"},
		{"ipv4", "arp_ignore", "8"}, // answer for no address
		{"ipv4", "arp_accept", "0"},
	}
}

// configure sets the links' kernel settings and the device's IPv4 address;
// they survive a link's going down.
func (k kernelLinks) configure(l Link) error {
	for name, list := range map[string][]setting{l.Tap: deadEnd(), l.wire(): deadEnd(), l.Device: settings()} {
		for _, s := range list {
			path := filepath.Join(k.root, "proc/sys/net", s.family, "conf", name, s.name)
			if err := os.WriteFile(path, []byte(s.value), 0o644); err != nil {
				return fmt.Errorf("setting %s of %s: %w", s.name, name, err)
			}
		}
	}
	device, err := netlink.LinkByName(l.Device)
	if err != nil {
		return fmt.Errorf("looking for %s: %w", l.Device, err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: l.HostAddr.Addr().AsSlice(), Mask: net.CIDRMask(l.HostAddr.Bits(), 32)}}
	if err := netlink.AddrReplace(device, addr); err != nil {
		return fmt.Errorf("adding %s to %s: %w", l.HostAddr, l.Device, err)
	}
	return nil
}

// up brings a guest's links up, the tap last, and gives the device the
// metadata address, which the kernel takes away whenever it goes down.
func (k kernelLinks) up(l Link) error {
	for _, name := range []string{l.wire(), l.Device, l.Tap} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("looking for %s: %w", name, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bringing up %s: %w", name, err)
		}
		if name != l.Device {
			continue
		}
		addr := &netlink.Addr{
			IPNet: &net.IPNet{IP: net.ParseIP(metadataAddr), Mask: net.CIDRMask(64, 128)},
			Flags: unix.IFA_F_NODAD, Scope: unix.RT_SCOPE_LINK,
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("adding %s to %s: %w", metadataAddr, name, err)
		}
	}
	return nil
}

// down takes the tap down; a tap that is gone is down.
func (k kernelLinks) down(tap string) error {
	link, err := netlink.LinkByName(tap)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		err = netlink.LinkSetDown(link)
	}
	if err != nil {
		return fmt.Errorf("taking down tap %s: %w", tap, err)
	}
	return nil
}

// remove deletes a tap and its cable, as far as they are ours; what is gone is
// removed.
func (k kernelLinks) remove(tap string) error {
	all, err := k.scan()
	if err != nil {
		return err
	}
	p := all[strings.TrimPrefix(tap, tapPrefix)]
	var errs []error
	for _, link := range []netlink.Link{p.tap, p.device} { // the wire goes with its device
		if link == nil {
			continue
		}
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("deleting %s: %w", link.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// forget ends every connection of a guest address, so that a later guest in
// the same slot inherits none.
func (k kernelLinks) forget(addr netip.Addr) error {
	match := connectionsOf{addr.AsSlice()}
	if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, match); err != nil {
		return fmt.Errorf("forgetting connections of %s: %w", addr, err)
	}
	return nil
}

type connectionsOf struct{ ip net.IP }

// MatchConntrackFlow implements netlink.CustomConntrackFilter. A published
// port's connection names the guest only in its reply direction.
func (c connectionsOf) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return c.ip.Equal(f.Forward.SrcIP) || c.ip.Equal(f.Forward.DstIP) || c.ip.Equal(f.Reverse.SrcIP) || c.ip.Equal(f.Reverse.DstIP)
}

func (k kernelLinks) forwardingPath() string {
	return filepath.Join(k.root, "proc/sys/net/ipv4/ip_forward")
}

func (k kernelLinks) forwarding() (bool, error) {
	raw, err := os.ReadFile(k.forwardingPath())
	if err != nil {
		return false, fmt.Errorf("reading IPv4 forwarding: %w", err)
	}
	return strings.TrimSpace(string(raw)) == "1", nil
}

func (k kernelLinks) setForwarding(on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	if err := os.WriteFile(k.forwardingPath(), []byte(value), 0o644); err != nil {
		return fmt.Errorf("setting IPv4 forwarding to %s: %w", value, err)
	}
	return nil
}

// changes opens a subscription to changes of any nft table. Only that
// something changed matters, so messages are not looked at.
func (k kernelLinks) changes() (notifier, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("opening nft events: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)}); err != nil {
		return nil, errors.Join(fmt.Errorf("subscribing to nft events: %w", err), unix.Close(fd))
	}
	return nftEvents{os.NewFile(uintptr(fd), "nft events")}, nil
}

type nftEvents struct{ f *os.File }

// wait blocks until something changed, or was lost because too much did.
func (e nftEvents) wait() error {
	var buf [16 << 10]byte
	if _, err := e.f.Read(buf[:]); err != nil && !errors.Is(err, unix.ENOBUFS) {
		return fmt.Errorf("reading nft events: %w", err)
	}
	return nil
}

func (e nftEvents) Close() error { return e.f.Close() }
