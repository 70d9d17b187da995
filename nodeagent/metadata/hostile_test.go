package metadata

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
)

// listening opens a session on loopback and returns where.
func listening(tb testing.TB, srv *Server, x Session) string {
	tb.Helper()
	var addr string
	srv.listen = func(ctx context.Context, _ string) (net.Listener, error) {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
		if err == nil {
			addr = l.Addr().String()
		}
		return l, err
	}
	if err := srv.Open(tb.Context(), x); err != nil {
		tb.Fatal(err)
	}
	return addr
}

func connect(tb testing.TB, addr string) net.Conn {
	tb.Helper()
	conn, err := (&net.Dialer{}).DialContext(tb.Context(), "tcp", addr)
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(30 * time.Second))
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	return conn
}

// answer reads one answer whole and returns its status.
func answer(r *bufio.Reader) (int, error) {
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, errors.Join(err, resp.Body.Close())
}

// exchange sends raw bytes, ends, and returns the status of every answer.
func exchange(t *testing.T, addr, raw string) (statuses []int) {
	t.Helper()
	conn := connect(t, addr)
	_, err := io.WriteString(conn, raw)
	if end, ok := conn.(*net.TCPConn); ok && err == nil {
		err = end.CloseWrite()
	}
	answers := bufio.NewReader(conn)
	for err == nil {
		var status int
		if status, err = answer(answers); status != 0 {
			statuses = append(statuses, status)
		}
	}
	return statuses
}

// hidden is a request that must never be seen as one.
const hidden = "POST /v1/status HTTP/1.1\r\nHost: a\r\n" + contract.MetadataHeader + ": 1\r\nContent-Length: 32\r\n\r\n" + `{"phase":"booted","uptime_ms":5}`

