package relay

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

func TestWhatIsNoClientHelloIsCutOff(t *testing.T) {
	t.Parallel()
	r, addr := serve(t, Limits{Hello: 300 * time.Millisecond})
	giant := []byte{22, 3, 1, 0x40, 0, 1, 0, 0xf0, 0}
	for name, c := range map[string]struct {
		send []byte
		want Reason
	}{
		"HTTP":                  {[]byte("GET / HTTP/1.1\r\nHost: a.guests.example\r\n\r\n"), NotTLS},
		"noise":                 {bytes.Repeat([]byte{0xff}, 4096), NotTLS},
		"nothing":               {nil, Slow},
		"a head and no more":    {[]byte{22, 3, 1}, Slow},
		"a hello without end":   {append(giant, make([]byte, 64<<10)...), NotTLS},
		"an alert":              {alertInternalError, NotTLS},
		"a record of no length": {bytes.Repeat([]byte{22, 3, 1, 0, 0}, 8192), NotTLS},
	} {
		before := r.Counts().Refused[c.want]
		conn, err := dialTCP(addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, _ = conn.Write(c.send)
		if got, _ := io.ReadAll(conn); len(got) != 0 {
			t.Errorf("%s: answered % x", name, got)
		}
		_ = conn.Close()
		until(t, name+" refused as "+string(c.want), func() bool { return r.Counts().Refused[c.want] == before+1 })
	}
}

func TestTenThousandClientsThatSayNothingLeaveNothing(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "a.guests.example")
	r, addr := serve(t, Limits{Connections: 256, PerSource: 128, Hello: time.Minute})
	route(t, r, "guest", "a.guests.example", g)
	var held []net.Conn
	for range 10000 {
		conn, err := dialTCP(addr)
		if errors.Is(err, syscall.ECONNRESET) {
			continue // refused before it knew that it was accepted
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(held) < 200 {
			held = append(held, conn)
			continue
		}
		_ = conn.Close()
	}
	until(t, "all but 128 were refused", func() bool { return r.Counts().Refused[SourceFull] >= 10000-128-200 && r.Counts().Open <= 128 })
	for _, conn := range held {
		_ = conn.Close()
	}
	until(t, "the places are free", func() bool { return r.Counts().Open == 0 })
	conn, err := call(addr, "a.guests.example", g)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}

func TestWhoNamesNobodyGivesWayToWhoDoes(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "a.guests.example")
	r, addr := serve(t, Limits{Connections: 4, Hello: time.Hour})
	route(t, r, "guest", "a.guests.example", g)
	var silent []net.Conn
	for range 4 {
		conn, err := dialTCP(addr)
		if err != nil {
			t.Fatal(err)
		}
		defer hangUp(conn)
		silent = append(silent, conn)
	}
	until(t, "all places are taken", func() bool { return r.Counts().Open == 4 })
	for i := range 4 {
		conn, err := call(addr, "a.guests.example", g)
		if err != nil {
			t.Fatalf("the %d. that names a guest: %v", i+1, err)
		}
		defer hangUp(conn)
		_ = silent[i].SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := silent[i].Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the %d. that waits did not give way: %v", i+1, err)
		}
	}
	if conn, err := call(addr, "a.guests.example", g); err == nil {
		hangUp(conn)
		t.Error("a connection to a guest gave way")
	}
	until(t, "all are told apart", func() bool {
		c := r.Counts()
		return c.Open == 4 && c.Refused[Slow] == 4 && c.Refused[Full] == 1
	})
}

// Not parallel: other tests have sockets too. The collector would close those
// that were forgotten.
func TestSocketsAreGivenBack(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	sockets := func() (n int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "socket:") {
				n++
			}
		}
		return n
	}
	g := newGuest(t, "a.guests.example")
	r, addr := serve(t, Limits{})
	route(t, r, "guest", "a.guests.example", g)
	before := sockets()
	for range 20 {
		var open []io.Closer
		for n := range 48 {
			switch n % 3 {
			case 0:
				conn, err := call(addr, "a.guests.example", g)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
					t.Fatal(err)
				}
				open = append(open, conn)
			default:
				conn, err := dialTCP(addr)
				if err != nil {
					t.Fatal(err)
				}
				if n%3 == 1 {
					_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n"))
				}
				open = append(open, conn)
			}
		}
		for _, conn := range open {
			hangUp(conn)
		}
		until(t, "all have left", func() bool { return r.Counts().Open == 0 })
	}
	until(t, "the sockets are back", func() bool { return sockets() <= before })
}

func TestNothingOfAHelloIsLogged(t *testing.T) {
	t.Parallel()
	var logged bytes.Buffer
	r := New(Config{}, hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: &logged}))
	defer r.Close()
	listen := net.ListenConfig{}
	l, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.group.Go(func() { _ = r.serve(l, r.byName) })
	route(t, r, "guest", "canary.guests.example", guest{addr: netip.MustParseAddrPort("127.0.0.1:1")})
	for _, name := range []string{"canary.guests.example", "canary.other.example"} {
		_ = alert(l.Addr().String(), &tls.Config{ServerName: name, InsecureSkipVerify: true})
	}
	r.Close()
	if !strings.Contains(logged.String(), "refused") || strings.Contains(logged.String(), "canary") {
		t.Errorf("logged:\n%s", &logged)
	}
}
