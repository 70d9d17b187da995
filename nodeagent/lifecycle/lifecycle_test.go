package lifecycle_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/lifecycle/lifecycletest"
	"github.com/confidential-node/agent/nodeagent/platform"
	"github.com/confidential-node/agent/nodeagent/store"
)

const (
	guestID  = "01234567-89ab-cdef-0123-456789abcdef"
	inputURL = "https://store.example/in"
	outURL   = "https://store.example/out"
	listURL  = "https://store.example/list"
)

// sealedBytes begins like an age file; the world does not open it.
func sealedBytes() []byte { return []byte("age-encryption.org/v1\n-> X25519 a\nb\n--- c\nbody") }

// host is one host with its store, over several lives of the agent.
type host struct {
	t     *testing.T
	world *lifecycletest.World
	store *store.Store
	// records is store unless a test stands in between.
	records lifecycle.Records
	// ahead is how far the host's clock runs ahead.
	ahead atomic.Int64
	// clock is that clock unless a test has one of its own; doubt is about it.
	clock   func() clock.Instant
	doubt   func() *contract.Refusal
	turned  func()
	image   admit.Image
	cfg     lifecycle.Config
	measure func(lifecycle.Boot) (lifecycle.Measured, error)
	left    headroom.Left
	// blobs is the world's cache unless a test stands in between.
	blobs lifecycle.Blobs
	// gpus makes the GPUs of one life; nil on a host without.
	gpus func(context.Context) lifecycle.GPUs
}

// patience is for a machine that does much else; only a failure takes it all.
const patience = 3 * time.Minute

func newHost(t *testing.T) *host {
	t.Helper()
	dir := t.TempDir()
	net := network.Config{GuestCIDR: netip.MustParsePrefix("10.213.0.0/16"), PublishedPorts: network.Range{First: 20000, Last: 20010}}
	h := &host{t: t, world: lifecycletest.New(dir, net)}
	var err error
	if h.store, err = store.Open(filepath.Join(dir, "state", "state.db"), time.Now, hclog.NewNullLogger()); err != nil {
		t.Fatal(err)
	}
	h.records, h.measure, h.left = h.store, lifecycletest.Measure, headroom.Left{MemoryMiB: 1 << 20}
	h.clock = func() clock.Instant {
		return clock.Instant{Wall: time.Now().Add(time.Duration(h.ahead.Load()))}
	}
	t.Cleanup(func() { _ = h.store.Close() })
	if h.image, err = h.world.Image(); err != nil {
		t.Fatal(err)
	}
	h.blobs = lifecycletest.Cache{World: h.world}
	h.world.Serve(inputURL, sealedBytes())
	policy := config.Default().Policy
	h.cfg = lifecycle.Config{
		HostID: "host-1", BootID: "boot", GuestsDir: h.world.GuestsDir(), Policy: policy, Capacity: admit.Capacity{VCPUs: 64, MemoryMiB: 1 << 16},
		Network: net, PowerOffGrace: 5 * time.Second, Poll: 5 * time.Millisecond, Retry: time.Millisecond, EvidenceTimeout: 200 * time.Millisecond,
	}
	return h
}

// life starts an agent; hook may be nil.
func (h *host) life(ctx context.Context, hook func(string)) *lifecycle.Manager {
	h.t.Helper()
	m, _ := h.lifeUntil(ctx, hook)
	return m
}

