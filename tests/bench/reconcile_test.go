package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/lifecycle/lifecycletest"
	"github.com/confidential-node/agent/nodeagent/metadata"
	"github.com/confidential-node/agent/nodeagent/platform"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/domain"
	"github.com/confidential-node/agent/vm/libvirt"
)

// reconcileLimit is for 500 domains, promised for any host.
const reconcileLimit = 5 * time.Second

// BenchmarkReconcile starts an agent's life cycle over a store with N guests
// that libvirt's own test driver runs, until each is adopted and served. Taps
// and the metadata service are only counted: their price is the kernel's.
func BenchmarkReconcile(b *testing.B) {
	var took []time.Duration
	sizes := []int{125, 250, 500}
	for _, n := range sizes {
		b.Run(fmt.Sprintf("domains=%d", n), func(b *testing.B) {
			h := newCrowd(b, n)
			var rounds, work []time.Duration
			for b.Loop() {
				wall, cpu := h.reconcile(b)
				rounds, work = append(rounds, wall), append(work, cpu)
			}
			if most := slices.Max(rounds); most > reconcileLimit {
				b.Errorf("%d domains took %v", n, most)
			}
			// What else runs on the machine adds to the time, and less to this.
			least := slices.Min(work)
			b.ReportMetric(milliseconds(slices.Min(rounds)), "least-ms")
			b.ReportMetric(float64(least.Microseconds())/float64(n), "cpu-µs/domain")
			took = append(took, least)
		})
	}
	if len(took) != len(sizes) {
		return // some were left out
	}
	// Twice the price per domain would be between linear and quadratic.
	if least, most := took[0]/125, took[2]/500; most > 2*least {
		b.Errorf("a domain costs %v of a processor of 125 and %v of 500: not linear", least, most)
	}
}

// crowd is a host with many guests.
type crowd struct {
	n     int
	uri   string
	store *store.Store
	world *lifecycletest.World
	image admit.Image
	cfg   lifecycle.Config
}

