package controlplane

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
)

func cordonVerb() api.CommandVerb { return &api.Command_Cordon{Cordon: &api.Cordon{}} }

// send issues a command as edited and returns it with its envelope.
func (w *world) send(hostID string, edit func(*api.Command)) (*api.Command, []byte) {
	w.t.Helper()
	cmd, err := w.Server.NewCommand(hostID, cordonVerb())
	if err != nil {
		w.t.Fatal(err)
	}
	if edit != nil {
		edit(cmd)
	}
	raw, err := w.Server.Sign(cmd)
	if err != nil {
		w.t.Fatal(err)
	}
	w.publish(hostID, raw)
	return cmd, raw
}

func (w *world) publish(hostID string, raw []byte) {
	w.t.Helper()
	if err := w.Server.Publish(w.t.Context(), hostID, raw); err != nil {
		w.t.Fatal(err)
	}
}

func TestHostileCommandsAreRefusedTypedAndStartNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n, other := w.node(host), w.node("node-b")
	w.ready(host)
	w.ready("node-b")
	now := time.Now()
	w.send(host, func(c *api.Command) {
		c.NotBefore, c.ExpiresAt = timestamppb.New(now.Add(-2*time.Hour)), timestamppb.New(now.Add(-time.Hour))
	})
	w.send(host, func(c *api.Command) {
		c.NotBefore, c.ExpiresAt = timestamppb.New(now.Add(time.Hour)), timestamppb.New(now.Add(2*time.Hour))
	})
	w.send(host, func(c *api.Command) { c.ExpiresAt = timestamppb.New(now.Add(48 * time.Hour)) })
	w.send(host, func(c *api.Command) { c.RequiredFeatures = []string{"compliance.hipaa"} })
	w.send(host, func(c *api.Command) { c.IssuerEpoch += 5 })
	w.send(host, func(c *api.Command) { c.MinCapability = 99 })
	w.send(host, func(c *api.Command) { c.Verb = nil })
	w.publish(host, make([]byte, api.MaxCommandBytes+1))
	w.publish(host, []byte("hello"))
	_, attacker, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := w.Server.NewCommand(host, cordonVerb())
	if err != nil {
		t.Fatal(err)
	}
	forged, err := api.SealCommand(cmd, attacker)
	if err != nil {
		t.Fatal(err)
	}
	w.publish(host, forged)
	foreign, raw := w.send("node-b", nil)
	w.publish(host, raw) // somebody who can write to the stream redirects it
	want := []string{
		api.CodeCapabilityTooLow, api.CodeEpochUnknown, api.CodeExpired, api.CodeFeatureUnknown, api.CodeForged, api.CodeMalformed,
		api.CodeMalformed, api.CodeNotYetValid, api.CodeOversize, api.CodeWindowTooLong, api.CodeWrongAudience,
	}
	if got := w.refusals(len(want)); !slices.Equal(got, want) {
		t.Errorf("refusals %v, want %v", got, want)
	}
	if got := n.ids(); len(got) != 0 {
		t.Errorf("executed %v", got)
	}
	controltest.Eventually(t, "the other host's command", func() bool { return slices.Equal(other.ids(), []string{foreign.GetCommandId()}) })
}

func TestARepeatedCommandTakesEffectOnceAcrossRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	w.ready(host)
	cmd, raw := w.send(host, nil)
	controltest.Eventually(t, "executed", func() bool { return len(n.ids()) == 1 })
	w.publish(host, raw)
	n.stop()
	w.publish(host, raw)
	n.start()
	later, _ := w.send(host, nil)
	controltest.Eventually(t, "the later one", func() bool { return slices.Contains(n.ids(), later.GetCommandId()) })
	if got := n.ids(); !slices.Equal(got, []string{cmd.GetCommandId(), later.GetCommandId()}) {
		t.Errorf("executed %v", got)
	}
	// Once the id is forgotten the floor takes over.
	n.stop()
	n.start()
	if _, err := n.store.PruneCommands(time.Now().Add(48 * time.Hour)); err != nil {
		t.Fatal(err)
	}
	w.publish(host, raw)
	if got := w.refusals(1); !slices.Equal(got, []string{api.CodeReplayed}) {
		t.Errorf("refusals %v", got)
	}
}

func TestALostStoreGetsANewEpochAndOldCommandsStayDead(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	w.ready(host)
	_, raw := w.send(host, nil)
	controltest.Eventually(t, "executed", func() bool { return len(n.ids()) == 1 })
	n.stop()
	if err := os.RemoveAll(n.path); err != nil {
		t.Fatal(err)
	}
	n.start()
	controltest.Eventually(t, "the next epoch", func() bool {
		e, err := n.store.Epoch()
		return err == nil && e.Number >= 2 // a slow node is given another while it takes one
	})
	w.ready(host)
	w.publish(host, raw)
	if got := w.refusals(1); !slices.Equal(got, []string{api.CodeEpochStale}) {
		t.Errorf("refusals %v", got)
	}
	fresh, _ := w.send(host, nil)
	controltest.Eventually(t, "commands of the new epoch", func() bool { return slices.Contains(n.ids(), fresh.GetCommandId()) })
}

func TestNothingIsLostWhenTheServerRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	w.ready(host)
	var want []string
	for range 3 {
		cmd, _ := w.send(host, nil)
		want = append(want, cmd.GetCommandId())
		w.stop()
		if err := n.store.AppendEvents(api.NewGuestState(host, "", time.Now(), &api.GuestState{GuestId: "x"})); err != nil {
			t.Fatal(err)
		}
		w.start()
		controltest.Eventually(t, "executed and reported", func() bool {
			left, err := n.store.OutboxLen()
			return err == nil && left == 0 && len(n.ids()) == len(want)
		})
	}
	if got := n.ids(); !slices.Equal(got, want) {
		t.Errorf("executed %v, want %v", got, want)
	}
	done := map[string]int{}
	for _, e := range w.events() {
		if e.GetCommandDone() != nil {
			done[e.GetCommandId()]++
		}
	}
	for _, id := range want {
		if done[id] != 1 {
			t.Errorf("command %s was reported %d times", id, done[id])
		}
	}
}

// rawConn connects as a host does, without the link.
func (w *world) rawConn(creds []byte) (*nats.Conn, <-chan error) {
	w.t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.Server.CAPEM())
	errs := make(chan error, 64)
	nc, err := nats.Connect(w.Server.NATSURL(), nats.Secure(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}),
		nats.TLSHandshakeFirst(), nats.UserCredentialBytes(creds), nats.CustomInboxPrefix("_INBOX."+host), nats.NoReconnect(),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { errs <- err }))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	return nc, errs
}

func TestAHostReachesItsOwnSubjectsAndNoOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	creds, _, _, err := w.Server.EnrolHost(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	w.enrol("node-b")
	nc, errs := w.rawConn(creds)
	denied := func(what string) {
		t.Helper()
		if err := nc.Flush(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case err := <-errs:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s was allowed", what)
		}
	}
	for _, subject := range []string{
		"cmd.node-b", "cmd." + host, "cmd.>", ">", "evt.>", "evt." + host + ".>", "_INBOX.>", "_INBOX.node-b.>", "$JS.>", "$SYS.>",
	} {
		if _, err := nc.SubscribeSync(subject); err != nil {
			t.Fatal(err)
		}
		denied("subscribing to " + subject)
	}
	for _, subject := range []string{
		"evt.node-b.guest-state", "cmd.node-b", "cmd." + host, "_INBOX.node-b.x", "$JS.API.CONSUMER.MSG.NEXT.CMD.node-b",
		"$JS.API.CONSUMER.MSG.NEXT.EVT.x", "$JS.ACK.CMD.node-b.1.1.1.1.0", "$JS.API.CONSUMER.CREATE.CMD", "$JS.API.CONSUMER.INFO.CMD." + host,
		"$JS.API.STREAM.MSG.GET.CMD", "$JS.API.DIRECT.GET.CMD", "$JS.API.STREAM.DELETE.CMD", "$JS.API.STREAM.PURGE.CMD", "$JS.API.STREAM.INFO.EVT",
		"$JS.API.INFO",
	} {
		if err := nc.Publish(subject, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		denied("publishing to " + subject)
	}
	if err := nc.Publish("evt."+host+".guest-state", nil); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-errs:
		t.Errorf("its own events: %v", err)
	default:
	}
}

func TestTheServerSpeaksTLS13BeforeAnythingElse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addr := strings.TrimPrefix(w.Server.NATSURL(), "tls://")
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // a test
	if err := c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error("the server spoke in the clear")
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.Server.CAPEM())
	old := tls.Dialer{Config: &tls.Config{RootCAs: roots, MaxVersion: tls.VersionTLS12}} //nolint:gosec // that it is refused is the test
	if c, err := old.DialContext(t.Context(), "tcp", addr); err == nil {
		_ = c.Close()
		t.Error("TLS 1.2 was accepted")
	}
}

