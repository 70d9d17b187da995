package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Config is what the operator allows. The zero value of a field other than
// GuestCIDR is usable.
type Config struct {
	// GuestCIDR is the pool, IPv4, /8 to /28. Each guest takes a /30 of it.
	GuestCIDR netip.Prefix
	// AllowPrivateEgress are parts of the denied ranges (see README.md) that
	// guests may reach all the same. IPv4 only: guests have no IPv6 egress.
	AllowPrivateEgress []netip.Prefix
	// PublishedPorts is the range of host TCP ports that may be published.
	// The zero range publishes none.
	PublishedPorts Range
	// MaxPortConnections bounds the connections to one published port and
	// MaxSourceConnections those of one address to all of them. 0 is no bound.
	MaxPortConnections, MaxSourceConnections int
	// MaxGuestPackets bounds the packets that one guest sends in a second. 0 is
	// no bound.
	MaxGuestPackets int
	// RunDir is a folder that is there and ends with the boot.
	RunDir string
	// Table is the name of the nft table, family inet. Default "nodeagent".
	Table string
	// Root is where /proc is found. Default "/".
	Root string
}

// Range is an inclusive range of TCP ports.
type Range struct{ First, Last uint16 }

// Guest is one guest's wish.
type Guest struct {
	// ID is the guest's id, 1 to 64 of [A-Za-z0-9-].
	ID string
	// Index is the guest's slot. It decides the addresses and the tap's name;
	// two guests never share one.
	Index uint32
	// MAC is the address of the guest's NIC; nothing else may send on the tap.
	MAC net.HardwareAddr
	// Ports are published on the host.
	Ports []Publish
	// TapUser and TapGroup may open the tap: an unprivileged QEMU's ids.
	TapUser, TapGroup uint32
}

// Publish makes a guest's TCP port reachable on the host's addresses.
type Publish struct{ Host, Guest uint16 }

// Link is what a guest's wish comes to.
type Link struct {
	// Tap is the interface that QEMU opens. Nothing on the host listens there.
	Tap string
	// Device is the interface on which the host's IP sees the guest.
	Device string
	// HostAddr and GuestAddr are the ends of the /30.
	HostAddr, GuestAddr netip.Prefix
	// GuestLinkLocal is the only IPv6 address the guest may send from: the
	// one its kernel derives from the MAC (RFC 4291, appendix A).
	GuestLinkLocal netip.Addr
}

// Names of a guest's links; the slot follows as 8 hex digits.
const (
	tapPrefix    = "nt"
	wirePrefix   = "nv"
	devicePrefix = "na"
)

// wire is the far end of Device.
func (l Link) wire() string { return wirePrefix + strings.TrimPrefix(l.Device, devicePrefix) }

// slotBits is the prefix length of one guest's share of the pool.
const slotBits = 30

// maxPorts bounds the published ports of one guest. A manifest names at most
// contract.MaxPorts.
const maxPorts = contract.MaxPorts

// Describe computes a guest's link. It does no I/O and does not look at other
// guests.
func Describe(cfg Config, g Guest) (Link, error) {
	if err := cfg.validate(); err != nil {
		return Link{}, err
	}
	if err := g.validate(cfg); err != nil {
		return Link{}, err
	}
	slots := uint64(1) << (slotBits - cfg.GuestCIDR.Bits())
	if uint64(g.Index) >= slots {
		return Link{}, contract.Refuse("network.pool-exhausted", "widen network.guest_cidr, or stop a guest",
			"slot %d does not exist: the guest range %s has %d slots", g.Index, cfg.GuestCIDR, slots)
	}
	base := cfg.GuestCIDR.Addr().As4()
	n := uint32(base[0])<<24 | uint32(base[1])<<16 | uint32(base[2])<<8 | uint32(base[3])
	n += g.Index << (32 - slotBits)
	at := func(host uint32) netip.Prefix {
		v := n + host
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}), slotBits)
	}
	m := g.MAC
	return Link{
		Tap:       fmt.Sprintf("%s%08x", tapPrefix, g.Index),
		Device:    fmt.Sprintf("%s%08x", devicePrefix, g.Index),
		HostAddr:  at(1),
		GuestAddr: at(2),
		GuestLinkLocal: netip.AddrFrom16([16]byte{
			0xfe, 0x80, 0, 0, 0, 0, 0, 0, m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5],
		}),
	}, nil
}

