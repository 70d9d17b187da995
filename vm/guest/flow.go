package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/gpu"
	"github.com/confidential-node/agent/vm/guest/inputs"
	"github.com/confidential-node/agent/vm/guest/metadata"
	"github.com/confidential-node/agent/vm/guest/pin"
	"github.com/confidential-node/agent/vm/guest/results"
	"github.com/confidential-node/agent/vm/guest/serve"
	"github.com/confidential-node/agent/vm/guest/tee"
	"github.com/confidential-node/agent/vm/guest/workload"
)

// Time a phase may take. Where bytes are moved, time for them is added at the
// slowest rate worth waiting for.
const (
	identifyTimeout = 90 * time.Second
	attestTimeout   = 3 * time.Minute
	inputsTimeout   = 5 * time.Minute
	imageTimeout    = 30 * time.Minute
	collectTimeout  = 4 * time.Hour
	statusTimeout   = 10 * time.Second
	slowestBytes    = 4 << 20 // per second
)

// stopGrace is what a workload gets between being asked to end and being ended.
const stopGrace = 10 * time.Second

// evidenceLinger is how long a guest whose evidence nobody has taken yet waits
// for a verifier before it delivers its results and powers off: without evidence the key that signed
// the results is bound to nothing, and the results of a short job would be
// worth nothing.
const evidenceLinger = 30 * time.Second

// statusAttempts bounds how often a status is told to a host that does not
// listen.
const statusAttempts = 3

// process is a running workload.
type process interface {
	Done() <-chan struct{}
	ExitCode() (int, error)
	Stop(grace time.Duration)
	Dial(ctx context.Context, port int) (net.Conn, error)
	Close() error
}

// guest is one launch, from the first report to power-off.
type guest struct {
	log     hclog.Logger
	host    *metadata.Client
	started time.Time
	now     func() time.Time
	linger  time.Duration
	// stopping is closed when the host asked for the end.
	stopping chan struct{}
	stopOnce sync.Once

	// Parts of the machine, see equip.
	tee                 tee.Reporter
	memory              uint64
	configure           func(contract.NetworkFacts) error
	inputs              inputs.Store
	resultsDir, rootDir string
	idShift, ids        int
	listen              func(ctx context.Context, port int) (net.Listener, error)
	start               func(context.Context, workload.Spec) (process, error)

	openGPUs     func(ctx context.Context, count int) (*gpu.Set, error) // nil: the image cannot
	driverFolder string                                                 // of the GPUs' libraries

	// What the flow learns, in this order.
	manifest    []byte
	m           *contract.Manifest
	gpus        *gpu.Set // nil without GPUs
	tls         *serve.Identity
	resultKey   ed25519.PrivateKey
	secrets     secrets
	spec        workload.Spec
	exitCode    int
	answers     answers
	answersDone sync.WaitGroup
}

// stop asks the guest to end.
func (g *guest) stop() { g.stopOnce.Do(func() { close(g.stopping) }) }

// phase is one step of the flow. Its status is told when it has succeeded.
type phase struct {
	name    string
	timeout time.Duration
	status  contract.GuestPhase
	do      func(context.Context) error
}

// phases in order. Reading the list is reading a guest's life. From the
// second on, verifiers are answered until ctx ends.
func (g *guest) phases(ctx context.Context) []phase {
	return []phase{
		{"identify", identifyTimeout, contract.PhaseBooted, g.identify},
		{"gpus", gpu.StartTime(contract.MaxGPUs), "", g.takeGPUs},
		{"answer", 0, "", func(context.Context) error {
			g.answersDone.Go(func() { g.answerChallenges(ctx) })
			return nil
		}},
		{"attest", attestTimeout, contract.PhaseAttested, g.attest},
		{"inputs", inputsTimeout, contract.PhaseInputs, g.openInputs},
		{"image", imageTimeout, contract.PhaseImage, g.pullImage},
		{"run", 0, contract.PhaseCollecting, g.runWorkload},
		{"collect", collectTimeout, "", g.collect},
	}
}

// flow goes through the phases and stops at the first that fails.
func (g *guest) flow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer g.answersDone.Wait()
	defer cancel()
	defer func() { g.secrets.wipe() }()
	defer func() {
		if err := g.gpus.Close(); err != nil {
			g.log.Warn("letting the GPUs go", "err", err)
		}
	}()
	for _, p := range g.phases(ctx) {
		begin := g.now()
		if err := g.phase(ctx, p); err != nil {
			return err
		}
		g.log.Info("phase done", "phase", p.name, "ms", g.now().Sub(begin).Milliseconds())
		if p.status != "" {
			g.tell(ctx, contract.GuestStatus{Phase: p.status, ExitCode: g.exitCode})
		}
	}
	return nil
}