// What lies between two requests is read in one way only, and what could be
// read in two is refused and ends the connection.
func TestNothingIsSmuggledPastTheFirstRequest(t *testing.T) {
	t.Parallel()
	head := "Host: a\r\n" + contract.MetadataHeader + ": 1\r\n"
	for name, raw := range map[string]string{
		"length and chunks":          "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"chunks and length":          "POST /v1/status HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + hidden,
		"chunks twice":               "POST /v1/status HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"chunks under a name":        "POST /v1/status HTTP/1.1\r\n" + head + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + hidden,
		"chunks after identity":      "POST /v1/status HTTP/1.1\r\n" + head + "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n" + hidden,
		"chunks behind a tab":        "POST /v1/status HTTP/1.1\r\n" + head + "Transfer-Encoding:\tchunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n" + hidden,
		"a space before the colon":   "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length : 1\r\n\r\nx" + hidden,
		"two lengths":                "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length: 1\r\nContent-Length: 150\r\n\r\nx" + hidden,
		"a list of lengths":          "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length: 1, 150\r\n\r\nx" + hidden,
		"a signed length":            "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length: +1\r\n\r\nx" + hidden,
		"a negative length":          "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length: -1\r\n\r\nx" + hidden,
		"a hexadecimal length":       "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length: 0x1\r\n\r\nx" + hidden,
		"a length beyond all":        "POST /v1/status HTTP/1.1\r\n" + head + "Content-Length: 99999999999999999999\r\n\r\nx" + hidden,
		"a question with a body":     "GET /v1/manifest HTTP/1.1\r\n" + head + "Content-Length: 150\r\n\r\n" + hidden,
		"a question with chunks":     "GET /v1/manifest HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"two hosts":                  "GET /v1/manifest HTTP/1.1\r\n" + head + "Host: b\r\n\r\n" + hidden,
		"no host":                    "GET /v1/manifest HTTP/1.1\r\n" + contract.MetadataHeader + ": 1\r\n\r\n" + hidden,
		"two tokens":                 "GET /v1/manifest HTTP/1.1\r\n" + head + contract.MetadataHeader + ": 1\r\n\r\n" + hidden,
		"a token in another's line":  "GET /v1/manifest HTTP/1.1\r\nHost: a\r\nA: b\r" + contract.MetadataHeader + ": 1\r\n\r\n" + hidden,
		"a token behind a zero":      "GET /v1/manifest HTTP/1.1\r\nHost: a\r\nA: b\x00\r\n" + head + "\r\n" + hidden,
		"a line in the target":       "GET /v1/manifest\nHTTP/1.1\r\n" + head + "\r\n" + hidden,
		"a tab in the request line":  "GET\t/v1/manifest HTTP/1.1\r\n" + head + "\r\n" + hidden,
		"a version beyond":           "GET /v1/manifest HTTP/2.0\r\n" + head + "\r\n" + hidden,
		"the preface of HTTP/2":      "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hidden,
		"a tunnel":                   "CONNECT a:80 HTTP/1.1\r\n" + head + "\r\n" + hidden,
		"an upgrade":                 "GET /v1/manifest HTTP/1.1\r\n" + head + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + hidden,
		"a chunk of negative size":   "PUT /v1/results/out.age HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n" + hidden,
		"a chunk with a bare return": "PUT /v1/results/out.age HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\n\r\n1\rx\r\n0\r\n\r\n" + hidden,
		"a chunk larger than said":   "PUT /v1/results/out.age HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\n\r\n1\r\nxyz\r\n0\r\n\r\n" + hidden,
		"an endless chunk's line":    "PUT /v1/results/out.age HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\n\r\n1;" + strings.Repeat("a", 1<<20) + "\r\nx\r\n0\r\n\r\n" + hidden,
		"endless headers":            "GET /v1/manifest HTTP/1.1\r\n" + head + strings.Repeat("A: "+strings.Repeat("a", 1000)+"\r\n", 100) + "\r\n" + hidden,
		"an endless request line":    "GET /" + strings.Repeat("a", 1<<20) + " HTTP/1.1\r\n" + head + "\r\n" + hidden,
		"only lines":                 strings.Repeat("\r\n", 1<<16) + hidden,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := &sink{}
			srv := served(t, x)
			statuses := exchange(t, listening(t, srv, testSession(x)), raw)
			if len(statuses) > 1 || slices.ContainsFunc(statuses, func(s int) bool { return s < 400 }) {
				t.Errorf("answers are %v", statuses)
			}
			if len(x.statuses)+len(x.results)+len(x.manifest) != 0 {
				t.Errorf("the sink got %v %v %v", x.statuses, x.results, x.manifest)
			}
		})
	}
}

func TestPipelinedRequestsAreAnsweredInOrderUntilTheLimit(t *testing.T) {
	t.Parallel()
	x := &sink{}
	srv := served(t, x)
	frozen := time.Unix(1_800_000_000, 0)
	srv.now = func() time.Time { return frozen }
	one := "GET /v1/manifest HTTP/1.1\r\nHost: a\r\n" + contract.MetadataHeader + ": 1\r\n\r\n"
	statuses := exchange(t, listening(t, srv, testSession(x)), strings.Repeat(one, 5000))
	want := append(slices.Repeat([]int{200}, requestBurst), http.StatusTooManyRequests)
	// The connection ends with what was not read: the last answers may be lost.
	if !slices.Equal(statuses, want[:min(len(statuses), len(want))]) || len(statuses) > len(want) {
		t.Errorf("%d answers: %v", len(statuses), statuses)
	}
}

func TestOnlyThePeerIsAnswered(t *testing.T) {
	t.Parallel()
	x := &sink{}
	srv := served(t, x)
	addr := listening(t, srv, testSession(x))
	for from, want := range map[string]int{"127.0.0.1": 1, "127.0.0.2": 0, "127.7.7.7": 0} {
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.WriteString(conn, hidden)
		if err == nil {
			_, err = answer(bufio.NewReader(conn))
		}
		if (err == nil) != (want == 1) || len(x.statuses) > 1 {
			t.Errorf("from %s: %v, taken %d", from, err, len(x.statuses))
		}
		_ = conn.Close()
	}
}