func (c Config) table() string {
	if c.Table == "" {
		return "nodeagent"
	}
	return c.Table
}

// unallowable can never be reached by forwarding, whatever the operator says:
// this network, loopback, multicast and reserved (RFC 6890).
func unallowable() []netip.Prefix {
	return prefixes("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")
}

func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("network: "+format, args...)) }
	if p := c.GuestCIDR; !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 28 || p != p.Masked() {
		bad("guest range %s is not an IPv4 network of /8 to /28", p)
	}
	overlaps := func(p netip.Prefix) bool { return slices.ContainsFunc(unallowable(), p.Overlaps) }
	if overlaps(c.GuestCIDR) {
		bad("guest range %s is loopback, multicast or reserved", c.GuestCIDR)
	}
	for _, p := range c.AllowPrivateEgress {
		switch {
		case !p.Addr().Is4() || p != p.Masked():
			bad("allowed egress %s is not an IPv4 network", p)
		case overlaps(p):
			bad("allowed egress %s holds addresses that are never forwarded", p)
		case p.Overlaps(c.GuestCIDR):
			bad("allowed egress %s overlaps the guest range %s; guests never reach each other", p, c.GuestCIDR)
		}
	}
	if len(c.AllowPrivateEgress) > 256 {
		bad("%d allowed egress ranges, limit is 256", len(c.AllowPrivateEgress))
	}
	if r := c.PublishedPorts; r.First > r.Last || (r.First == 0 && r.Last != 0) {
		bad("published ports %d-%d are not a range", r.First, r.Last)
	}
	if !regexp.MustCompile(`^[a-z][a-z0-9_]{0,31}$`).MatchString(c.table()) {
		bad("table name %q is not 1 to 32 of [a-z0-9_]", c.Table)
	}
	return errors.Join(errs...)
}

func (g Guest) validate(cfg Config) error {
	if !regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`).MatchString(g.ID) {
		return fmt.Errorf("network: guest id %q is malformed", g.ID)
	}
	if len(g.MAC) != 6 || g.MAC[0]&1 != 0 || slices.Equal(g.MAC, make(net.HardwareAddr, 6)) {
		return fmt.Errorf("network: guest %s: %q is not the address of one interface", g.ID, g.MAC)
	}
	if len(g.Ports) > maxPorts {
		return fmt.Errorf("network: guest %s publishes %d ports, limit is %d", g.ID, len(g.Ports), maxPorts)
	}
	for i, p := range g.Ports {
		if p.Guest == 0 || p.Host == 0 || p.Host < cfg.PublishedPorts.First || p.Host > cfg.PublishedPorts.Last {
			return contract.Refuse("network.port-not-allowed", "ask for a port in the host's range, or let the node choose",
				"port %d is outside the range this host publishes, %d-%d", p.Host, cfg.PublishedPorts.First, cfg.PublishedPorts.Last)
		}
		if slices.ContainsFunc(g.Ports[:i], func(q Publish) bool { return q.Host == p.Host }) {
			return refusePort(p.Host, "the same guest")
		}
	}
	return nil
}

func refusePort(port uint16, by string) error {
	return contract.Refuse("network.port-in-use", "ask for another port, or stop what uses this one",
		"host port %d is already used by %s", port, by)
}

// conflict refuses a guest that takes what another one has.
func conflict(g Guest, others map[string]member) error {
	for id, o := range others {
		if id == g.ID {
			continue
		}
		if o.guest.Index == g.Index {
			return contract.Refuse("network.slot-in-use", "stop the other guest, or use a free slot",
				"slot %d belongs to guest %s", g.Index, id)
		}
		if slices.Equal(o.guest.MAC, g.MAC) {
			return contract.Refuse("network.mac-in-use", "choose another MAC address",
				"MAC address %s belongs to guest %s", g.MAC, id)
		}
		for _, p := range g.Ports {
			if slices.ContainsFunc(o.guest.Ports, func(q Publish) bool { return q.Host == p.Host }) {
				return refusePort(p.Host, "guest "+id)
			}
		}
	}
	return nil
}

func prefixes(s ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(s))
	for i := range s {
		out[i] = netip.MustParsePrefix(s[i])
	}
	return out
}