// lifeUntil starts an agent and says when nothing of it goes on any more.
func (h *host) lifeUntil(ctx context.Context, hook func(string)) (_ *lifecycle.Manager, ended <-chan struct{}) {
	h.t.Helper()
	w := h.world
	tee, err := platform.Select(config.Default())
	if err != nil {
		h.t.Fatal(err)
	}
	var gpus lifecycle.GPUs
	if h.gpus != nil {
		gpus = h.gpus(ctx)
	}
	m, err := lifecycle.New(lifecycle.Deps{
		GPUs: gpus, Records: h.records, Hypervisor: lifecycletest.Domains{World: w}, Network: lifecycletest.Net{World: w}, Relay: lifecycletest.Relay{World: w}, Metadata: lifecycletest.Service{World: w},
		Blobs: h.blobs, Spools: lifecycletest.Store{World: w},
		Images: func() ([]admit.Image, error) { return []admit.Image{h.image}, nil }, Measure: h.measure, TEE: tee,
		Headroom:     func(context.Context) headroom.Left { return h.left },
		GPURule:      func(string, int) *contract.Refusal { return nil },
		Endorsements: func() contract.Endorsements { return contract.Endorsements{} }, Logger: hclog.NewNullLogger(),
		Hook: func(point string) error {
			if hook != nil {
				hook(point)
			}
			return nil
		},
		Clock: h.clock, Doubt: h.doubt, Turned: h.turned,
	}, h.cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := m.Run(ctx); err != nil && ctx.Err() == nil {
			h.t.Errorf("manager: %v", err)
		}
	}()
	return m, done
}

// command is a launch that this host can carry out.
func (h *host) command(change func(*api.LaunchGuest)) *api.Command {
	h.t.Helper()
	data := sealedBytes()
	digest := sha256.Sum256(data)
	m := contract.Manifest{
		Version: 1, LaunchID: strings.Repeat("0a", 16), Image: "registry.example/app@sha256:" + strings.Repeat("b", 64),
		Inputs:   []contract.Input{{Name: "in", SHA256: hexOf(digest[:]), Size: int64(len(data)), Format: contract.FormatAge, Key: "kbs:///a/b/c"}},
		Results:  []contract.Result{{Name: "out", Recipients: []string{"age1x"}}},
		Ports:    []int{8000, 8001},
		Broker:   contract.Endpoint{URL: "https://broker.example", CAPEM: "pem"},
		Registry: contract.Endpoint{URL: "https://registry.example", CAPEM: "pem"},
	}
	manifest, err := m.Encode()
	if err != nil {
		h.t.Fatal(err)
	}
	d := h.image.Description
	boot := lifecycle.Boot{Firmware: filepath.Join(h.image.Dir, d.Firmware.File), Cmdline: d.Cmdline, VCPUs: 2, CPUModel: "EPYC-v4", GuestFeatures: 1}
	copy(boot.Kernel[:], bytesOf(d.Kernel.SHA256))
	copy(boot.Initrd[:], bytesOf(d.Initrd.SHA256))
	measured, err := lifecycletest.Measure(boot)
	if err != nil {
		h.t.Fatal(err)
	}
	l := &api.LaunchGuest{
		GuestId: guestID, Generation: 1, Manifest: manifest, LaunchDigest: measured.Digest[:],
		Image:   &api.BootImage{FirmwareSha256: bytesOf(d.Firmware.SHA256), KernelSha256: boot.Kernel[:], InitrdSha256: boot.Initrd[:], Cmdline: d.Cmdline},
		Machine: &api.Machine{Vcpus: 2, MemoryMib: 1024, CpuModel: "EPYC-v4", GuestFeatures: 1, Policy: 0x30000},
		Inputs:  []*api.InputBlob{{Sha256: digest[:], Size: uint64(len(data)), Url: inputURL}},
		Results: &api.ResultTarget{Uploads: []*api.ResultUpload{{Name: "out", PutUrl: outURL}, {Name: contract.ResultsManifestName, PutUrl: listURL}}},
	}
	if change != nil {
		change(l)
	}
	return &api.Command{CommandId: "0190a000-0000-7000-8000-000000000001", Verb: &api.Command_LaunchGuest{LaunchGuest: l}}
}

