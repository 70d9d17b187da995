package gpu

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of time. The driver takes half a minute and more for each GPU under
// CC when it sees it first.
const (
	startTime    = 2 * time.Minute
	startTimeGPU = time.Minute
	evidenceTime = 30 * time.Second // and as much for each GPU
)

// StartTime is the most that Open may take for so many GPUs.
func StartTime(gpus int) time.Duration { return startTime + time.Duration(gpus)*startTimeGPU }

// Machine is where the GPUs are.
type Machine struct {
	// Sysfs, Proc and Dev are where the kernel's are mounted.
	Sysfs, Proc, Dev string
	// Helper is the helper's command, and Env its environment.
	Helper []string
	Env    []string
	// Driver is why NVIDIA's driver did not load; nil when it did.
	Driver error
}

// Set is the guest's GPUs. It is safe for concurrent use; orders to the helper
// wait for one another.
type Set struct {
	sysfs string
	count int
	nodes []string

	turn   chan struct{} // full while an order is carried out; guards the rest
	in     io.WriteCloser
	lines  *bufio.Scanner
	broken error // the helper must not be asked any more
	end    func() error
}

// Open counts the GPUs on the bus and in the driver, and demands that both are
// as many as the manifest's, that CC is on and devtools are off, and that no
// GPU takes work yet. The helper runs until Close. Errors: guest.gpu-count,
// guest.gpu-foreign, guest.gpu-driver, guest.gpu-mode, guest.gpu-ready-early,
// guest.gpu-helper.
func (m Machine) Open(ctx context.Context, count int) (_ *Set, err error) {
	found, err := countFunctions(m.Sysfs)
	if err != nil {
		return nil, err
	}
	if err := equal("the guest's PCI bus", found, count); err != nil {
		return nil, err
	}
	nodes, err := m.makeNodes(count)
	if err != nil {
		return nil, err
	}
	s, err := m.start(ctx, count)
	if err != nil {
		return nil, err
	}
	s.nodes = nodes
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	r, err := s.ask(ctx, StartTime(count), request{Order: orderState})
	if err != nil {
		return nil, err
	}
	switch {
	case !r.State.ConfidentialComputing:
		err = contract.Refuse("guest.gpu-mode", "do not use this node: it gave out a GPU with CC off", "the guest's GPUs are not in Confidential Computing mode")
	case r.State.Devtools:
		err = contract.Refuse("guest.gpu-mode", "do not use this node: it gave out a GPU in devtools mode", "the guest's GPUs let debuggers look in (devtools mode)")
	case r.State.Ready:
		err = contract.Refuse("guest.gpu-ready-early", "use another guest image: something in it makes the GPUs ready", "the GPUs take work before anybody looked at their evidence")
	default:
		err = equal("NVIDIA's driver", r.State.GPUs, count)
	}
	return s, err
}

func equal(where string, found, want int) error {
	if found == want {
		return nil
	}
	return contract.Refuse("guest.gpu-count", "do not use this node if it repeats: the guest has not the GPUs of its manifest",
		"%s has %d GPUs, the manifest asks for %d", where, found, want)
}

// start starts the helper.
func (m Machine) start(ctx context.Context, count int) (*Set, error) {
	cmd := exec.CommandContext(context.WithoutCancel(ctx), m.Helper[0], m.Helper[1:]...) //nolint:gosec // measured with the image
	cmd.Env = m.Env
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("starting the GPUs' helper: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("starting the GPUs' helper: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, helperRefused(err)
	}
	return &Set{sysfs: m.Sysfs, count: count, turn: make(chan struct{}, 1), in: in, lines: newLines(out), end: sync.OnceValue(func() error {
		err := errors.Join(in.Close(), kill(cmd.Process), out.Close())
		// A process that hangs in the driver does not even end when killed;
		// nobody waits for it.
		go cmd.Wait() //nolint:errcheck // it was killed
		return err
	})}, nil
}

func kill(p *os.Process) error {
	if err := p.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending the GPUs' helper: %w", err)
	}
	return nil
}

// helperRefused is a helper that cannot be relied on.
func helperRefused(cause error) error {
	return contract.Refuse("guest.gpu-helper", "launch again; if it repeats, use a guest image whose driver fits the GPU",
		"the program that asks NVIDIA's driver does not do its work").Because(cause)
}

