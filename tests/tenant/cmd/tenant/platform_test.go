package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/hashicorp/go-hclog"
	"github.com/pelletier/go-toml/v2"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image/imagetest"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/gpu/evidence"
	"github.com/confidential-node/agent/gpu/rim/rimtest"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/tests/attester"
	"github.com/confidential-node/agent/tests/controlplane"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/keybroker"
	"github.com/confidential-node/agent/tests/outside"
	"github.com/confidential-node/agent/tests/tenant"
	"github.com/confidential-node/agent/vm/guest/broker"
	"github.com/confidential-node/agent/vm/guest/pin"
)

const (
	storeSecret = "canary-secret-of-the-store"
	brokerToken = "0123456789abcdef0123456789abcdef"
	nodeName    = "node-1"
)

// platform is all a tenant talks to: the real control plane, broker, store and
// registry, and a node that is the agent's link, inbox and store with an
// executor in the place of guests.
type platform struct {
	t        *testing.T
	dir      string
	profile  string
	image    string // reference with tag
	objects  *outside.Store
	storeWeb *httptest.Server
	chip     *snptest.Chain
	// gpuMaker certifies GPUs, whose manifests broker and tenant have.
	gpuMaker *spdmtest.Authority
	// controlCA issued none of the other services' certificates.
	controlCA []byte

	mu     sync.Mutex
	guests map[string]*guest
	// firmware is the launch digest of what the node really starts; nil is
	// what it was told.
	firmware []byte
	// gpus are given to every guest.
	gpus []*spdmtest.GPU
}

type guest struct {
	*attester.Guest
	command *api.LaunchGuest
}