func TestSniffSeesEveryMessage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	canary := []byte("canary-4711")
	seen := make(chan string, 1024)
	stop, err := w.Server.Sniff(func(subject string, _ map[string][]string, data []byte) {
		if bytes.Contains(data, canary) {
			seen <- subject
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	n := w.node(host)
	w.ready(host)
	w.send(host, func(c *api.Command) { c.Verb = &api.Command_Cordon{Cordon: &api.Cordon{Reason: "x"}} })
	w.publish(host, canary)
	if err := n.store.AppendEvents(api.NewGuestState(host, "", time.Now(), &api.GuestState{GuestId: string(canary)})); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"cmd." + host: true, "evt." + host + ".guest-state": true}
	deadline := time.After(time.Minute)
	for len(want) > 0 {
		select {
		case subject := <-seen:
			delete(want, subject)
		case <-deadline:
			t.Fatalf("never seen on %v", want)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestAWipedServerIsFoundAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	w.ready(host)
	before, raw := w.send(host, nil)
	controltest.Eventually(t, "executed", func() bool { return slices.Contains(n.ids(), before.GetCommandId()) })
	w.stop()
	if err := os.RemoveAll(filepath.Join(w.cfg.Dir, "jetstream")); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.ready(host)
	w.publish(host, raw) // whoever restores a backup of the queue sends it again
	cmd, _ := w.send(host, nil)
	controltest.Eventually(t, "executed", func() bool { return slices.Contains(n.ids(), cmd.GetCommandId()) })
	if got := n.ids(); !slices.Equal(got, []string{before.GetCommandId(), cmd.GetCommandId()}) {
		t.Errorf("executed %v", got)
	}
	if n.link.Status().Cloned {
		t.Error("a stream that counts anew was taken for a clone")
	}
	if _, codes := w.look(); len(codes) != 0 {
		t.Errorf("alarms %v", codes)
	}
}

func TestAnIdentityThatEndedIsRenewedFromItsFile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enrol(host)
	creds := func(expires time.Time) []byte {
		t.Helper()
		out, err := w.Server.id.credentials(host, permissions(host), expires, jwt.ConnectionTypeStandard)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	path := w.file("host.creds", creds(time.Now().Add(3*time.Second)))
	transport, err := control.NewNATS(control.NATSConfig{Servers: []string{w.Server.NATSURL()}, CAFile: w.ca, CredsFile: path, HostID: host})
	if err != nil {
		t.Fatal(err)
	}
	n := controltest.StartNode(t, transport, func(d *control.Deps) { d.Interval = 200 * time.Millisecond })
	controltest.Eventually(t, "the end named", func() bool { return n.Status().State == control.StateAuthExpired })
	if err := n.Outbox.AppendEvents(api.NewDone(host, "", time.Now())); err != nil {
		t.Fatal(err)
	}
	w.file("host.creds", creds(time.Time{}))
	controltest.Eventually(t, "connected by the new one", func() bool {
		left, err := n.Outbox.OutboxLen()
		return err == nil && left == 0 && n.Status().State == control.StateConnected
	})
}

// frozen is a TCP proxy that can stop forwarding without closing anything.
type frozen struct {
	mu     sync.Mutex
	thaw   *sync.Cond
	stop   bool
	frozen bool
	dials  int
}

func (f *frozen) set(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = on
	f.thaw.Broadcast()
}

func (f *frozen) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dials
}

// pipe forwards until one side ends.
func (f *frozen) pipe(dst, src net.Conn) {
	defer dst.Close() //nolint:errcheck // both ends go
	defer src.Close() //nolint:errcheck // both ends go
	buffer := make([]byte, 32<<10)
	for {
		n, err := src.Read(buffer)
		f.mu.Lock()
		for f.frozen && !f.stop {
			f.thaw.Wait()
		}
		f.mu.Unlock()
		if err != nil {
			return
		}
		if _, err := dst.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func TestAFrozenConnectionIsReplaced(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	creds, _, _, err := w.Server.EnrolHost(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	f := &frozen{}
	f.thaw = sync.NewCond(&f.mu)
	var pipes sync.WaitGroup
	t.Cleanup(func() {
		f.mu.Lock()
		f.stop = true
		f.thaw.Broadcast()
		f.mu.Unlock()
		pipes.Wait()
	})
	proxy := at(t, w, creds, func(c net.Conn) {
		f.mu.Lock()
		f.dials++
		f.mu.Unlock()
		var d net.Dialer
		up, err := d.DialContext(context.WithoutCancel(t.Context()), "tcp", strings.TrimPrefix(w.Server.NATSURL(), "tls://"))
		if err != nil {
			_ = c.Close()
			return
		}
		pipes.Go(func() { f.pipe(up, c) })
		pipes.Go(func() { f.pipe(c, up) })
	})
	n := controltest.StartNode(t, proxy, func(d *control.Deps) { d.Interval, d.DeadMan = 200*time.Millisecond, 1500*time.Millisecond })
	controltest.Eventually(t, "connected", func() bool { return n.Status().State == control.StateConnected })
	f.set(true)
	controltest.Eventually(t, "dead man", func() bool { return n.Status().State == control.StateSilent })
	f.set(false)
	controltest.Eventually(t, "connected anew", func() bool { return n.Status().State == control.StateConnected })
	if f.count() < 2 {
		t.Errorf("%d connections", f.count())
	}
}
