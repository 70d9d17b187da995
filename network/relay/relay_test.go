package relay

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/confidential-node/agent/firmware/contract"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// guest is a TLS server that says its name and then repeats what it hears.
type guest struct {
	addr netip.AddrPort
	cert *x509.Certificate
}

func newGuest(tb testing.TB, name string) guest {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		tb.Fatal(err)
	}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer hangUp(conn)
				_, _ = io.WriteString(conn, name+"\n")
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	tb.Cleanup(func() {
		_ = listener.Close()
		group.Wait()
	})
	return guest{netip.MustParseAddrPort(listener.Addr().String()), cert}
}

// serve runs a router until the test ends.
func serve(tb testing.TB, limits Limits) (*Router, string) {
	tb.Helper()
	r := New(Config{Listen: "127.0.0.1:0", Limits: limits}, hclog.NewNullLogger())
	addr := make(chan string, 1)
	listen := r.listen
	r.listen = func(ctx context.Context, network, address string) (net.Listener, error) {
		l, err := listen(ctx, network, address)
		if network == "tcp" && err == nil {
			addr <- l.Addr().String()
		}
		return l, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("running ended with %v", err)
		}
		if c := r.Counts(); c.Open != 0 || len(c.PerGuest) != 0 || len(r.sources) != 0 {
			tb.Errorf("left behind: %+v, %v", c, r.sources)
		}
	})
	return r, <-addr
}

func route(tb testing.TB, r *Router, id, name string, g guest) {
	tb.Helper()
	if err := r.Set(tb.Context(), id, []Route{{Name: name, To: g.addr}}); err != nil {
		tb.Fatal(err)
	}
}

func hangUp(c io.Closer) { _ = c.Close() }

// dialTLS and dialTCP give up after ten seconds.
func dialTLS(addr string, cfg *tls.Config) (*tls.Conn, error) {
	conn, err := dialTCP(addr)
	if err != nil {
		return nil, err
	}
	client := tls.Client(conn, cfg)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := client.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return client, nil
}

func dialTCP(addr string) (net.Conn, error) {
	dialer := net.Dialer{Timeout: 10 * time.Second}
	return dialer.DialContext(context.Background(), "tcp", addr)
}

// call opens TLS to a guest by name and checks that the guest itself answers.
func call(addr, name string, g guest) (*tls.Conn, error) {
	pool := x509.NewCertPool()
	pool.AddCert(g.cert)
	conn, err := dialTLS(addr, &tls.Config{ServerName: name, RootCAs: pool})
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	greeting := make([]byte, len(name)+1)
	if _, err := io.ReadFull(conn, greeting); err != nil || string(greeting) != name+"\n" {
		return nil, errors.Join(fmt.Errorf("greeted with %q", greeting), err, conn.Close())
	}
	return conn, nil
}

// until waits for something that another goroutine is about to do.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for tick := time.NewTicker(time.Millisecond); !holds(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestEachNameReachesItsGuestAndTLSIsTheGuests(t *testing.T) {
	t.Parallel()
	a, b := newGuest(t, "a.guests.example"), newGuest(t, "b.guests.example")
	r, addr := serve(t, Limits{})
	route(t, r, "guest-a", "a.guests.example", a)
	route(t, r, "guest-b", "b.guests.example", b)
	for name, g := range map[string]guest{"a.guests.example": a, "b.guests.example": b} {
		conn, err := call(addr, name, g)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !conn.ConnectionState().PeerCertificates[0].Equal(g.cert) {
			t.Errorf("%s: the certificate is not the guest's", name)
		}
		sent := make([]byte, 3<<20)
		_, _ = rand.Read(sent)
		go func() {
			_, _ = conn.Write(sent)
			_ = conn.CloseWrite() // the end passes while the guest still answers
		}()
		got, err := io.ReadAll(conn)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%s: %d of %d bytes came back, %v", name, len(got), len(sent), err)
		}
		_ = conn.Close()
	}
	if _, err := call(addr, "a.guests.example", b); err == nil {
		t.Error("one guest passed for the other")
	}
	// Names do not depend on case (RFC 4343).
	if conn, err := dialTLS(addr, &tls.Config{ServerName: "A.Guests.Example", InsecureSkipVerify: true}); err != nil {
		t.Errorf("upper case: %v", err)
	} else {
		_ = conn.Close()
	}
}

