package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/network/relay"
)

// servicePort is service as a number.
const servicePort = 7000

// publishing is testGuest with its service on a port of the host.
func publishing(index uint32, port uint16) Guest {
	g := testGuest(index)
	g.Ports = []Publish{{port, servicePort}}
	return g
}

func TestKernelConnectionsToAPortAndOfAClientAreLimited(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, func(c *Config) { c.MaxPortConnections, c.MaxSourceConnections = 4, 3 })
	w.boot(t, publishing(1, 20001))
	w.boot(t, publishing(2, 20002))
	const other = "198.51.100.77"
	w.outside.do(t, func() error { return up("up0", other+"/24") })
	var held []net.Conn
	dial := func(from, port string) error {
		who, conn, err := reach(hostAddr+":"+port, from+":0")
		if err != nil {
			return err
		}
		held = append(held, conn)
		if who != from {
			return fmt.Errorf("the guest sees %s, want the client %s", who, from)
		}
		return nil
	}
	w.outside.do(t, func() error {
		for range 3 {
			if err := dial(outsideAddr, "20001"); err != nil {
				return err
			}
		}
		if dial(outsideAddr, "20002") == nil {
			return errors.New("one client has more connections than it may")
		}
		if err := dial(other, "20001"); err != nil {
			return fmt.Errorf("another client: %w", err)
		}
		if dial(other, "20001") == nil {
			return errors.New("one port has more connections than it may")
		}
		return dial(other, "20002")
	})
	// What the kernel counts is no change of the table.
	text, err := w.host.filter.read(t.Context())
	if err != nil || text != w.host.written {
		t.Errorf("the table seems changed, %v:\n%s\n%s", err, text, w.host.written)
	}
	for _, conn := range held {
		_ = conn.Close()
	}
	eventually(t, "closed connections are no longer counted", func() bool {
		return w.outside.try(func() error { return dial(outsideAddr, "20002") }) == nil
	})
}

func TestKernelADrainingGuestKeepsWhatIsOpen(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, publishing(1, 20001))
	var open net.Conn
	w.outside.do(t, func() (err error) {
		_, open, err = reach(hostAddr+":20001", "")
		return err
	})
	draining := m.guest
	draining.Ports = nil
	if err := w.host.Add(t.Context(), draining); err != nil {
		t.Fatal(err)
	}
	w.outside.do(t, func() error {
		if _, err := open.Write([]byte("x")); err != nil {
			return err
		}
		if n, err := open.Read(make([]byte, 1)); n != 1 {
			return fmt.Errorf("the open connection: %w", err)
		}
		return blockedDial(hostAddr + ":20001")
	})
}

func TestKernelAPublishedPortIsReachedByIPv6(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, publishing(1, 20001))
	r := relay.New(relay.Config{}, hclog.NewNullLogger())
	t.Cleanup(r.Close)
	to := netip.AddrPortFrom(m.link.GuestAddr.Addr(), servicePort)
	if err := r.Set(t.Context(), m.guest.ID, []relay.Route{{Port: 20001, To: to}}); err != nil {
		t.Fatal(err)
	}
	w.outside.do(t, func() error {
		who, conn, err := reach("[2001:db8::2]:20001", "")
		if err != nil {
			return err
		}
		if who != m.link.HostAddr.Addr().String() {
			err = fmt.Errorf("the guest sees %s, want the host's end of its link", who)
		}
		return errors.Join(err, conn.Close())
	})
	// By IPv4 it is the kernel that forwards, with the client's address.
	w.outside.do(t, func() error {
		who, conn, err := reach(hostAddr+":20001", "")
		if err == nil && who != outsideAddr {
			err = fmt.Errorf("the guest sees %s, want %s", who, outsideAddr)
		}
		if conn != nil {
			_ = conn.Close()
		}
		return err
	})
}

func TestKernelPortsOfProcessesAreSeen(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	if err := errors.Join(serve(t, "0.0.0.0:20003"), serve(t, "[::1]:20004"), serve(t, "[::]:20005")); err != nil {
		t.Fatal(err)
	}
	open, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", "127.0.0.1:20003")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close() //nolint:errcheck // the test is over
	ports, err := w.host.Listening()
	if err != nil || len(ports) != 3 || !ports[20003] || !ports[20004] || !ports[20005] {
		t.Errorf("listening %v, %v", ports, err)
	}
}
