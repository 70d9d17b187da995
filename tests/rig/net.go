package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the run: documentation range TEST-NET-2 (RFC 5737).
const (
	// OutsideAddr is where every service of the outside listens.
	OutsideAddr = "198.51.100.1"
	// hostNet is the range; hosts count up from .2.
	hostNet   = "198.51.100.0/24"
	firstHost = 2
	// maxHosts at a time.
	maxHosts    = 16
	outsideName = "outside"
	// Uplink is a host's interface towards the outside.
	Uplink = "uplink"
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

// hostsFile resolves every name of the run. Host names are in it because
// libvirtd looks its own up, and waits when nobody answers.
func hostsFile() string {
	lines := []string{"127.0.0.1 localhost", "::1 localhost", OutsideAddr + " " + outsideName + " " + strings.Join(Names(), " ")}
	for n := range maxHosts {
		lines = append(lines, hostAddr(n).String()+" "+hostName(n))
	}
	return strings.Join(lines, "\n") + "\n"
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

func addBridge() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = outsideBridge
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("adding bridge: %w", err)
	}
	return address(bridge, OutsideAddr+"/24")
}

// plug gives the namespace of pid an interface whose other end is on the
// outside's bridge.
func plug(pid, index int) error {
	bridge, err := netlink.LinkByName(outsideBridge)
	if err != nil {
		return fmt.Errorf("finding bridge: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = hostLink(index)
	attrs.MasterIndex = bridge.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: Uplink, PeerNamespace: netlink.NsPid(pid)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("adding veth: %w", err)
	}
	return netlink.LinkSetUp(veth)
}

// unplug removes the link now; the end of a network namespace would do so
// some time later.
func unplug(index int) error {
	link, err := netlink.LinkByName(hostLink(index))
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return nil
	}
	if err != nil {
		return fmt.Errorf("finding the host's link: %w", err)
	}
	return netlink.LinkDel(link)
}

func hostLink(index int) string { return fmt.Sprintf("host%d", index) }

func hostName(index int) string { return fmt.Sprintf("provider%d.example", index) }

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

// Listen opens a TCP port in the host's network namespace, as a service of the
// operator would.
func (h *Host) Listen(ctx context.Context, address string) (net.Listener, error) {
	type result struct {
		listener net.Listener
		err      error
	}
	out := make(chan result, 1)
	go func() {
		listener, err := h.listen(ctx, address)
		out <- result{listener, err}
	}()
	r := <-out
	return r.listener, r.err
}

// listen must have a goroutine of its own. A socket belongs to the namespace of
// the thread that makes it; the thread is brought back, because the process's
// first thread, if this is it, would tell everybody that the whole process is
// in the host's namespace, and be killed with the host.
func (h *Host) listen(ctx context.Context, address string) (_ net.Listener, err error) {
	runtime.LockOSThread() // until it is back, or for ever: then it ends with the goroutine
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("entering the host's network: %w", err)
	}
	defer home.Close() //nolint:errcheck // read only
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", h.holder.Process.Pid))
	if err != nil {
		return nil, fmt.Errorf("entering the host's network: %w", err)
	}
	defer ns.Close() //nolint:errcheck // read only
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("entering the host's network: %w", err)
	}
	listener, listenErr := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
		return listener, errors.Join(listenErr, fmt.Errorf("leaving the host's network: %w", err))
	}
	runtime.UnlockOSThread()
	return listener, listenErr
}

// Processes are the names of the programs that run in the host's namespaces.
func (h *Host) Processes() ([]string, error) {
	inode, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.holder.Process.Pid))
	if err != nil {
		return nil, fmt.Errorf("listing the host's processes: %w", err)
	}
	pids, err := members(inode, h.holder.Process.Pid)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, pid := range pids {
		// One that has ended meanwhile has no name.
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil {
			names = append(names, strings.TrimSpace(string(name)))
		}
	}
	return names, nil
}
