package link_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/tests/controlplane"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
)

const (
	host = controltest.Host
	// name of the server, at here or there (TEST-NET-3), behind the router.
	name        = "plane.example"
	here, there = "203.0.113.1", "203.0.113.2"
	port        = "4222"
)

func TestMain(m *testing.M) {
	if rig.Capable() {
		rig.Enter()
	}
	os.Exit(m.Run())
}

// world is a control plane behind a router, and a node in front of it. The
// server itself is in this process; what crosses the router is the node's TCP
// connection to a forwarder in the server's namespace.
type world struct {
	t              *testing.T
	server         *controlplane.Server
	client         *client.Client
	router, beyond *rig.Host
	forwarder      net.Listener
	pipes          sync.WaitGroup
	delay          time.Duration // of everything, in both directions

	node  *control.Link
	store *store.Store

	mu       sync.Mutex // guards below
	conns    []net.Conn
	sources  []string // of connections, as the server sees them
	executed []string
	sent     []string
}

func newWorld(t *testing.T, delay time.Duration) *world {
	t.Helper()
	if !rig.Capable() {
		skip.Missing(t, "root")
	}
	w := &world{t: t, delay: delay}
	dir := t.TempDir()
	var err error
	w.server, err = controlplane.Start(t.Context(), controlplane.Config{
		Dir: filepath.Join(dir, "plane"), ListenNATS: "127.0.0.1:0", ListenHTTP: "127.0.0.1:0", Names: []string{name}, Logger: hclog.NewNullLogger(),
	})
	w.must(err)
	t.Cleanup(w.server.Close)
	w.client, err = client.New(w.server.URL(), w.server.CAPEM(), w.server.Token())
	w.must(err)
	t.Cleanup(w.client.Close)
	w.topology()
	w.listen(here)
	w.resolve(here)
	creds, issuer, ca, err := w.server.EnrolHost(t.Context(), host)
	w.must(err)
	for file, data := range map[string][]byte{"ca.pem": ca, "creds": creds} {
		w.must(os.WriteFile(filepath.Join(dir, file), data, 0o600))
	}
	transport, err := control.NewNATS(control.NATSConfig{
		Servers: []string{"tls://" + name + ":" + port}, CAFile: filepath.Join(dir, "ca.pem"), CredsFile: filepath.Join(dir, "creds"), HostID: host,
	})
	w.must(err)
	w.run(filepath.Join(dir, "store"), transport, issuer)
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// topology puts the server's addresses behind the router, which translates
// the node's address to its own.
func (w *world) topology() {
	w.t.Helper()
	for i, h := range []**rig.Host{&w.router, &w.beyond} {
		made, err := rig.NewHost(w.t.Context(), i, io.Discard)
		w.must(err)
		w.t.Cleanup(func() { w.must(made.Close()) })
		*h = made
	}
	const routerAddr, beyondAddr = "198.51.100.2", "198.51.100.3"
	for _, addr := range []string{here, there} {
		w.in(w.beyond, "ip", "addr", "add", addr+"/32", "dev", "lo")
		w.in(w.router, "ip", "route", "add", addr+"/32", "via", beyondAddr)
		w.must(netlink.RouteAdd(&netlink.Route{Dst: prefix(addr), Gw: net.ParseIP(routerAddr)}))
		w.t.Cleanup(func() { _ = netlink.RouteDel(&netlink.Route{Dst: prefix(addr)}) })
	}
	w.in(w.router, "ip", "addr", "add", "198.51.100.200/24", "dev", rig.Uplink)
	w.in(w.router, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward; for f in all "+rig.Uplink+"; do echo 0 >/proc/sys/net/ipv4/conf/$f/send_redirects; done")
	w.rules("198.51.100.2")
}

func prefix(addr string) *net.IPNet {
	return &net.IPNet{IP: net.ParseIP(addr).To4(), Mask: net.CIDRMask(32, 32)}
}

func (w *world) in(h *rig.Host, command string, args ...string) {
	w.t.Helper()
	if out, err := h.Output(w.t.Context(), command, args...); err != nil {
		w.t.Fatalf("%s %v: %v %s", command, args, err, out)
	}
}

// rules make the router send as source, and treat what it forwards by rules of
// nft.
func (w *world) rules(source string, forward ...string) {
	w.t.Helper()
	w.in(w.router, "nft", "flush ruleset\ntable ip router {\nchain leaving {\ntype nat hook postrouting priority 100\nip protocol tcp snat to "+source+"\n}\n"+
		"chain passing {\ntype filter hook forward priority 0\n"+strings.Join(forward, "\n")+"\n}\n}")
}

// forget makes the router lose every translation, as one that restarts does.
func (w *world) forget() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	defer cancel()
	inside := w.router.Command(ctx, "sleep", "infinity")
	w.must(inside.Start())
	defer func() { cancel(); _ = inside.Wait() }()
	home, err := os.Readlink("/proc/self/ns/net")
	w.must(err)
	path := fmt.Sprintf("/proc/%d/ns/net", inside.Process.Pid)
	controltest.Eventually(w.t, "a process there", func() bool { at, err := os.Readlink(path); return err == nil && at != home })
	ns, err := netns.GetFromPath(path)
	w.must(err)
	defer ns.Close() //nolint:errcheck // read only
	handle, err := netlink.NewHandleAt(ns)
	w.must(err)
	defer handle.Close()
	w.must(handle.ConntrackTableFlush(netlink.ConntrackTable))
}

// resolve changes the server's address, in the file that /etc/hosts is; none
// makes the name fail.
func (w *world) resolve(addr string) {
	w.t.Helper()
	path := filepath.Join(rig.ScratchDir, "hosts")
	text, err := os.ReadFile(path)
	w.must(err)
	lines := slices.DeleteFunc(strings.SplitAfter(string(text), "\n"), func(l string) bool { return strings.Contains(l, name) })
	if addr != "" {
		lines = append(lines, addr+" "+name+"\n")
	}
	w.must(os.WriteFile(path, []byte(strings.Join(lines, "")), 0o644)) //nolint:gosec // a hosts file is public
}

// listen lets the server be reached at an address beyond the router.
func (w *world) listen(addr string) {
	w.t.Helper()
	ln, err := w.beyond.Listen(w.t.Context(), addr+":"+port)
	w.must(err)
	w.forwarder = ln
	w.pipes.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", strings.TrimPrefix(w.server.NATSURL(), "tls://")) //nolint:noctx // a local server
			if err != nil {
				_ = c.Close()
				continue
			}
			w.mu.Lock()
			w.conns = append(w.conns, c, up)
			w.sources = append(w.sources, c.RemoteAddr().String())
			w.mu.Unlock()
			w.pipes.Go(func() { w.pipe(up, c) })
			w.pipes.Go(func() { w.pipe(c, up) })
		}
	})
	w.t.Cleanup(w.unlisten)
}