// alert is what the client is told.
func alert(addr string, cfg *tls.Config) string {
	conn, err := dialTLS(addr, cfg)
	if err == nil {
		_ = conn.Close()
		return "connected"
	}
	return err.Error()
}

func TestClientsThatNameNoGuestAreTold(t *testing.T) {
	t.Parallel()
	r, addr := serve(t, Limits{})
	route(t, r, "guest", "gone.guests.example", guest{addr: netip.MustParseAddrPort("127.0.0.1:1")})
	for name, want := range map[string]string{
		"other.guests.example": "unrecognized name",
		"127.0.0.1":            "unrecognized name", // an address is no name: none is sent
		"gone.guests.example":  "internal error",
	} {
		if got := alert(addr, &tls.Config{ServerName: name, InsecureSkipVerify: true}); !strings.Contains(got, want) {
			t.Errorf("%s: %s, want %q", name, got, want)
		}
	}
	refused := r.Counts().Refused
	if refused[UnknownName] != 1 || refused[NoName] != 1 || refused[Unreachable] != 1 {
		t.Errorf("counted %v", refused)
	}
}

func TestAHelloInManyPiecesIsUnderstood(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "a.guests.example")
	r, addr := serve(t, Limits{})
	route(t, r, "guest", "a.guests.example", g)
	conn, err := dialTCP(addr)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(g.cert)
	client := tls.Client(&cutting{Conn: conn}, &tls.Config{ServerName: "a.guests.example", RootCAs: pool})
	defer hangUp(client)
	if err := client.HandshakeContext(t.Context()); err != nil {
		t.Error(err)
	}
}

// cutting sends its first write byte by byte, in records of one byte each.
type cutting struct {
	net.Conn
	done bool
}

func (c *cutting) Write(p []byte) (int, error) {
	if c.done {
		return c.Conn.Write(p)
	}
	c.done = true
	for _, b := range p[5:] {
		if _, err := c.Conn.Write([]byte{p[0], p[1], p[2], 0, 1, b}); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func TestLimitsHoldAndAreGivenBack(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "a.guests.example")
	for name, c := range map[string]struct {
		limits Limits
		want   Reason
	}{
		"all":        {Limits{Connections: 2}, Full},
		"per source": {Limits{PerSource: 2}, SourceFull},
		"per guest":  {Limits{PerGuest: 2}, GuestFull},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, addr := serve(t, c.limits)
			route(t, r, "guest", "a.guests.example", g)
			var open []*tls.Conn
			for range 2 {
				conn, err := call(addr, "a.guests.example", g)
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, conn)
			}
			if _, err := call(addr, "a.guests.example", g); err == nil {
				t.Error("one too many got through")
			}
			until(t, "the refusal is counted", func() bool { return r.Counts().Refused[c.want] == 1 })
			for _, conn := range open {
				_ = conn.Close()
			}
			until(t, "the places are free", func() bool { return r.Counts().Open == 0 })
			conn, err := call(addr, "a.guests.example", g)
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
		})
	}
}

func TestSilentConnectionsEndAndBusyOnesDoNot(t *testing.T) {
	t.Parallel()
	const idle = 2 * time.Second
	g := newGuest(t, "a.guests.example")
	r, addr := serve(t, Limits{Idle: idle})
	route(t, r, "guest", "a.guests.example", g)
	silent, err := call(addr, "a.guests.example", g)
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp(silent)
	busy, err := call(addr, "a.guests.example", g)
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp(busy)
	tick := time.NewTicker(idle / 8)
	defer tick.Stop()
	one := make([]byte, 1)
	for ended := false; !ended; {
		<-tick.C
		if _, err := busy.Write(one); err != nil {
			t.Fatalf("the busy one ended: %v", err)
		}
		if _, err := io.ReadFull(busy, one); err != nil {
			t.Fatalf("the busy one ended: %v", err)
		}
		ended = r.Counts().Open == 1
	}
	if _, err := silent.Read(one); err == nil {
		t.Error("the silent one is still there")
	}
}

func TestAReceiverThatTakesNothingIsGivenUp(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "a.guests.example")
	r, addr := serve(t, Limits{Idle: 300 * time.Millisecond})
	route(t, r, "guest", "a.guests.example", g)
	conn, err := call(addr, "a.guests.example", g)
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp(conn)
	// It sends without end and reads none of the echo, until all buffers are full.
	_ = conn.SetWriteDeadline(time.Now().Add(30 * time.Second))
	for err == nil {
		_, err = conn.Write(make([]byte, 64<<10))
	}
	until(t, "it is given up", func() bool { return r.Counts().Open == 0 })
}

