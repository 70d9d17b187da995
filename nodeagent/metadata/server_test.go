package metadata

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
)

// pipes is a listener of in-memory connections.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	c, ok := <-p.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.conns) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// fromPeer is a connection of the guest's.
type fromPeer struct{ net.Conn }

func (fromPeer) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

func TestSlowSendersAreCut(t *testing.T) {
	t.Parallel()
	token := contract.MetadataHeader + ": 1\r\n"
	for name, c := range map[string]struct {
		sent string
		cut  time.Duration
	}{
		"nothing":         {"", headerTimeout},
		"half a header":   {"GET /v1/manifest HTTP/1.1\r\nHost:", headerTimeout},
		"half a status":   {"POST /v1/status HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n" + token + "\r\n{", bodyTimeout},
		"half a result":   {"PUT /v1/results/out.age HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n" + token + "\r\nx", stallTimeout},
		"a whole request": {"GET /v1/manifest HTTP/1.1\r\nHost: a\r\n" + token + "\r\n", idleTimeout},
	} {
		synctest.Test(t, func(t *testing.T) {
			x := &sink{quota: 1 << 20}
			srv := New(hclog.NewNullLogger(), time.Now)
			l := &pipes{conns: make(chan net.Conn)}
			srv.listen = func(context.Context, string) (net.Listener, error) { return l, nil }
			if err := srv.Open(t.Context(), testSession(x)); err != nil {
				t.Fatal(err)
			}
			client, server := net.Pipe()
			l.conns <- fromPeer{server}
			begin := time.Now()
			go io.WriteString(client, c.sent) //nolint:errcheck // the server may cut it
			_, err := io.Copy(io.Discard, client)
			if took := time.Since(begin); err != nil || took < c.cut || took > c.cut+time.Second {
				t.Errorf("%s: cut after %s, %v; want %s", name, took, err, c.cut)
			}
			if len(x.results)+len(x.statuses) > 0 {
				t.Errorf("%s reached the sink", name)
			}
			if err := errors.Join(srv.Shutdown(), client.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// served is a Server on loopback.
func served(t *testing.T, x *sink) *Server {
	t.Helper()
	srv := New(hclog.NewNullLogger(), time.Now)
	srv.listen = func(ctx context.Context, _ string) (net.Listener, error) {
		var cfg net.ListenConfig
		return cfg.Listen(ctx, "tcp", "127.0.0.1:0")
	}
	if x.quota == 0 {
		x.quota = 1 << 20
	}
	t.Cleanup(func() {
		if err := srv.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	return srv
}

func TestChallengeIsAnsweredOnce(t *testing.T) {
	t.Parallel()
	srv := served(t, &sink{})
	s := newTestSession(&sink{})
	srv.sessions["guest-1"] = s
	close(s.done)
	nonce := bytes.Repeat([]byte{7}, 32)
	type outcome struct {
		evidence []byte
		err      error
	}
	got := make(chan outcome)
	go func() {
		evidence, err := srv.Challenge(t.Context(), "guest-1", nonce)
		got <- outcome{evidence, err}
	}()
	var c contract.Challenge
	for range 2 { // the first answer may have been lost on the way
		_, body := call(s, request("GET", contract.PathChallenge, ""))
		if err := json.Unmarshal([]byte(body), &c); err != nil || !bytes.Equal(c.Nonce, nonce) || len(c.ID) != 32 {
			t.Fatalf("challenge is %s, %v", body, err)
		}
	}
	if status, body := call(s, request("POST", contract.PathEvidence+"?id="+c.ID, "\x00unopened")); status != 204 {
		t.Fatalf("answer is %d %s", status, body)
	}
	if o := <-got; o.err != nil || string(o.evidence) != "\x00unopened" {
		t.Errorf("evidence is %q, %v", o.evidence, o.err)
	}
	if status, _ := call(s, request("POST", contract.PathEvidence+"?id="+c.ID, "again")); status != 409 {
		t.Errorf("second answer: %d", status)
	}
}

func TestChallengesAreRefusedWithAReason(t *testing.T) {
	t.Parallel()
	srv := served(t, &sink{})
	s := newTestSession(&sink{})
	srv.sessions["guest-1"] = s
	close(s.done)
	nonce := make([]byte, 32)
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan error)
	for range maxChallenges {
		go func() {
			_, err := srv.Challenge(ctx, "guest-1", nonce)
			waiting <- err
		}()
	}
	full := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.pending) == maxChallenges
	}
	for deadline := time.Now().Add(10 * time.Second); !full(); {
		if time.Now().After(deadline) {
			t.Fatal("challenges do not queue")
		}
	}
	expect := func(id string, nonce []byte, want string) {
		t.Helper()
		_, err := srv.Challenge(t.Context(), id, nonce)
		if got := contract.AsRefusal(err).Code; err == nil || got != want {
			t.Errorf("refused as %v, want %s", err, want)
		}
	}
	expect("guest-1", nonce, "evidence.busy")
	expect("guest-2", nonce, "guest.not-running")
	expect("guest-1", nonce[:8], "evidence.nonce")
	cancel()
	for range maxChallenges {
		if err := <-waiting; contract.AsRefusal(err).Code != "evidence.timeout" {
			t.Errorf("refused as %v", err)
		}
	}
	go func() {
		_, err := srv.Challenge(t.Context(), "guest-1", nonce)
		waiting <- err
	}()
	if _, body := call(s, request("GET", contract.PathChallenge, "")); !strings.Contains(body, "nonce") {
		t.Errorf("poll says %s", body)
	}
	if err := srv.Close("guest-1"); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; contract.AsRefusal(err).Code != "guest.not-running" {
		t.Errorf("refused as %v", err)
	}
}

// Not beside tests that start programs: a child has every socket of this
// process until it executes, also one that is closed meanwhile.
//
//nolint:paralleltest // see above
func TestSessionIsServedAndClosed(t *testing.T) {
	x := &sink{}
	srv := served(t, x)
	var addr string
	// An address of its own: on 127.0.0.1 another test, or the dialling socket
	// itself, may get the port right after it is closed.
	srv.listen = func(ctx context.Context, _ string) (net.Listener, error) {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.83.83.83:0")
		if err == nil {
			addr = l.Addr().String()
		}
		return l, err
	}
	if err := srv.Open(t.Context(), testSession(x)); err != nil {
		t.Fatal(err)
	}
	if err := srv.Open(t.Context(), testSession(x)); err == nil {
		t.Error("a second session of the same guest was opened")
	}
	// More connections than allowed are cut; the others live.
	conns := make([]net.Conn, 0, maxConnections+3)
	for range cap(conns) {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close() //nolint:errcheck // a client's end
		conns = append(conns, conn)
	}
	served := 0
	for _, conn := range conns {
		_, err := io.WriteString(conn, "GET "+contract.PathManifest+" HTTP/1.1\r\nHost: a\r\n"+contract.MetadataHeader+": 1\r\n\r\n")
		if err != nil {
			continue // cut already
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			continue
		}
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode == http.StatusOK && string(body) == `{"version":1}` {
			served++
		}
		resp.Body.Close() //nolint:errcheck // read to its end
	}
	if served != maxConnections {
		t.Errorf("%d connections were served, want %d", served, maxConnections)
	}
	for range 2 {
		if err := srv.Close("guest-1"); err != nil {
			t.Fatal(err)
		}
	}
	if conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", addr); err == nil {
		conn.Close() //nolint:errcheck // a client's end
		t.Error("a closed session accepts connections")
	}
	if err := srv.Open(t.Context(), testSession(x)); err != nil {
		t.Errorf("opening again: %v", err)
	}
}

func TestMalformedSessionIsNotOpened(t *testing.T) {
	t.Parallel()
	srv := served(t, &sink{})
	for name, change := range map[string]func(*Session){
		"no id":          func(x *Session) { x.ID = "" },
		"no device":      func(x *Session) { x.Device = "" },
		"no peer":        func(x *Session) { x.Peer = netip.Addr{} },
		"no sink":        func(x *Session) { x.Sink = nil },
		"no facts":       func(x *Session) { x.Network = nil },
		"no manifest":    func(x *Session) { x.Manifest = nil },
		"large manifest": func(x *Session) { x.Manifest = make([]byte, contract.MaxManifestBytes+1) },
		"bad name":       func(x *Session) { x.Results = []string{"../a"} },
	} {
		x := testSession(&sink{})
		change(&x)
		if err := srv.Open(t.Context(), x); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
	srv.listen = func(context.Context, string) (net.Listener, error) { return nil, errors.New("injected") }
	if err := srv.Open(t.Context(), testSession(&sink{})); err == nil || len(srv.sessions) != 0 {
		t.Errorf("opened on a device that fails: %v, %d sessions", err, len(srv.sessions))
	}
}
