package controlplane

import (
	"crypto/tls"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
)

func TestTheLinkNamesWhyItIsDown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := permissions(host)
	creds := func(p jwt.Permissions, expires time.Time) []byte { return mustCreds(t, w, host, p, expires) }
	w.enrol(host)
	stranger := newWorld(t)
	strangers, _, _, err := stranger.Server.EnrolHost(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	mute, deaf := permissions(host), permissions(host)
	mute.Pub.Allow = jwt.StringList{"$JS.API.CONSUMER.MSG.NEXT.CMD." + host, "$JS.ACK.CMD." + host + ".>"}
	deaf.Pub.Allow = jwt.StringList{"evt." + host + ".>"}
	untrusting := func() control.Transport {
		tr, err := control.NewNATS(control.NATSConfig{
			Servers: []string{w.Server.NATSURL()}, CAFile: stranger.ca, CredsFile: w.file("ok.creds", creds(own, time.Time{})), HostID: host,
		})
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	readable := func() control.Transport {
		path := w.file("open.creds", creds(own, time.Time{}))
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		tr, err := control.NewNATS(control.NATSConfig{Servers: []string{w.Server.NATSURL()}, CAFile: w.ca, CredsFile: path, HostID: host})
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	// expired ends within the hour by the host's clock, and has ended by the agent's.
	expired := w.transportAt(2*time.Hour, host, mustCreds(t, stranger, host, own, time.Now().Add(time.Hour)))
	for name, tc := range map[string]struct {
		transport control.Transport
		state     control.State
		text      string
	}{
		"healthy":                {w.transport(host, creds(own, time.Time{})), control.StateConnected, ""},
		"identity expired":       {w.transport(host, creds(own, time.Now().Add(-time.Hour))), control.StateAuthExpired, "enrol"},
		"identity expires":       {w.transport(host, creds(own, time.Now().Add(2*time.Second))), control.StateAuthExpired, "enrol"},
		"identity of others":     {w.transport(host, strangers), control.StateAuthRefused, "enrol"},
		"may not publish":        {w.transport(host, creds(mute, time.Time{})), control.StatePermission, "evt." + host},
		"may not fetch":          {w.transport(host, creds(deaf, time.Time{})), control.StatePermission, "CONSUMER.MSG.NEXT"},
		"another host's":         {w.transport("node-x", creds(own, time.Time{})), control.StatePermission, "node-x"},
		"not enrolled":           {w.transport("node-y", mustCreds(t, w, "node-y", permissions("node-y"), time.Time{})), control.StateConsumerMissing, "node-y"},
		"another CA":             {untrusting(), control.StateUntrusted, "CA file"},
		"clock years ahead":      {w.transportAt(3*365*24*time.Hour, host, creds(own, time.Time{})), control.StateCertificateExpired, "set the host's clock"},
		"clock years behind":     {w.transportAt(-56*365*24*time.Hour, host, creds(own, time.Time{})), control.StateCertificateExpired, "by the agent's time it is 19"},
		"identity ended by then": {expired, control.StateAuthExpired, "enrol"},
		"credentials readable":   {readable(), control.StateCredentials, "chmod 0600"},
		"nobody listens":         {unreachable(t, w), control.StateUnreachable, "refused"},
		"server without TLS":     {plain(t, w), control.StateUnreachable, ""},
		"server that is silent":  {silent(t, w), control.StateUnreachable, ""},
		"captive portal":         {portal(t, w), control.StateUnreachable, "does not look like a TLS handshake"},
		"intercepting proxy":     {interceptor(t, w, stranger), control.StateUntrusted, "somebody may be in between"},
		"server of old TLS":      {outdated(t, w), control.StateUnreachable, "protocol version not supported"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := controltest.StartNode(t, tc.transport, func(d *control.Deps) {
				d.HostID = hostOf(name)
				d.Interval = 200 * time.Millisecond
			})
			controltest.Eventually(t, string(tc.state), func() bool { return n.Status().State == tc.state })
			if st := n.Status(); !strings.Contains(st.LastError, tc.text) || strings.Contains(st.LastError, "SU") && strings.Contains(st.LastError, "BEGIN") {
				t.Errorf("status %+v, want %q in its error", st, tc.text)
			}
		})
	}
}

// hostOf is the host a row of the table above runs as.
func hostOf(row string) string {
	switch row {
	case "another host's":
		return "node-x"
	case "not enrolled":
		return "node-y"
	}
	return host
}

// mustCreds makes an identity without a queue; a zero time is no end.
func mustCreds(t *testing.T, w *world, hostID string, may jwt.Permissions, expires time.Time) []byte {
	t.Helper()
	creds, err := w.Server.id.credentials(hostID, may, expires, jwt.ConnectionTypeStandard)
	if err != nil {
		t.Fatal(err)
	}
	return creds
}

// at returns a transport to a listener that serve handles.
func at(t *testing.T, w *world, creds []byte, serve func(net.Conn)) control.Transport {
	t.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if serve == nil {
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
	} else {
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				serve(c)
			}
		}()
		t.Cleanup(func() {
			if err := ln.Close(); err != nil {
				t.Error(err)
			}
			<-done
		})
	}
	tr, err := control.NewNATS(control.NATSConfig{
		Servers: []string{"tls://" + ln.Addr().String()}, CAFile: w.ca, CredsFile: w.file(api.NewID(), creds), HostID: host,
	})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func unreachable(t *testing.T, w *world) control.Transport {
	t.Helper()
	return at(t, w, mustCreds(t, w, host, permissions(host), time.Time{}), nil)
}

