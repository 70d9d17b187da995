package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// listening returns the TCP ports that processes of the host listen on, by
// IPv4 or IPv6.
func (k kernelLinks) listening() (map[uint16]bool, error) {
	const listen = 10 // TCP_LISTEN, linux/tcp_states.h
	ports := map[uint16]bool{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := netlink.SocketDiagTCP(family)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("listing listening sockets: %w", err)
		}
		for _, s := range sockets {
			if s.State == listen {
				ports[s.ID.SourcePort] = true
			}
		}
	}
	return ports, nil
}

// ephemeral returns the ports that the kernel gives to sockets that ask for
// none, without those the operator reserved (ip-sysctl.rst,
// ip_local_port_range and ip_local_reserved_ports).
func (k kernelLinks) ephemeral() (func(port uint16) bool, error) {
	read := func(name string) (string, error) {
		raw, err := os.ReadFile(filepath.Join(k.root, "proc/sys/net/ipv4", name))
		return strings.TrimSpace(string(raw)), err
	}
	given, errGiven := read("ip_local_port_range")
	kept, errKept := read("ip_local_reserved_ports")
	if err := errors.Join(errGiven, errKept); err != nil {
		return nil, fmt.Errorf("reading ephemeral ports: %w", err)
	}
	ranges, errGiven := parseRanges(strings.Join(strings.Fields(given), "-"))
	reserved, errKept := parseRanges(kept)
	if err := errors.Join(errGiven, errKept); err != nil {
		return nil, fmt.Errorf("reading ephemeral ports: %w", err)
	}
	return func(port uint16) bool { return within(ranges, port) && !within(reserved, port) }, nil
}

func within(ranges []Range, port uint16) bool {
	for _, r := range ranges {
		if port >= r.First && port <= r.Last {
			return true
		}
	}
	return false
}

// parseRanges parses "8080,9000-9010", as the kernel writes sets of ports.
func parseRanges(text string) ([]Range, error) {
	var out []Range
	for part := range strings.SplitSeq(text, ",") {
		if part == "" {
			continue
		}
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, errA := strconv.ParseUint(first, 10, 16)
		b, errB := strconv.ParseUint(last, 10, 16)
		if errA != nil || errB != nil || a > b {
			return nil, fmt.Errorf("%q is no range of ports", part)
		}
		out = append(out, Range{uint16(a), uint16(b)})
	}
	return out, nil
}

// Listening returns the TCP ports of the host that processes listen on. One of
// them cannot be published.
func (h *Host) Listening() (map[uint16]bool, error) { return h.links.listening() }

// ephemeralFinding says whether the kernel may give a published port to a
// process, whose connections a guest would then take.
func (h *Host) ephemeralFinding() ([]Finding, error) {
	published := h.cfg.PublishedPorts
	given, err := h.links.ephemeral()
	if err != nil {
		return nil, err
	}
	for n := int(max(published.First, 1)); n <= int(published.Last); n++ {
		if given(uint16(n)) {
			return []Finding{{
				FindingPortsEphemeral, "net.ipv4.ip_local_port_range",
				fmt.Sprintf("the kernel may give port %d, one of the published range, to a process of the host", n),
				fmt.Sprintf("set net.ipv4.ip_local_reserved_ports=%d-%d, or choose another network.published_ports", published.First, published.Last),
			}}, nil
		}
	}
	return nil, nil
}