// guest plays the guest while its domain runs: everything until power-off.
func (h *host) guest(ctx context.Context) {
	say := func(p contract.GuestPhase) bool {
		return h.world.Say(ctx, guestID, contract.GuestStatus{Phase: p}) == nil
	}
	for ctx.Err() == nil {
		if session, ok := h.world.Session(guestID); ok && say(contract.PhaseBooted) && say(contract.PhaseAttested) && say(contract.PhaseRunning) && say(contract.PhaseCollecting) &&
			session.Sink.Result(ctx, "out", bytes.NewReader(sealedBytes())) == nil && session.Sink.ResultManifest(ctx, []byte("signed")) == nil && say(contract.PhaseDone) {
			h.world.PowerOff(guestID)
		}
		pause(ctx)
	}
}

func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Millisecond):
	}
}

// ended waits for the guest's last state.
func (h *host) ended(ctx context.Context) *api.GuestState {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for ctx.Err() == nil {
		events, err := h.store.NextEvents(1000)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, e := range events {
			if s := e.GetGuestState(); s.GetStatus() >= api.GuestStatus_GUEST_STATUS_FINISHED {
				return s
			}
		}
		pause(ctx)
	}
	guests, err := h.store.Guests()
	for i := range guests {
		guests[i].Launch = nil // long
	}
	h.t.Fatalf("guest has not ended: %+v %v, left over: %v", guests, err, h.world.Leftovers())
	return nil
}

// clean waits for the last of the host's own settings, which are given back
// right after the guest's last state was told.
func (h *host) clean() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	for len(h.world.Leftovers()) > 0 && ctx.Err() == nil {
		pause(ctx)
	}
	if left := h.world.Leftovers(); len(left) > 0 {
		h.t.Errorf("left over: %v", left)
	}
	if broken := h.world.Violations(); len(broken) > 0 {
		h.t.Errorf("rules broken: %v", broken)
	}
}

// execute is what the inbox does, until the manager takes commands.
func (h *host) execute(ctx context.Context, m *lifecycle.Manager, cmd *api.Command) error {
	h.t.Helper()
	select {
	case <-m.Ready():
	case <-ctx.Done():
		h.t.Fatal("manager does not get ready")
	}
	events, err := m.Execute(ctx, cmd)
	if err == nil {
		err = h.store.AppendEvents(events...)
	}
	return err
}

func TestALaunchGoesItsWholeWayAndLeavesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m := h.life(ctx, nil)
	go h.guest(ctx)
	if err := h.execute(ctx, m, h.command(nil)); err != nil {
		t.Fatal(err)
	}
	if s := h.ended(ctx); s.GetStatus() != api.GuestStatus_GUEST_STATUS_FINISHED || s.GetStepMs() == nil {
		t.Errorf("ended as %v", s)
	}
	if !bytes.Equal(h.world.Uploaded(outURL), sealedBytes()) || string(h.world.Uploaded(listURL)) != "signed" {
		t.Error("results were not uploaded")
	}
	h.clean()
}

func TestADigestThatDiffersIsRefusedBeforeAnythingStarts(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	var points []string
	m := h.life(ctx, func(p string) {
		mu.Lock()
		defer mu.Unlock()
		points = append(points, p)
	})
	if err := h.execute(ctx, m, h.command(func(l *api.LaunchGuest) { l.LaunchDigest[0] ^= 1 })); err != nil {
		t.Fatal(err)
	}
	s := h.ended(ctx)
	if s.GetStatus() != api.GuestStatus_GUEST_STATUS_FAILED || s.GetRefusal().GetCode() != "launch.digest-mismatch" || s.GetRefusal().GetRemedy() == "" {
		t.Errorf("ended as %v", s)
	}
	mu.Lock()
	defer mu.Unlock()
	if slices.ContainsFunc(points, func(p string) bool { return strings.Contains(p, "domain") || strings.Contains(p, "tap") }) {
		t.Errorf("something was started: %v", points)
	}
	h.clean()
}