// plain answers in the clear, as a server without TLS first does.
func plain(t *testing.T, w *world) control.Transport {
	t.Helper()
	return at(t, w, mustCreds(t, w, host, permissions(host), time.Time{}), func(c net.Conn) {
		_, _ = c.Write([]byte("INFO {\"server_id\":\"x\",\"version\":\"2.10.0\",\"max_payload\":1048576}\r\n"))
		_ = c.Close()
	})
}

// silent closes without a word.
func silent(t *testing.T, w *world) control.Transport {
	t.Helper()
	return at(t, w, mustCreds(t, w, host, permissions(host), time.Time{}), func(c net.Conn) { _ = c.Close() })
}

// portal answers whatever comes by sending the client to its own page.
func portal(t *testing.T, w *world) control.Transport {
	t.Helper()
	return at(t, w, mustCreds(t, w, host, permissions(host), time.Time{}), func(c net.Conn) {
		_, _ = c.Read(make([]byte, 1024))
		_, _ = c.Write([]byte("HTTP/1.1 302 Found\r\nLocation: http://portal.example/login\r\nContent-Length: 0\r\n\r\n"))
		_ = c.Close()
	})
}

// interceptor ends TLS with a certificate of its own for the server's name.
func interceptor(t *testing.T, w, stranger *world) control.Transport {
	t.Helper()
	options, err := serverOptions(t.TempDir(), w.cfg.ListenNATS, stranger.Server.cfg.Cert)
	if err != nil {
		t.Fatal(err)
	}
	return at(t, w, mustCreds(t, w, host, permissions(host), time.Time{}), func(c net.Conn) {
		_ = tls.Server(c, options.TLSConfig).HandshakeContext(t.Context())
		_ = c.Close()
	})
}

// outdated has the right certificate, but speaks TLS 1.2 at most.
func outdated(t *testing.T, w *world) control.Transport {
	t.Helper()
	options, err := serverOptions(t.TempDir(), w.cfg.ListenNATS, w.Server.cfg.Cert)
	if err != nil {
		t.Fatal(err)
	}
	options.TLSConfig.MinVersion, options.TLSConfig.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 //nolint:gosec // that it is refused is the test
	return at(t, w, mustCreds(t, w, host, permissions(host), time.Time{}), func(c net.Conn) {
		_ = tls.Server(c, options.TLSConfig).HandshakeContext(t.Context())
		_ = c.Close()
	})
}