// unlisten takes the server away from its address, with all its connections.
func (w *world) unlisten() {
	_ = w.forwarder.Close()
	w.mu.Lock()
	for _, c := range w.conns {
		_ = c.Close()
	}
	w.conns = nil
	w.mu.Unlock()
	w.pipes.Wait()
}

// pipe forwards what comes, each piece after the delay.
func (w *world) pipe(to, from net.Conn) {
	defer to.Close()   //nolint:errcheck // both ends go
	defer from.Close() //nolint:errcheck // both ends go
	if w.delay == 0 {
		_, _ = io.Copy(to, from)
		return
	}
	type piece struct {
		data []byte
		due  time.Time
	}
	pieces := make(chan piece, 1024)
	go func() {
		defer close(pieces)
		for {
			data := make([]byte, 32<<10)
			n, err := from.Read(data)
			if n > 0 {
				pieces <- piece{data[:n], time.Now().Add(w.delay)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		<-time.After(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			_ = from.Close()
			for range pieces {
			}
			return
		}
	}
}

// run is the node: link, inbox and store, with an executor that counts.
func (w *world) run(path string, transport control.Transport, issuer ed25519.PublicKey) {
	w.t.Helper()
	var err error
	w.store, err = store.Open(path, time.Now, hclog.NewNullLogger())
	w.must(err)
	in, err := inbox.New(inbox.Deps{
		Journal: w.store, Executor: w, Keys: []ed25519.PublicKey{issuer}, HostID: host, Features: api.Features(), Logger: hclog.NewNullLogger(),
		Clock: clocktest.Wall,
	})
	w.must(err)
	heartbeat := func() *api.Heartbeat {
		e, err := w.store.Epoch()
		if err != nil {
			w.t.Error(err)
		}
		return &api.Heartbeat{IssuerEpoch: e.Number, StoreId: e.StoreID[:]}
	}
	w.node, err = control.New(control.Deps{
		Transport: transport, Inbox: in, Outbox: w.store, HostID: host, Interval: 300 * time.Millisecond, DeadMan: 4 * time.Second,
		Heartbeat: heartbeat, Capability: func() *api.Capability { return &api.Capability{Protocol: api.CapabilityVersion} }, Logger: hclog.NewNullLogger(),
	})
	w.must(err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(w.t.Context()))
	done := make(chan error, 2)
	go func() { done <- in.Run(ctx) }()
	go func() { done <- w.node.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		w.must(errors.Join(<-done, <-done, w.store.Close()))
	})
	controltest.Eventually(w.t, "the node's epoch", func() bool { e, err := w.store.Epoch(); return err == nil && e.Number > 0 })
}

// Execute implements inbox.Executor.
func (w *world) Execute(_ context.Context, cmd *api.Command) ([]*api.Event, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.executed = append(w.executed, cmd.GetCommandId())
	return nil, nil
}

// traffic sends commands to the node and has it tell something, of a size.
func (w *world) traffic(n, size int) {
	w.t.Helper()
	for range n {
		cmd, err := w.server.NewCommand(host, &api.Command_Cordon{Cordon: &api.Cordon{}})
		w.must(err)
		raw, err := w.server.Sign(cmd)
		w.must(err)
		w.must(w.server.Publish(w.t.Context(), host, raw))
		w.mu.Lock()
		w.sent = append(w.sent, cmd.GetCommandId())
		w.mu.Unlock()
		w.must(w.store.AppendEvents(api.NewEvidence(host, "", time.Now(), "g", make([]byte, size))))
	}
}

func (w *world) connected() bool { return w.node.Status().State == control.StateConnected }

// settled waits until everything arrived, and looks whether each command took
// effect once and has one outcome, and each event was stored once, in order.
// Commands may overtake each other: one whose acknowledgement was lost comes
// again, later.
func (w *world) settled() {
	w.t.Helper()
	controltest.Eventually(w.t, "everything through", func() bool {
		left, err := w.store.OutboxLen()
		unsettled, errServer := w.server.Unsettled(w.t.Context(), host)
		w.must(errors.Join(err, errServer))
		w.mu.Lock()
		defer w.mu.Unlock()
		return left == 0 && unsettled == 0 && len(w.executed) >= len(w.sent)
	})
	w.mu.Lock()
	if got := slices.Sorted(slices.Values(w.executed)); !slices.Equal(got, slices.Sorted(slices.Values(w.sent))) {
		w.t.Errorf("executed %d commands of %d: %v", len(got), len(w.sent), got)
	}
	w.mu.Unlock()
	outcomes, last := map[string]int{}, uint64(0)
	for since := uint64(0); ; {
		page, err := w.client.Events(w.t.Context(), since, 25, false)
		w.must(err)
		if len(page) == 0 {
			break
		}
		for _, e := range page {
			event, err := e.Decode()
			w.must(err)
			since = e.Seq
			if event.GetCommandDone() != nil {
				outcomes[event.GetCommandId()]++
			}
			if event.GetSequence() > 0 && event.GetSequence() != last+1 {
				w.t.Errorf("event %d after %d", event.GetSequence(), last)
			}
			last = max(last, event.GetSequence())
		}
	}
	for _, id := range w.sent {
		if outcomes[id] != 1 {
			w.t.Errorf("command %s has %d outcomes", id, outcomes[id])
		}
	}
}
