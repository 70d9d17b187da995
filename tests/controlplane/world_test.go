package controlplane

import (
	"context"
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

const host = controltest.Host

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a control plane that can be stopped and started again.
type world struct {
	t      *testing.T
	dir    string
	cfg    Config
	Server *Server
	Client *client.Client
	ca     string // file
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	w.cfg = Config{
		Dir: filepath.Join(w.dir, "plane"), ListenNATS: "127.0.0.1:0", ListenHTTP: "127.0.0.1:0",
		BeginRetry: 200 * time.Millisecond, Logger: hclog.NewNullLogger(),
	}
	w.start()
	t.Cleanup(w.stop)
	// The next start must be found where the first was.
	w.cfg.ListenNATS = strings.TrimPrefix(w.Server.NATSURL(), "tls://")
	w.cfg.ListenHTTP = strings.TrimPrefix(w.Server.URL(), "https://")
	w.ca = w.file("ca.pem", w.Server.CAPEM())
	return w
}

func (w *world) start() {
	w.t.Helper()
	var err error
	if w.Server, err = Start(w.t.Context(), w.cfg); err != nil {
		w.t.Fatal(err)
	}
	if w.Client, err = client.New(w.Server.URL(), w.Server.CAPEM(), w.Server.Token()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) stop() {
	if w.Server == nil {
		return
	}
	w.Client.Close()
	w.Server.Close()
	w.Server = nil
}

// file writes a private file and returns its path.
func (w *world) file(name string, data []byte) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// enrol returns the transport of a newly enrolled host.
func (w *world) enrol(hostID string) control.Transport {
	w.t.Helper()
	creds, _, _, err := w.Server.EnrolHost(w.t.Context(), hostID)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.transport(hostID, creds)
}

func (w *world) transport(hostID string, creds []byte) control.Transport {
	w.t.Helper()
	return w.transportAt(0, hostID, creds)
}

// transportAt is an agent's whose time is off from the host's clock.
func (w *world) transportAt(off time.Duration, hostID string, creds []byte) control.Transport {
	w.t.Helper()
	transport, err := control.NewNATS(control.NATSConfig{
		Servers: []string{"tls://" + strings.TrimPrefix(w.Server.NATSURL(), "tls://")},
		CAFile:  w.ca, CredsFile: w.file(hostID+"-"+api.NewID()+".creds", creds), HostID: hostID,
		Clock: func() time.Time { return time.Now().Add(off) },
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return transport
}

// node is link, inbox and store of one host, with an executor that plays the
// rest of the agent.
type node struct {
	t         *testing.T
	hostID    string
	path      string
	transport control.Transport
	issuer    ed25519.PublicKey
	store     *store.Store
	link      *control.Link
	cancel    context.CancelFunc
	done      chan error

	mu       sync.Mutex
	executed []*api.Command
	execute  func(cmd *api.Command) ([]*api.Event, error)
	audit    *audit.Log // in heartbeats, unless nil
}

func (w *world) node(hostID string) *node {
	w.t.Helper()
	n := &node{
		t: w.t, hostID: hostID, path: filepath.Join(w.t.TempDir(), "store"), transport: w.enrol(hostID), issuer: w.Server.IssuerKey(),
	}
	n.start()
	w.t.Cleanup(n.stop)
	return n
}

func (n *node) start() {
	n.t.Helper()
	var err error
	if n.store, err = store.Open(n.path, time.Now, hclog.NewNullLogger()); err != nil {
		n.t.Fatal(err)
	}
	in, err := inbox.New(inbox.Deps{
		Journal: n.store, Executor: n, Keys: []ed25519.PublicKey{n.issuer}, HostID: n.hostID,
		Features: api.Features(), Logger: hclog.NewNullLogger(), Clock: clocktest.Wall,
	})
	if err != nil {
		n.t.Fatal(err)
	}
	epoch := func() (uint64, []byte) {
		e, err := n.store.Epoch()
		if err != nil {
			n.t.Error(err)
		}
		return e.Number, e.StoreID[:]
	}
	n.link, err = control.New(control.Deps{
		Transport: n.transport, Inbox: in, Outbox: n.store, HostID: n.hostID, Interval: 100 * time.Millisecond, DeadMan: 10 * time.Second,
		Heartbeat: func() *api.Heartbeat {
			number, id := epoch()
			h := &api.Heartbeat{IssuerEpoch: number, StoreId: id, BootId: "boot of " + n.path, Audit: n.offer()}
			if h.GetAudit() != nil {
				h.Warnings = []*api.Refusal{api.RefusalToWire(contract.Refuse("outbox.nearly-full", "look", "80 percent"))}
			}
			return h
		},
		Confirmed: n.confirm,
		Capability: func() *api.Capability {
			number, id := epoch()
			return &api.Capability{
				Protocol: api.CapabilityVersion, Features: api.Features(), IssuerEpoch: number, StoreId: id,
				Images: []*api.BootImage{bootImage()},
			}
		},
		Logger: hclog.NewNullLogger(),
	})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(n.t.Context()))
	n.cancel, n.done = cancel, make(chan error, 2)
	go func() { n.done <- in.Run(ctx) }()
	go func() { n.done <- n.link.Run(ctx) }()
}

// offer is what a heartbeat says of the audit log.
func (n *node) offer() *api.AuditCheckpoint {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.audit == nil {
		return nil
	}
	o, err := n.audit.Offer()
	if err != nil {
		n.t.Error(err)
	}
	out := &api.AuditCheckpoint{Key: o.Key, Checkpoint: o.Checkpoint, From: uint64(o.From)}
	for _, h := range o.Proof {
		out.Proof = append(out.Proof, h[:])
	}
	return out
}

func (n *node) confirm(h *api.Heartbeat) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.audit == nil {
		return
	}
	if err := n.audit.Confirmed(h.GetAudit().GetCheckpoint()); err != nil {
		n.t.Error(err)
	}
}

func (n *node) stop() {
	if n.cancel == nil {
		return
	}
	n.cancel()
	if err := errors.Join(<-n.done, <-n.done, n.store.Close()); err != nil {
		n.t.Error(err)
	}
	n.cancel = nil
}

// Execute implements inbox.Executor.
func (n *node) Execute(_ context.Context, cmd *api.Command) ([]*api.Event, error) {
	n.mu.Lock()
	n.executed = append(n.executed, cmd)
	f := n.execute
	n.mu.Unlock()
	if f == nil {
		return nil, nil
	}
	return f(cmd)
}

func (n *node) ids() (out []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.executed {
		out = append(out, c.GetCommandId())
	}
	return out
}

// ready waits until the node is in the control plane's epoch.
func (w *world) ready(hostID string) {
	w.t.Helper()
	controltest.Eventually(w.t, "epoch of "+hostID, func() bool {
		nodes, err := w.Client.Nodes(w.t.Context())
		if err != nil {
			w.t.Fatal(err)
		}
		return slices.ContainsFunc(nodes, func(n client.Node) bool { return n.ID == hostID && n.Epoch > 0 && n.NodeEpoch == n.Epoch })
	})
}

// events are all events so far, without heartbeats.
func (w *world) events() []*api.Event {
	w.t.Helper()
	var out []*api.Event
	for since := uint64(0); ; {
		page, err := w.Client.Events(w.t.Context(), since, 500, true)
		if err != nil {
			w.t.Fatal(err)
		}
		if len(page) == 0 {
			return out
		}
		for _, e := range page {
			event, err := e.Decode()
			if err != nil {
				w.t.Fatal(err)
			}
			since = e.Seq
			out = append(out, event)
		}
	}
}

// refusals waits for n refusals and returns their codes, sorted.
func (w *world) refusals(n int) []string {
	w.t.Helper()
	var codes []string
	controltest.Eventually(w.t, "refusals", func() bool {
		codes = nil
		for _, e := range w.events() {
			if r := e.GetCommandRefused(); r != nil {
				codes = append(codes, r.GetRefusal().GetCode())
			}
		}
		return len(codes) >= n
	})
	slices.Sort(codes)
	return codes
}

func bootImage() *api.BootImage {
	return &api.BootImage{FirmwareSha256: fill(1), KernelSha256: fill(2), InitrdSha256: fill(3), Cmdline: "quiet"}
}

func fill(b byte) []byte { return slices.Repeat([]byte{b}, 32) }

func launch() *api.LaunchGuest {
	return &api.LaunchGuest{
		Manifest: []byte("{}"), LaunchDigest: slices.Repeat([]byte{9}, 48), Image: bootImage(),
		Machine: &api.Machine{Vcpus: 1, MemoryMib: 512, CpuModel: "EPYC-v4", GuestFeatures: 1, Policy: 0x30000},
	}
}

func code(err error) string {
	if r, ok := errors.AsType[*contract.Refusal](err); ok {
		return r.Code
	}
	if err != nil {
		return "untyped: " + err.Error()
	}
	return ""
}