func TestAGuestThatGoesTakesItsNamesAndConnectionsAlong(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "a.guests.example")
	r, addr := serve(t, Limits{})
	route(t, r, "guest", "a.guests.example", g)
	conn, err := call(addr, "a.guests.example", g)
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp(conn)
	r.Remove("guest")
	if _, err := call(addr, "a.guests.example", g); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("a new connection while draining: %v", err)
	}
	one := []byte{1}
	if _, err := conn.Write(one); err != nil {
		t.Errorf("an open connection while draining: %v", err)
	}
	if _, err := io.ReadFull(conn, one); err != nil {
		t.Errorf("an open connection while draining: %v", err)
	}
	r.Drop("guest")
	if _, err := conn.Read(one); err == nil {
		t.Error("the connection outlived its guest")
	}
	until(t, "nothing is left", func() bool { return r.Counts().Open == 0 })
}

func TestNamesBelongToOneGuest(t *testing.T) {
	t.Parallel()
	r := New(Config{}, hclog.NewNullLogger())
	defer r.Close()
	to := netip.MustParseAddrPort("127.0.0.1:1")
	set := func(guest string, names ...string) string {
		var routes []Route
		for _, name := range names {
			routes = append(routes, Route{Name: name, To: to})
		}
		if err := r.Set(t.Context(), guest, routes); err != nil {
			return contract.AsRefusal(err).Code
		}
		return ""
	}
	for i, c := range []struct {
		guest string
		names []string
		want  string
	}{
		{"a", []string{"x.example", "y.example"}, ""},
		{"b", []string{"z.example", "y.example"}, "network.name-in-use"},
		{"b", []string{"z.example"}, ""}, // nothing of the refused set stayed
		{"a", []string{"x.example"}, ""}, // y is given up
		{"b", []string{"y.example", "y.example"}, "network.name-in-use"},
		{"b", []string{"y.example", "Y.example"}, "network.name-malformed"},
		{"b", []string{"y.example"}, ""},
	} {
		if got := set(c.guest, c.names...); got != c.want {
			t.Errorf("step %d: %q, want %q", i, got, c.want)
		}
	}
	got := r.Routes()
	if len(got) != 2 || got[0].Name != "x.example" || got[0].Guest != "a" || got[1].Name != "y.example" || got[1].Guest != "b" {
		t.Errorf("routes %v", got)
	}
}