// A guest that opens thousands of connections is served no more than its rate,
// and answered again when it stops.
func TestAFloodOfConnectionsIsTakenSlowly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := &pipes{conns: make(chan net.Conn)}
		accepted := make(chan int)
		limited := newLimited(l, netip.MustParseAddr("127.0.0.1"), maxConnections)
		go func() {
			n := 0
			for {
				conn, err := limited.Accept()
				if err != nil {
					accepted <- n
					return
				}
				n++
				_ = conn.Close()
			}
		}()
		begin := time.Now()
		for range 3000 {
			_, server := net.Pipe()
			l.conns <- fromPeer{server}
		}
		if took, least := time.Since(begin), (3000-acceptBurst-1)*time.Second/acceptRate; took < least {
			t.Errorf("3000 connections were taken in %s, want at least %s", took, least)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if n := <-accepted; n != 3000 {
			t.Errorf("%d connections were served", n)
		}
	})
}

// flood opens connections and asks as fast as it can until ctx ends.
func flood(ctx context.Context, addr string) {
	var senders sync.WaitGroup
	for range 4 {
		senders.Go(func() {
			for ctx.Err() == nil {
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
				if err != nil {
					continue
				}
				_ = conn.SetDeadline(time.Now().Add(time.Second))
				_, _ = io.WriteString(conn, strings.Repeat(hidden, 50))
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}
		})
	}
	senders.Wait()
}

// BenchmarkTwentyGuests is what nineteen guests wait for an answer, alone and
// beside a twentieth that floods its own listener.
func BenchmarkTwentyGuests(b *testing.B) {
	for _, flooded := range []bool{false, true} {
		b.Run(fmt.Sprintf("flood=%v", flooded), func(b *testing.B) {
			srv := New(hclog.NewNullLogger(), time.Now)
			var addrs []string
			for n := range 20 {
				x := testSession(&sink{})
				x.ID = fmt.Sprint("guest-", n)
				addrs = append(addrs, listening(b, srv, x))
			}
			ctx, cancel := context.WithCancel(b.Context())
			var flooding sync.WaitGroup
			if flooded {
				flooding.Go(func() { flood(ctx, addrs[0]) })
			}
			var mu sync.Mutex
			var waits []time.Duration
			var guests sync.WaitGroup
			b.ResetTimer()
			for _, addr := range addrs[1:] {
				conn := connect(b, addr)
				guests.Go(func() {
					mine, err := polite(conn, b.N)
					mu.Lock()
					defer mu.Unlock()
					waits = append(waits, mine...)
					if err != nil {
						b.Error(err)
					}
				})
			}
			guests.Wait()
			b.StopTimer()
			cancel()
			flooding.Wait()
			if err := srv.Shutdown(); err != nil {
				b.Fatal(err)
			}
			slices.Sort(waits)
			at := func(percent int) float64 { return float64(waits[(len(waits)-1)*percent/100].Microseconds()) / 1000 }
			b.ReportMetric(at(50), "p50-ms")
			b.ReportMetric(at(99), "p99-ms")
			b.ReportMetric(at(100), "max-ms")
		})
	}
}

// polite asks at the rate a guest is allowed and returns how long each answer
// took.
func polite(conn net.Conn, n int) (waits []time.Duration, err error) {
	answers := bufio.NewReader(conn)
	pace := time.NewTicker(time.Second / requestRate)
	defer pace.Stop()
	for range n {
		begin := time.Now()
		_, err := io.WriteString(conn, "GET /v1/manifest HTTP/1.1\r\nHost: a\r\n"+contract.MetadataHeader+": 1\r\n\r\n")
		if err != nil {
			return waits, err
		}
		status, err := answer(answers)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d", status)
		}
		if err != nil {
			return waits, err
		}
		waits = append(waits, time.Since(begin))
		<-pace.C
	}
	return waits, nil
}