func (g *guest) phase(ctx context.Context, p phase) error {
	if p.timeout != 0 {
		timeout := p.timeout
		if g.m != nil {
			for _, in := range g.m.Inputs {
				timeout += time.Duration(in.Size/slowestBytes) * time.Second
			}
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	if p.name != "run" && p.name != "collect" {
		var cancel context.CancelCauseFunc
		ctx, cancel = context.WithCancelCause(ctx)
		defer cancel(nil)
		done := make(chan struct{})
		defer close(done)
		go func() {
			select {
			case <-g.stopping:
				cancel(errStopped)
			case <-done:
			}
		}()
	}
	return phaseError(ctx, p.name, p.do(ctx))
}

var errStopped = errors.New("the host asked the guest to end")

// phaseError gives an untyped error the phase's code.
func phaseError(ctx context.Context, name string, err error) error {
	var refused *contract.Refusal
	switch {
	case err == nil:
		return nil
	case errors.Is(context.Cause(ctx), errStopped):
		return contract.Refuse("guest.stopped", "launch again when the guest is wanted", "the guest was asked to end before its workload ran").Because(err)
	case errors.As(err, &refused):
		return err
	case errors.Is(err, pin.ErrUnpinned):
		return contract.Refuse("guest."+name+"-unpinned", "pin the server's CA or key in the manifest, and check who answers there",
			"a server in phase %s is not the one the manifest pins", name).Because(err)
	case ctx.Err() != nil:
		return contract.Refuse("guest."+name+"-timeout", "check that what the phase needs is reachable from the node, and launch again",
			"the guest's phase %s took too long", name).Because(err)
	}
	return contract.Refuse("guest."+name+"-failed", "launch again; a debug image in a trial without secrets tells more",
		"the guest's phase %s went wrong", name).Because(err)
}

// end tells the host how it went and returns err.
func (g *guest) end(ctx context.Context, err error) error {
	status := contract.GuestStatus{Phase: contract.PhaseDone, ExitCode: g.exitCode}
	if err != nil {
		status = contract.GuestStatus{Phase: contract.PhaseFailed, Refusal: contract.AsRefusal(err)}
	}
	g.tell(ctx, status)
	return err
}

// tell posts a status. A host that does not listen must not stop the guest.
func (g *guest) tell(ctx context.Context, s contract.GuestStatus) {
	s.UptimeMS = g.now().Sub(g.started).Milliseconds()
	for range statusAttempts {
		attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), statusTimeout)
		err := g.host.Status(attempt, s)
		cancel()
		if err == nil {
			return
		}
		g.log.Warn("telling status", "phase", s.Phase, "err", err)
	}
}

// identify fetches the manifest and holds it against what the silicon was
// told at launch. Everything after it is according to the manifest.
func (g *guest) identify(ctx context.Context) error {
	if err := retry(ctx, func() (err error) {
		g.manifest, err = g.host.Manifest(ctx)
		return err
	}); err != nil {
		return fmt.Errorf("fetching manifest: %w", err)
	}
	var fresh [contract.ReportDataSize]byte
	if _, err := rand.Read(fresh[:]); err != nil {
		return fmt.Errorf("making report data: %w", err)
	}
	attested, err := g.tee.Report(ctx, fresh)
	if err != nil {
		return contract.Refuse("guest.no-report", "start the guest as a confidential one, on a host that can", "the guest gets no attestation reports").Because(err)
	}
	hostData, err := tee.HostData(attested.Report, fresh)
	if err != nil {
		return err
	}
	if hostData != contract.HostData(g.manifest) {
		return contract.Refuse("guest.host-data-mismatch", "do not use this node: it serves another manifest than the guest was launched with",
			"the manifest the node serves is not the one in HOST_DATA")
	}
	if g.m, err = contract.ParseManifest(g.manifest); err != nil {
		return contract.Refuse("guest.manifest-malformed", "write the manifest with the tenant's tool", "the manifest is not valid").Because(err)
	}
	if err := g.supported(); err != nil {
		return err
	}
	return g.prepare(ctx)
}

// takeGPUs takes hold of the GPUs that the manifest asks for. They take no
// work yet.
func (g *guest) takeGPUs(ctx context.Context) (err error) {
	if g.m.GPU == nil {
		return nil
	}
	g.gpus, err = g.openGPUs(ctx, g.m.GPU.Count)
	return err
}

// supported refuses what the manifest demands and this guest cannot do.
func (g *guest) supported() error {
	if g.m.GPU != nil && g.openGPUs == nil {
		return contract.Refuse("guest.gpu-unsupported", "leave the GPU out of the manifest, or use a guest image with GPU support",
			"this guest image cannot gather evidence for GPUs")
	}
	if g.m.Compliance != "" {
		return contract.Refuse("guest.compliance-unsupported", "leave the profile out of the manifest, or use a guest image that has it",
			"this guest image has no compliance profile %.40q", g.m.Compliance)
	}
	if _, err := results.Recipients(g.m.Results); err != nil {
		return err
	}
	return inputs.Budget(g.m.Inputs, g.memory)
}

// prepare makes the keys and the network, and begins to answer verifiers.
func (g *guest) prepare(ctx context.Context) (err error) {
	if g.tls, err = serve.NewIdentity(); err != nil {
		return err
	}
	if _, g.resultKey, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return fmt.Errorf("making result key: %w", err)
	}
	var facts contract.NetworkFacts
	if err := retry(ctx, func() (err error) {
		facts, err = g.host.Network(ctx)
		return err
	}); err != nil {
		return fmt.Errorf("fetching network facts: %w", err)
	}
	return g.configure(facts)
}

// retry repeats a question to the host until it is answered or ctx ends. The
// host's service may come up later than the guest.
func retry(ctx context.Context, do func() error) error {
	const pause = 200 * time.Millisecond
	for {
		err := do()
		if err == nil || errors.Is(err, metadata.ErrRefused) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}
