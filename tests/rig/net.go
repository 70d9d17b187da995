package rig

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
)

// Addresses of the run: documentation range TEST-NET-2 (RFC 5737).
const (
	// OutsideAddr is where every service of the outside listens.
	OutsideAddr = "198.51.100.1"
	// hostNet is the range; hosts count up from .2.
	hostNet   = "198.51.100.0/24"
	firstHost = 2
)

// Names of the outside's services. They resolve in every namespace of the run.
const (
	ControlName  = "control.example"
	BrokerName   = "broker.example"
	StoreName    = "store.example"
	RegistryName = "registry.example"
)

// Names lists them.
func Names() []string { return []string{ControlName, BrokerName, StoreName, RegistryName} }

func hostsFile() string {
	return "127.0.0.1 localhost\n::1 localhost\n" + OutsideAddr + " " + strings.Join(Names(), " ") + "\n"
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding loopback: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

// outsideBridge joins the hosts' veths on the outside.
const outsideBridge = "outside"

// plug gives the namespace of pid an interface "uplink" whose other end is on
// the outside's bridge.
func plug(pid, index int) error {
	bridge, err := netlink.LinkByName(outsideBridge)
	if err != nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = outsideBridge
		bridge = &netlink.Bridge{LinkAttrs: attrs}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("adding bridge: %w", err)
		}
		if err := address(bridge, OutsideAddr+"/24"); err != nil {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprintf("host%d", index)
	attrs.MasterIndex = bridge.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "uplink", PeerNamespace: netlink.NsPid(pid)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("adding veth: %w", err)
	}
	return netlink.LinkSetUp(veth)
}

func address(link netlink.Link, cidr string) error {
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("adding %s to %s: %w", cidr, link.Attrs().Name, err)
	}
	return netlink.LinkSetUp(link)
}

// hostAddr is the address of the n-th host, from 0.
func hostAddr(n int) netip.Addr {
	prefix := netip.MustParsePrefix(hostNet)
	a := prefix.Addr().As4()
	a[3] = byte(firstHost + n)
	return netip.AddrFrom4(a)
}