// freePort is one that nobody listens on now.
func freePort(t *testing.T) uint16 {
	t.Helper()
	listen := net.ListenConfig{}
	l, err := listen.Listen(t.Context(), "tcp6", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp(l)
	return netip.MustParseAddrPort(l.Addr().String()).Port()
}

func TestAPublishedPortIsReachedByIPv6(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "a.guests.example")
	r, _ := serve(t, Limits{})
	number := freePort(t)
	at := net.JoinHostPort("::1", strconv.Itoa(int(number)))
	set := func(guest string, numbers ...uint16) error {
		var routes []Route
		for _, n := range numbers {
			routes = append(routes, Route{Port: n, To: g.addr})
		}
		return r.Set(t.Context(), guest, routes)
	}
	if err := set("guest", number); err != nil {
		t.Fatal(err)
	}
	conn, err := call(at, "a.guests.example", g)
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp(conn)
	if err := set("other", number); contract.AsRefusal(err).Code != "network.port-in-use" {
		t.Errorf("another guest took the port: %v", err)
	}
	taken, err := r.listen(t.Context(), "tcp6", "[::]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp(taken)
	foreign := netip.MustParseAddrPort(taken.Addr().String()).Port()
	if err := set("other", freePort(t), foreign); contract.AsRefusal(err).Code != "network.port-in-use" {
		t.Errorf("the port of a process was taken: %v", err)
	}
	if got := r.Routes(); len(got) != 1 || got[0].Guest != "guest" || got[0].Port != number {
		t.Errorf("routes %v", got)
	}
	if err := set("guest", number); err != nil {
		t.Errorf("the same again: %v", err)
	}
	r.Remove("guest")
	if c, err := dialTCP(at); err == nil {
		_ = c.Close()
		t.Error("a new connection while draining")
	}
	one := []byte{1}
	if _, err := conn.Write(one); err != nil {
		t.Errorf("an open connection while draining: %v", err)
	}
	if _, err := io.ReadFull(conn, one); err != nil {
		t.Errorf("an open connection while draining: %v", err)
	}
	r.Drop("guest")
	if _, err := conn.Read(one); err == nil {
		t.Error("the connection outlived its guest")
	}
}

func TestASharedPortThatIsTakenIsNamed(t *testing.T) {
	t.Parallel()
	listen := net.ListenConfig{}
	taken, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := New(Config{Listen: taken.Addr().String()}, hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	until(t, "the trouble is told", func() bool {
		return r.Trouble() != nil && contract.AsRefusal(r.Trouble()).Code == "network.shared-port"
	})
	hangUp(taken)
	until(t, "the trouble passes", func() bool { return r.Trouble() == nil })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestNamesAreHostNames(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 63)
	for name, sound := range map[string]bool{
		"a.b": true, "job-1.guests.example.org": true, long + ".b": true, "1.guests.example": true, "xn--bcher-kva.example": true,
		"": false, "a": false, "a..b": false, ".a.b": false, "a.b.": false, "-a.b": false, "a-.b": false, "A.b": false, "a_b.c": false,
		"*.b": false, "a.b:443": false, long + "a.b": false, "10.0.0.1": false, "bücher.example": false, strings.Repeat("a.", 126) + "a": true,
		strings.Repeat("a.", 126) + "aa": false,
	} {
		if got := CheckName(name) == nil; got != sound {
			t.Errorf("%q: sound is %v", name, got)
		}
	}
	for name, want := range map[string]bool{"a.s.example": true, "s.example": false, "b.a.s.example": false, "as.example": false, ".s.example": false} {
		if Under(name, "s.example") != want {
			t.Errorf("%q under s.example: %v", name, !want)
		}
	}
}

func FuzzHello(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	var sent bytes.Buffer
	_ = tls.Client(writeOnly{&sent}, &tls.Config{ServerName: "a.guests.example"}).HandshakeContext(context.Background())
	f.Add(sent.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		name, read, err := hello(t.Context(), bytes.NewReader(data))
		if err == nil && !bytes.HasPrefix(data, read) {
			t.Error("what is passed on is not what was sent")
		}
		if len(read) > maxHello || len(name) > maxHello {
			t.Error("no limit")
		}
	})
}

// writeOnly is a connection on which nothing is ever answered.
type writeOnly struct{ io.Writer }

func (writeOnly) Read([]byte) (int, error)         { return 0, io.EOF }
func (writeOnly) Close() error                     { return nil }
func (writeOnly) LocalAddr() net.Addr              { return nil }
func (writeOnly) RemoteAddr() net.Addr             { return nil }
func (writeOnly) SetDeadline(time.Time) error      { return nil }
func (writeOnly) SetReadDeadline(time.Time) error  { return nil }
func (writeOnly) SetWriteDeadline(time.Time) error { return nil }

// BenchmarkEcho compares a guest reached through the router with one reached
// directly: 1 MiB there and back, and a new connection.
func BenchmarkEcho(b *testing.B) {
	g := newGuest(b, "a.guests.example")
	r, addr := serve(b, Limits{})
	route(b, r, "guest", "a.guests.example", g)
	for name, to := range map[string]string{"direct": g.addr.String(), "routed": addr} {
		b.Run("bytes/"+name, func(b *testing.B) {
			conn, err := call(to, "a.guests.example", g)
			if err != nil {
				b.Fatal(err)
			}
			defer hangUp(conn)
			_ = conn.SetDeadline(time.Time{})
			data := make([]byte, 1<<20)
			b.SetBytes(2 << 20)
			for b.Loop() {
				sent := make(chan error, 1)
				go func() {
					_, err := conn.Write(data)
					sent <- err
				}()
				if _, err := io.ReadFull(conn, make([]byte, len(data))); err != nil {
					b.Fatal(err)
				}
				if err := <-sent; err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("connect/"+name, func(b *testing.B) {
			for b.Loop() {
				conn, err := call(to, "a.guests.example", g)
				if err != nil {
					b.Fatal(err)
				}
				_ = conn.Close()
			}
		})
	}
}
