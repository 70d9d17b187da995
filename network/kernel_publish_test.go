package network

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

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

// selfSigned is a guest's own certificate.
func selfSigned(t *testing.T, name string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// Guests behind their taps, the router on the host, and clients outside that
// accept no certificate but the guest's own.
func TestKernelGuestsShareATLSPortByName(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	r := relay.New(relay.Config{Listen: ":443"}, hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-over; err != nil {
			t.Error(err)
		}
	})
	pools := map[string]*x509.CertPool{}
	var guests []*machine
	for i := range uint32(2) {
		m, name := w.boot(t, testGuest(i+1)), fmt.Sprintf("job-%d.guests.example", i+1)
		cert, pool := selfSigned(t, name)
		pools[name] = pool
		guests = append(guests, m)
		m.do(t, func() error { return serveTLS(t, cert, name) })
		to := netip.AddrPortFrom(m.link.GuestAddr.Addr(), 8443)
		if err := r.Set(t.Context(), m.guest.ID, []relay.Route{{Name: name, To: to}}); err != nil {
			t.Fatal(err)
		}
	}
	call := func(addr, name string, pool *x509.CertPool) error {
		dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: &tls.Config{ServerName: name, RootCAs: pool}}
		conn, err := dialer.DialContext(t.Context(), "tcp", addr)
		if err != nil {
			return err
		}
		said, err := io.ReadAll(conn)
		if err == nil && string(said) != name {
			err = fmt.Errorf("%s answers as %q", name, said)
		}
		return errors.Join(err, conn.Close())
	}
	eventually(t, "the shared port is served", func() bool {
		return w.outside.try(func() error { return call(hostAddr+":443", "job-1.guests.example", pools["job-1.guests.example"]) }) == nil
	})
	for name, pool := range pools {
		for _, addr := range []string{hostAddr + ":443", "[2001:db8::2]:443"} {
			w.outside.do(t, func() error { return call(addr, name, pool) })
		}
	}
	w.outside.do(t, func() error {
		if err := call(hostAddr+":443", "job-1.guests.example", pools["job-2.guests.example"]); err == nil {
			return errors.New("one guest passed for the other")
		}
		if err := call(hostAddr+":443", "job-3.guests.example", nil); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
			return fmt.Errorf("nobody's name: %w", err)
		}
		return nil
	})
	// The shared port is for the outside; guests reach neither it nor each other.
	guests[0].do(t, func() error {
		return errors.Join(blockedDial(hostAddr+":443"), blockedDial(guests[0].link.HostAddr.Addr().String()+":443"))
	})
}

// serveTLS says a name to whoever connects. It must run on a thread of the
// namespace.
func serveTLS(t *testing.T, cert tls.Certificate, name string) error {
	t.Helper()
	l, err := tls.Listen("tcp", ":8443", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.WriteString(conn, name)
				_ = conn.Close()
			}()
		}
	}()
	return nil
}