// points records every boundary of a launch's life.
func points(t *testing.T, change func(*api.LaunchGuest)) []string {
	t.Helper()
	return pointsOf(newHost(t), change)
}

func pointsOf(h *host, change func(*api.LaunchGuest)) []string {
	t := h.t
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	var seen []string
	last := make(chan struct{}) // passed after the guest's end was told
	m := h.life(ctx, func(p string) {
		mu.Lock()
		defer mu.Unlock()
		if !slices.Contains(seen, p) {
			seen = append(seen, p)
			if p == "ended" {
				close(last)
			}
		}
	})
	go h.guest(ctx)
	if err := h.execute(ctx, m, h.command(change)); err != nil {
		t.Fatal(err)
	}
	h.ended(ctx)
	<-last
	mu.Lock()
	defer mu.Unlock()
	return slices.Clone(seen)
}

// The agent dies at every boundary of a launch's life; the next one ends it
// without anything left over. New steps are in the list by themselves.
func TestADeathAtAnyBoundaryLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*api.LaunchGuest)
		least  int
	}{
		"whole":   {nil, 20},
		"refused": {func(l *api.LaunchGuest) { l.LaunchDigest[0] ^= 1 }, 12},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := points(t, c.change)
			if len(all) < c.least {
				t.Fatalf("only %d boundaries: %v", len(all), all)
			}
			for _, point := range all {
				t.Run(point, func(t *testing.T) {
					t.Parallel()
					diesAt(t, point, c.change)
				})
			}
		})
	}
}

// diesAt ends an agent at a point, and lets the next one end the launch.
func diesAt(t *testing.T, point string, change func(*api.LaunchGuest)) {
	t.Helper()
	newHost(t).diesAt(point, change)
}

func (h *host) diesAt(point string, change func(*api.LaunchGuest)) {
	t := h.t
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel) // the second agent goes on
	dead := make(chan struct{})
	var once sync.Once
	first := h.life(ctx, func(p string) {
		if p == point {
			once.Do(func() { close(dead) })
			<-make(chan struct{}) // nothing of the first agent goes on
		}
	})
	go h.guest(ctx)
	go func() {
		<-first.Ready()
		events, err := first.Execute(ctx, h.command(change))
		if err == nil {
			_ = h.store.AppendEvents(events...)
		}
	}()
	select {
	case <-dead:
	case <-time.After(patience):
		t.Fatal("the boundary was not reached")
	}
	h.world.ProcessDied()
	second := h.life(ctx, nil)
	// The inbox carries the command out again: it is still pending.
	if err := h.execute(ctx, second, h.command(change)); err != nil {
		t.Fatal(err)
	}
	h.ended(ctx)
	h.clean()
}

func TestTheAgentsEndEndsNoGuest(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	m, over := h.lifeUntil(ctx, nil)
	if err := h.execute(ctx, m, h.command(nil)); err != nil {
		t.Fatal(err)
	}
	for !h.world.Running(guestID) {
		pause(t.Context())
	}
	cancel()
	// Lives of one test share the process: the listener that the first closes
	// on its way out must not be the second's.
	<-over
	h.world.ProcessDied()
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	h.life(ctx, nil)
	if !h.world.Running(guestID) {
		t.Fatal("the guest ended with its agent")
	}
	go h.guest(ctx)
	if s := h.ended(ctx); s.GetStatus() != api.GuestStatus_GUEST_STATUS_FINISHED {
		t.Errorf("an adopted guest ended as %v", s)
	}
	h.clean()
}

func TestADomainNobodyRecordedIsLeftAlone(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const stranger = "11111111-89ab-cdef-0123-456789abcdef"
	h.world.AddDomain(stranger, 1)
	m := h.life(ctx, nil)
	select {
	case <-m.Ready():
	case <-time.After(patience):
		t.Fatal("manager does not get ready")
	}
	if !h.world.Running(stranger) {
		t.Error("a domain nobody can account for was ended")
	}
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }

func bytesOf(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}
