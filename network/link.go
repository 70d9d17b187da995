package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// aliasPrefix starts the alias (ip link's "alias") of every link of ours; the
// guest's id follows.
const aliasPrefix = "nodeagent guest "

// Tap is one of our links as the kernel has it.
type Tap struct {
	// Name of the interface.
	Name string
	// GuestID is the guest it was made for; empty when making it was cut
	// short.
	GuestID string
	// Up says whether the link is administratively up.
	Up bool
}

// kernelLinks is the host's links, addresses and connection table.
type kernelLinks struct{ root string }

func tapName() *regexp.Regexp { return regexp.MustCompile(`^na[0-9a-f]{8}$`) }

// list returns our taps. A tap with our kind of name and no alias is ours when
// it is down: the agent stopped between making and naming it.
func (k kernelLinks) list() ([]Tap, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	var out []Tap
	for _, l := range links {
		a := l.Attrs()
		if l.Type() != "tuntap" || !tapName().MatchString(a.Name) {
			continue
		}
		id, ours := strings.CutPrefix(a.Alias, aliasPrefix)
		up := a.Flags&net.FlagUp != 0
		if ours || (a.Alias == "" && !up) {
			out = append(out, Tap{Name: a.Name, GuestID: id, Up: up})
		}
	}
	return out, nil
}

// ensure makes the guest's tap, down, unless it is there. It reports whether
// it made it. A link of that name that is not this guest's is left alone and
// refused.
func (k kernelLinks) ensure(g Guest, l Link) (made bool, err error) {
	if err := k.overlap(l); err != nil {
		return false, err
	}
	existing, err := netlink.LinkByName(l.Tap)
	switch {
	case err == nil && existing.Type() == "tuntap" && existing.Attrs().Alias == aliasPrefix+g.ID:
		return false, k.configure(existing, l)
	case err == nil && existing.Type() == "tuntap" && existing.Attrs().Alias == "" && existing.Attrs().Flags&net.FlagUp == 0:
		if err := netlink.LinkDel(existing); err != nil {
			return false, fmt.Errorf("deleting half-made tap %s: %w", l.Tap, err)
		}
	case err == nil:
		return false, contract.Refuse("network.tap-taken", "remove the other link, or let its owner do so",
			"link %s exists and is not this guest's", l.Tap)
	case !errors.As(err, new(netlink.LinkNotFoundError)):
		return false, fmt.Errorf("looking for tap %s: %w", l.Tap, err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.Tap
	tap := &netlink.Tuntap{
		LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Owner: g.TapUser, Group: g.TapGroup,
	}
	if err := netlink.LinkAdd(tap); err != nil {
		return false, fmt.Errorf("making tap %s: %w", l.Tap, err)
	}
	undo := func(err error) error { return errors.Join(err, k.remove(l.Tap)) }
	if err := netlink.LinkSetAlias(tap, aliasPrefix+g.ID); err != nil {
		return false, undo(fmt.Errorf("naming the guest of tap %s: %w", l.Tap, err))
	}
	if err := k.configure(tap, l); err != nil {
		return false, undo(err)
	}
	return true, nil
}

// overlap refuses a guest range that the host itself lives in: its /30 would
// take addresses away from the host's own network.
func (k kernelLinks) overlap(l Link) error {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("listing addresses: %w", err)
	}
	own, err := netlink.LinkByName(l.Tap)
	if err != nil && !errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("looking for tap %s: %w", l.Tap, err)
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

// settings make a tap deaf to everything a guest could teach the host.
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

// configure sets the tap's kernel settings and IPv4 address; both survive the
// link going down.
func (k kernelLinks) configure(link netlink.Link, l Link) error {
	for _, s := range settings() {
		path := filepath.Join(k.root, "proc/sys/net", s.family, "conf", l.Tap, s.name)
		if err := os.WriteFile(path, []byte(s.value), 0o644); err != nil {
			return fmt.Errorf("setting %s of tap %s: %w", s.name, l.Tap, err)
		}
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: l.HostAddr.Addr().AsSlice(), Mask: net.CIDRMask(l.HostAddr.Bits(), 32)}}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("adding %s to tap %s: %w", l.HostAddr, l.Tap, err)
	}
	return nil
}

// up brings the tap up and gives it the metadata address, which the kernel
// takes away whenever a link goes down.
func (k kernelLinks) up(tap string) error {
	link, err := netlink.LinkByName(tap)
	if err != nil {
		return fmt.Errorf("looking for tap %s: %w", tap, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing up tap %s: %w", tap, err)
	}
	addr := &netlink.Addr{
		IPNet: &net.IPNet{IP: net.ParseIP(metadataAddr), Mask: net.CIDRMask(64, 128)},
		Flags: unix.IFA_F_NODAD, Scope: unix.RT_SCOPE_LINK,
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("adding %s to tap %s: %w", metadataAddr, tap, err)
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

// remove deletes the tap; a tap that is gone is removed.
func (k kernelLinks) remove(tap string) error {
	link, err := netlink.LinkByName(tap)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("deleting tap %s: %w", tap, err)
	}
	return nil
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