// ask gives an order and waits for the answer. A caller that gives up, a
// verifier that hangs up for instance, does not end the helper: the order is
// carried out all the same, and the next waits until it is.
func (s *Set) ask(ctx context.Context, limit time.Duration, q request) (response, error) {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return response{}, helperRefused(context.Cause(ctx))
	}
	type answer struct {
		r   response
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		defer func() { <-s.turn }()
		r, err := s.order(limit, q)
		answered <- answer{r, err}
	}()
	select {
	case a := <-answered:
		return a.r, a.err
	case <-ctx.Done():
		return response{}, helperRefused(context.Cause(ctx))
	}
}

// order has the helper carry out an order, for at most limit. One that did not
// answer as it should is ended and never asked again.
func (s *Set) order(limit time.Duration, q request) (response, error) {
	if s.broken != nil {
		return response{}, helperRefused(s.broken)
	}
	// The helper's end ends writing and reading.
	timer := time.AfterFunc(limit, func() { s.end() }) //nolint:errcheck // Close tells
	r, err := s.exchange(q)
	if !timer.Stop() {
		err = errors.Join(fmt.Errorf("the order %q is not carried out after %s", q.Order, limit), err)
	}
	if err != nil {
		s.broken = errors.Join(err, s.end())
		return response{}, helperRefused(s.broken)
	}
	if r.Error != "" {
		return response{}, helperRefused(fmt.Errorf("%s: %.400q", q.Order, r.Error))
	}
	return r, nil
}

func (s *Set) exchange(q request) (response, error) {
	if err := writeLine(s.in, q); err != nil {
		return response{}, err
	}
	line, err := next(s.lines)
	if err != nil {
		return response{}, err
	}
	return parseResponse(q.Order, line)
}

// Evidence has every GPU answer what REPORT_DATA were without them, and
// returns their evidence as contract.EncodeGPUEvidence has it. A guest without
// GPUs, a nil Set, has none. Errors: guest.gpu-count, guest.gpu-evidence,
// guest.gpu-helper.
func (s *Set) Evidence(ctx context.Context, without [contract.ReportDataSize]byte) ([]byte, error) {
	if s == nil {
		return nil, nil
	}
	nonce := contract.GPUNonce(without)
	text := hex.EncodeToString(nonce[:])
	r, err := s.ask(ctx, evidenceTime*time.Duration(1+s.count), request{Order: orderEvidence, Nonce: text})
	if err != nil {
		return nil, err
	}
	if err := equal("the evidence", len(r.Evidence), s.count); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for i, g := range r.Evidence {
		switch {
		case g.Nonce != text:
			return nil, evidenceRefused("GPU %d answers another nonce", i)
		case seen[string(g.Report)]:
			return nil, evidenceRefused("GPU %d gives the report of another", i)
		}
		seen[string(g.Report)] = true
	}
	data, err := contract.EncodeGPUEvidence(r.Evidence)
	if err != nil {
		return nil, evidenceRefused("%v", err)
	}
	return data, nil
}

func evidenceRefused(format string, args ...any) error {
	return contract.Refuse("guest.gpu-evidence", "launch again; do not use this node if it repeats",
		"the GPUs' evidence is not what was asked for: "+format, args...)
}

// Ready has the GPUs take work. Call it when their evidence was accepted. The
// bus is counted once more: a GPU that came later would be ready, too, and
// nobody would have looked at it. Errors: guest.gpu-count, guest.gpu-not-ready,
// guest.gpu-helper.
func (s *Set) Ready(ctx context.Context) error {
	if s == nil {
		return nil
	}
	found, err := countFunctions(s.sysfs)
	if err != nil {
		return err
	}
	if err := equal("the guest's PCI bus", found, s.count); err != nil {
		return err
	}
	if _, err := s.ask(ctx, evidenceTime, request{Order: orderReady}); err != nil {
		return err
	}
	r, err := s.ask(ctx, evidenceTime, request{Order: orderState})
	if err != nil {
		return err
	}
	if !r.State.Ready {
		return contract.Refuse("guest.gpu-not-ready", "launch again; if it repeats, use a guest image whose driver fits the GPU",
			"the GPUs do not take work although they were told to")
	}
	return equal("NVIDIA's driver", r.State.GPUs, s.count)
}

// Nodes are the device files through which the GPUs are used; none without
// GPUs.
func (s *Set) Nodes() []string {
	if s == nil {
		return nil
	}
	return s.nodes
}

// Close ends the helper, and with it the GPUs' session.
func (s *Set) Close() error {
	if s == nil {
		return nil
	}
	return s.end()
}
