package boot

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// pollPause is how often the kernel is asked whether something has appeared.
const pollPause = 20 * time.Millisecond

// LinkUp waits for the guest's only network interface, brings it up with the
// link-local address the kernel derives, and returns its name.
func LinkUp(ctx context.Context) (string, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return "", fmt.Errorf("finding loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return "", fmt.Errorf("bringing loopback up: %w", err)
	}
	var link netlink.Link
	err = poll(ctx, func() (bool, error) {
		links, err := netlink.LinkList()
		if err != nil {
			return false, err
		}
		i := slices.IndexFunc(links, func(l netlink.Link) bool {
			return l.Attrs().Flags&net.FlagLoopback == 0 && len(l.Attrs().HardwareAddr) > 0
		})
		if i < 0 {
			return false, nil
		}
		link = links[i]
		return true, nil
	})
	if err != nil {
		return "", fmt.Errorf("waiting for a network interface: %w", err)
	}
	name := link.Attrs().Name
	// There is nobody on the link but the host: no duplicate to detect, no
	// router to listen to.
	for key, value := range map[string]string{"accept_dad": "0", "dad_transmits": "0", "accept_ra": "0", "autoconf": "0"} {
		if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, key), []byte(value), 0); err != nil {
			return "", fmt.Errorf("setting %s of %s: %w", key, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return "", fmt.Errorf("bringing %s up: %w", name, err)
	}
	err = poll(ctx, func() (bool, error) {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
		if err != nil {
			return false, err
		}
		return slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
			return a.IP.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0
		}), nil
	})
	if err != nil {
		return "", fmt.Errorf("waiting for a link-local address: %w", err)
	}
	return name, nil
}

func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(pollPause)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// Configure takes over the host's facts about the network and its clock.
func Configure(device string, f contract.NetworkFacts) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("finding %s: %w", device, err)
	}
	addr, err := netlink.ParseAddr(f.Address)
	if err != nil {
		return fmt.Errorf("reading address: %w", err)
	}
	gateway := net.ParseIP(f.Gateway)
	if gateway == nil {
		return fmt.Errorf("reading gateway %.64q: no address", f.Gateway)
	}
	if f.MTU != 0 {
		if err := netlink.LinkSetMTU(link, f.MTU); err != nil {
			return fmt.Errorf("setting MTU: %w", err)
		}
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("setting address: %w", err)
	}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway}); err != nil {
		return fmt.Errorf("setting route: %w", err)
	}
	if err := os.WriteFile("/etc/hosts", hostsFile(f.Hosts), 0o644); err != nil {
		return fmt.Errorf("writing hosts: %w", err)
	}
	if err := os.WriteFile("/etc/resolv.conf", resolvFile(f.DNS), 0o644); err != nil {
		return fmt.Errorf("writing resolver's configuration: %w", err)
	}
	// Convenience for the workload; nothing the guest trusts depends on it.
	if f.UnixTime > 0 {
		_ = unix.Settimeofday(&unix.Timeval{Sec: f.UnixTime}) // a clock left as it is harms nobody
	}
	return nil
}

// hostsFile leaves out what is no name or no address: it is the host's word.
func hostsFile(names map[string]string) []byte {
	var out bytes.Buffer
	out.WriteString("127.0.0.1 localhost\n::1 localhost\n")
	for _, name := range slices.Sorted(maps.Keys(names)) {
		addr, ok := address(names[name])
		// Names obey the same rules as files, and are as safe in a line.
		if ok && name != "localhost" && contract.ValidFileName(name) {
			fmt.Fprintf(&out, "%s %s\n", addr, name)
		}
	}
	return out.Bytes()
}

func resolvFile(servers []string) []byte {
	var out bytes.Buffer
	for _, s := range servers {
		if addr, ok := address(s); ok {
			fmt.Fprintf(&out, "nameserver %s\n", addr)
		}
	}
	return out.Bytes()
}

// address reads an address without a zone: netip takes anything for one, line
// breaks too.
func address(s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(s)
	return addr, err == nil && addr.Zone() == ""
}

// The kernel's ACPI events (Linux drivers/acpi/event.c): a generic netlink
// family whose one multicast group carries struct acpi_genl_event, which
// begins with the device class.
const (
	acpiFamily = "acpi_event"
	classPower = "button/power"
)

// PowerButton calls pressed whenever the host presses the power button, which
// is how it asks a guest to end by itself, until ctx ends.
func PowerButton(ctx context.Context, pressed func()) error {
	family, err := netlink.GenlFamilyGet(acpiFamily)
	if err != nil || len(family.Groups) == 0 {
		return fmt.Errorf("finding ACPI events: %w", err)
	}
	socket, err := nl.Subscribe(unix.NETLINK_GENERIC, uint(family.Groups[0].ID))
	if err != nil {
		return fmt.Errorf("listening for ACPI events: %w", err)
	}
	stop := context.AfterFunc(ctx, socket.Close)
	defer stop()
	for {
		messages, _, err := socket.Receive()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receiving ACPI events: %w", err)
		}
		for _, m := range messages {
			if bytes.Contains(m.Data, []byte(classPower+"\x00")) {
				pressed()
			}
		}
	}
}