func newPlatform(t *testing.T) *platform {
	t.Helper()
	p := &platform{t: t, dir: t.TempDir(), guests: map[string]*guest{}}
	var err error
	if p.chip, err = attester.NewChip(time.Now()); err != nil {
		t.Fatal(err)
	}
	manifests := p.gpuManifests()
	keys, err := keybroker.New(keybroker.Config{
		StateDir: filepath.Join(p.dir, "broker"), AdminToken: brokerToken, EmulatedRoots: manifests.EmulatedRoots, GPUManifests: manifests.Manifests,
		AllowDevelopmentImage: true, Rate: 1000, Burst: 1000, Logger: hclog.NewNullLogger(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if p.objects, err = outside.NewStore("tenant", storeSecret, time.Now, "sealed", "data", "models"); err != nil {
		t.Fatal(err)
	}
	brokerWeb, registryWeb := p.serve(keys.Handler()), p.serve(outside.Registry())
	p.storeWeb = p.serve(p.objects)
	p.image = strings.TrimPrefix(registryWeb.URL, "https://") + "/team/llm:1"
	if _, err := outside.Push(t.Context(), p.image, empty.Image, registryWeb.Client()); err != nil {
		t.Fatal(err)
	}
	plane, err := controlplane.Start(t.Context(), controlplane.Config{
		Dir: filepath.Join(p.dir, "plane"), ListenNATS: "127.0.0.1:0", ListenHTTP: "127.0.0.1:0",
		BeginRetry: 200 * time.Millisecond, Logger: hclog.NewNullLogger(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(plane.Close)
	p.controlCA = plane.CAPEM()
	profile, err := toml.Marshal(tenant.Profile{
		StateDir: filepath.Join(p.dir, "state"), ImageDir: imagetest.Folder(t), RIMDir: filepath.Join(p.dir, "rims"), GuestHost: "127.0.0.1",
		ControlPlane: tenant.ControlPlaneProfile{URL: plane.URL(), CAFile: p.file("control-ca.pem", plane.CAPEM()), TokenFile: p.file("control-token", []byte(plane.Token()))},
		Broker:       tenant.BrokerProfile{URL: brokerWeb.URL, CAFile: p.ca(brokerWeb), AdminTokenFile: p.file("broker-token", []byte(brokerToken))},
		Registry:     tenant.EndpointProfile{URL: registryWeb.URL, CAFile: p.ca(registryWeb)},
		Store:        tenant.StoreProfile{Endpoint: p.storeWeb.URL, CAFile: p.ca(p.storeWeb), Bucket: "sealed", AccessKey: "tenant", SecretKeyFile: p.file("store-secret", []byte(storeSecret))},
		Verify: tenant.VerifyProfile{
			AllowEmulatedRoots:    []string{p.file("root.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.chip.ARK})), p.file("gpu-root.pem", p.gpuMaker.RootPEM())},
			AllowDevelopmentImage: true,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.profile = p.file("tenant.toml", profile)
	p.node(plane)
	return p
}

// gpuManifests starts the maker of GPUs and writes the manifests of theirs into
// the folder that the profile names.
func (p *platform) gpuManifests() evidence.Policy {
	p.t.Helper()
	var err error
	if p.gpuMaker, err = spdmtest.NewAuthority(time.Now()); err != nil {
		p.t.Fatal(err)
	}
	driver, vbios, err := rimtest.For(p.gpuMaker, p.gpu(spdmtest.Config{}))
	if err != nil {
		p.t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(p.dir, "rims"), 0o700); err != nil {
		p.t.Fatal(err)
	}
	p.file("rims/driver", driver)
	p.file("rims/vbios", vbios)
	policy := evidence.Policy{EmulatedRoots: []*x509.Certificate{p.chip.Root, p.gpuMaker.Root}, Now: time.Now()}
	if err := policy.ReadManifests(os.DirFS(filepath.Join(p.dir, "rims"))); err != nil {
		p.t.Fatal(err)
	}
	return policy
}

func (p *platform) gpu(c spdmtest.Config) *spdmtest.GPU {
	p.t.Helper()
	g, err := p.gpuMaker.NewGPU(c)
	if err != nil {
		p.t.Fatal(err)
	}
	return g
}

func (p *platform) serve(h http.Handler) *httptest.Server {
	s := httptest.NewTLSServer(h)
	p.t.Cleanup(s.Close)
	return s
}

func (p *platform) file(name string, data []byte) string {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		p.t.Fatal(err)
	}
	return path
}

func (p *platform) ca(s *httptest.Server) string {
	return p.file("ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// node enrols a host and waits until it is in the control plane's epoch.
func (p *platform) node(plane *controlplane.Server) {
	p.t.Helper()
	creds, issuer, caPEM, err := plane.EnrolHost(p.t.Context(), nodeName)
	if err != nil {
		p.t.Fatal(err)
	}
	transport, err := control.NewNATS(control.NATSConfig{
		Servers: []string{"tls://" + strings.TrimPrefix(plane.NATSURL(), "tls://")}, HostID: nodeName,
		CAFile: p.file("node-ca.pem", caPEM), CredsFile: p.file("node.creds", creds),
	})
	if err != nil {
		p.t.Fatal(err)
	}
	state, err := store.Open(filepath.Join(p.dir, "node"), time.Now, hclog.NewNullLogger())
	if err != nil {
		p.t.Fatal(err)
	}
	in, err := inbox.New(inbox.Deps{
		Journal: state, Executor: p, Keys: []ed25519.PublicKey{issuer}, HostID: nodeName, Features: api.Features(), Logger: hclog.NewNullLogger(), Clock: clocktest.Wall,
	})
	if err != nil {
		p.t.Fatal(err)
	}
	epoch := func() (uint64, []byte) {
		e, err := state.Epoch()
		if err != nil {
			p.t.Error(err)
		}
		return e.Number, e.StoreID[:]
	}
	link, err := control.New(control.Deps{
		Transport: transport, Inbox: in, Outbox: state, HostID: nodeName, Interval: 100 * time.Millisecond, DeadMan: 10 * time.Second,
		Heartbeat: func() *api.Heartbeat {
			number, id := epoch()
			return &api.Heartbeat{IssuerEpoch: number, StoreId: id}
		},
		Capability: func() *api.Capability {
			number, id := epoch()
			return &api.Capability{Protocol: api.CapabilityVersion, Features: api.Features(), IssuerEpoch: number, StoreId: id}
		},
		Logger: hclog.NewNullLogger(),
	})
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(p.t.Context()))
	done := make(chan error, 2)
	go func() { done <- in.Run(ctx) }()
	go func() { done <- link.Run(ctx) }()
	p.t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, <-done, state.Close()); err != nil {
			p.t.Error(err)
		}
	})
	c, err := client.New(plane.URL(), plane.CAPEM(), plane.Token())
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	controltest.Eventually(p.t, "the node's epoch", func() bool {
		nodes, err := c.Nodes(p.t.Context())
		return err == nil && slices.ContainsFunc(nodes, func(n client.Node) bool { return n.Epoch > 0 && n.NodeEpoch == n.Epoch })
	})
}

// Execute implements inbox.Executor: a guest runs from its launch to its first
// challenge, which it answers; then it delivers its results and ends.
func (p *platform) Execute(ctx context.Context, cmd *api.Command) ([]*api.Event, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	state := func(id string, status api.GuestStatus) *api.Event {
		return api.NewGuestState(nodeName, cmd.GetCommandId(), time.Now(), &api.GuestState{GuestId: id, Generation: 1, Status: status})
	}
	switch v := cmd.GetVerb().(type) {
	case *api.Command_LaunchGuest:
		l := v.LaunchGuest
		g, err := attester.New(p.chip, l.GetManifest(), l.GetLaunchDigest())
		if err != nil {
			return nil, err
		}
		if p.firmware != nil {
			g.Measurement = p.firmware
		}
		g.GPUs = p.gpus
		p.guests[l.GetGuestId()] = &guest{g, l}
		if err := boot(ctx, g); err != nil {
			failed := state(l.GetGuestId(), api.GuestStatus_GUEST_STATUS_FAILED)
			failed.GetGuestState().Refusal = api.RefusalToWire(contract.AsRefusal(err))
			return []*api.Event{failed}, nil
		}
		return []*api.Event{state(l.GetGuestId(), api.GuestStatus_GUEST_STATUS_RUNNING)}, nil
	case *api.Command_RequestEvidence:
		id := v.RequestEvidence.GetGuestId()
		g := p.guests[id]
		e, err := g.Evidence(v.RequestEvidence.GetNonce())
		if err != nil {
			return nil, err
		}
		raw, err := json.Marshal(e)
		if err != nil {
			return nil, err
		}
		events := []*api.Event{api.NewEvidence(nodeName, cmd.GetCommandId(), time.Now(), id, raw)}
		if err := p.deliver(ctx, g); err != nil {
			return nil, err
		}
		return append(events, state(id, api.GuestStatus_GUEST_STATUS_FINISHED)), nil
	}
	return nil, nil
}

// boot gets a guest its keys with the init's own client of the broker.
func boot(ctx context.Context, g *attester.Guest) error {
	m, err := contract.ParseManifest(g.Manifest)
	if err != nil {
		return err
	}
	transport, err := pin.Transport(m.Broker)
	if err != nil {
		return err
	}
	c, err := broker.New(m.Broker.URL, transport)
	if err != nil {
		return err
	}
	if err := c.Attest(ctx, g.GPUEvidence, g.BrokerEvidence); err != nil {
		return err
	}
	for _, in := range m.Inputs {
		r, err := contract.ParseResource(in.Key)
		if err != nil {
			return err
		}
		if _, err := c.Resource(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// deliver seals, signs and uploads what the guest was asked for.
func (p *platform) deliver(ctx context.Context, g *guest) error {
	m, err := contract.ParseManifest(g.Manifest)
	if err != nil {
		return err
	}
	list := &contract.ResultManifest{Version: contract.ResultsVersion, LaunchID: m.LaunchID, Results: []contract.ResultEntry{}}
	files := map[string][]byte{}
	for _, r := range m.Results {
		recipient, err := age.ParseX25519Recipient(r.Recipients[0])
		if err != nil {
			return err
		}
		var sealed bytes.Buffer
		sum, err := tenant.Seal(&sealed, strings.NewReader("result "+r.Name), recipient)
		if err != nil {
			return err
		}
		files[r.Name] = sealed.Bytes()
		list.Results = append(list.Results, contract.ResultEntry{Name: r.Name, SHA256: sum.SHA256, Size: sum.Size})
	}
	if files[contract.ResultsManifestName], err = contract.SealResults(list, g.ResultKey); err != nil {
		return err
	}
	for _, u := range g.command.GetResults().GetUploads() {
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, u.GetPutUrl(), bytes.NewReader(files[u.GetName()]))
		if err != nil {
			return err
		}
		resp, err := p.storeWeb.Client().Do(req)
		if err != nil {
			return err
		}
		if err := resp.Body.Close(); err != nil || resp.StatusCode != http.StatusOK {
			return fmt.Errorf("uploading %s: %s, %w", u.GetName(), resp.Status, err)
		}
	}
	return nil
}

// tenant runs one command line under the platform's profile.
func (p *platform) tenant(args ...string) (code int, stdout, stderr string) {
	p.t.Helper()
	var out, errs bytes.Buffer
	code = run(p.t.Context(), append([]string{"--profile", p.profile}, args...), nil, &out, &errs)
	for _, secret := range []string{storeSecret, brokerToken, "X-Amz-Signature"} {
		if strings.Contains(out.String()+errs.String(), secret) {
			p.t.Errorf("%v prints a secret", args)
		}
	}
	return code, out.String(), errs.String()
}

// must runs a command line that succeeds.
func (p *platform) must(args ...string) string {
	p.t.Helper()
	code, out, errs := p.tenant(args...)
	if code != tenant.ExitOK {
		p.t.Fatalf("%s: exit %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// digestOf is the launch digest that a deployment prints.
func digestOf(t *testing.T, deployed string) string {
	t.Helper()
	_, after, ok := strings.Cut(deployed, "launch digest  ")
	digest := strings.TrimSpace(after)
	if raw, err := hex.DecodeString(digest); !ok || err != nil || len(raw) != 48 {
		t.Fatalf("no launch digest in %q", deployed)
	}
	return digest
}