func newCrowd(b *testing.B, n int) *crowd {
	b.Helper()
	dir := b.TempDir()
	net := network.Config{GuestCIDR: netip.MustParsePrefix("10.213.0.0/16"), PublishedPorts: network.Range{First: 20000, Last: 20010}}
	c := &crowd{n: n, world: lifecycletest.New(dir, net), uri: "test://" + filepath.Join(dir, "node.xml")}
	var err error
	if c.store, err = store.Open(filepath.Join(dir, "state", "state.db"), time.Now, hclog.NewNullLogger()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.store.Close() })
	if c.image, err = c.world.Image(); err != nil {
		b.Fatal(err)
	}
	policy := config.Default().Policy
	c.cfg = lifecycle.Config{HostID: "host-1", BootID: "boot", GuestsDir: c.world.GuestsDir(), Policy: policy, Network: net, Poll: time.Hour}
	manifest, err := (&contract.Manifest{
		Version: contract.ManifestVersion, LaunchID: strings.Repeat("0a", 16), Image: "registry.example/app@sha256:" + strings.Repeat("b", 64),
		Broker: contract.Endpoint{URL: "https://broker.example", CAPEM: "pem"}, Registry: contract.Endpoint{URL: "https://registry.example", CAPEM: "pem"},
	}).Encode()
	if err != nil {
		b.Fatal(err)
	}
	var xml strings.Builder
	xml.WriteString("<node>")
	for slot := range n {
		id := uuid.NewString()
		copies := filepath.Join(c.cfg.GuestsDir, id)
		if err := errors.Join(os.MkdirAll(copies, 0o700), os.WriteFile(filepath.Join(copies, contract.ImageDescriptionName), []byte("{}"), 0o600)); err != nil {
			b.Fatal(err)
		}
		fmt.Fprintf(&xml, `<domain type='test'><name>%s%s</name><uuid>%s</uuid><metadata><guest xmlns='%s' id='%s' generation='1'/></metadata><memory>1024</memory><os><type>hvm</type></os></domain>`,
			vm.NamePrefix, id, id, domain.MetadataNamespace, id)
		if err := c.store.PutGuest(c.guest(b, id, uint32(slot), manifest)); err != nil {
			b.Fatal(err)
		}
	}
	xml.WriteString("</node>")
	if err := os.WriteFile(filepath.Join(dir, "node.xml"), []byte(xml.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	return c
}

// guest is the record of one that was started before the agent ended.
func (c *crowd) guest(b *testing.B, id string, slot uint32, manifest []byte) store.Guest {
	b.Helper()
	launch, err := proto.Marshal(&api.LaunchGuest{
		GuestId: id, Generation: 1, Manifest: manifest, Machine: &api.Machine{Vcpus: 1, MemoryMib: 1024, CpuModel: "EPYC-v4", GuestFeatures: 1},
	})
	if err != nil {
		b.Fatal(err)
	}
	g := store.Guest{
		ID: id, Generation: 1, CommandID: api.NewID(), Launch: launch, BootID: "boot", Slot: slot, VCPUs: 1, MemoryMiB: 1024,
		Limits: store.Limits{Start: time.Hour, Run: time.Hour, ResultBytes: 1 << 20}, Status: api.GuestStatus_GUEST_STATUS_STARTED, AcceptedAt: clocktest.Wall(),
	}
	for _, name := range []string{"spool", "blobs", "boot-copies", "measure", "tap", "metadata", "domain"} {
		g.Steps = append(g.Steps, store.Step{Name: name, BegunAt: time.Now(), DoneAt: time.Now()})
	}
	return g
}

// reconcile runs an agent until the last guest is served, and says how long
// that took, and how much of a processor. The test driver reads its domains
// when it is connected to, which is none of the agent's work.
func (c *crowd) reconcile(b *testing.B) (wall, cpu time.Duration) {
	b.Helper()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	tee, err := platform.Select(config.Default())
	if err != nil {
		b.Fatal(err)
	}
	driver := libvirt.New(c.uri, hclog.NewNullLogger())
	served := &counted{left: c.n, all: make(chan struct{})}
	m, err := lifecycle.New(lifecycle.Deps{
		Records: c.store, Hypervisor: driver, Network: taps{}, Relay: lifecycletest.Relay{World: c.world}, Metadata: served, Blobs: lifecycletest.Cache{World: c.world}, Spools: lifecycletest.Store{World: c.world},
		Images: func() ([]admit.Image, error) { return []admit.Image{c.image}, nil }, Measure: lifecycletest.Measure, TEE: tee,
		Headroom: func(context.Context) headroom.Left { return headroom.Left{} },
		GPURule:  func(string, int) *contract.Refusal { return nil }, Endorsements: func() contract.Endorsements { return contract.Endorsements{} },
		Logger: hclog.NewNullLogger(), Clock: clocktest.Wall,
	}, c.cfg)
	if err != nil {
		b.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() { ended <- driver.Run(ctx) }()
	if err := driver.WaitConnected(ctx); err != nil {
		skip.Missing(b, "libvirt's client library")
	}
	begun := time.Now()
	before, cpuErr := cpuTime(os.Getpid())
	go func() { ended <- m.Run(ctx) }()
	select {
	case <-served.all:
	case <-time.After(time.Minute):
		b.Fatal("not every guest was adopted within a minute")
	}
	wall = time.Since(begun)
	cpu, err = cpuTime(os.Getpid())
	cancel()
	for range 2 {
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			b.Fatal(err)
		}
	}
	if err := errors.Join(cpuErr, err); err != nil {
		b.Fatal(err)
	}
	return wall, cpu - before
}

// counted is a metadata service that knows when all guests are served.
type counted struct {
	mu   sync.Mutex
	left int
	all  chan struct{}
}

func (c *counted) Open(context.Context, metadata.Session) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left--; c.left == 0 {
		close(c.all)
	}
	return nil
}

func (*counted) Close(string) error { return nil }

func (*counted) Challenge(context.Context, string, []byte) ([]byte, error) {
	return nil, errors.New("nobody asks")
}

// taps are there already.
type taps struct{}

func (taps) Adopt(context.Context, []network.Guest) error   { return nil }
func (taps) Remove(context.Context, string) error           { return nil }
func (taps) Observe(context.Context) ([]network.Tap, error) { return nil, nil }
func (taps) Sweep(context.Context, map[string]bool) error   { return nil }
func (taps) HoldForwarding() error                          { return nil }
func (taps) ReturnForwarding() error                        { return nil }
func (taps) Listening() (map[uint16]bool, error)            { return map[uint16]bool{}, nil }
