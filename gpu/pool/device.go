package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/vfio"
)

// Limits of what the kernel or the device may take. The kernel alone waits up
// to a minute for a device after its reset, and both opening and closing reset.
const (
	openLimit  = 90 * time.Second
	resetLimit = 90 * time.Second
	// stepLimit bounds a whole step: two rounds of reset, switch and read-back.
	stepLimit = 8 * time.Minute
	// holdLimit is how long after a guest's end its descriptors may stay open.
	holdLimit = 2 * time.Minute
	holdPoll  = 500 * time.Millisecond
)

// opened is a device that this process alone has.
type opened struct {
	*ccmode.Device
	file *vfio.Device
}

// open opens a device, waiting for a last holder to close it. A kernel that
// does not come back makes the device stuck.
func (p *Pool) open(ctx context.Context, r Record) (*opened, error) {
	chip, err := r.chip()
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(holdLimit); ; {
		file, err := p.openOnce(ctx, r.Address)
		if err == nil {
			return &opened{ccmode.New(string(r.Address), chip, file), file}, nil
		}
		if contract.AsRefusal(err).Code != "vfio.busy" {
			return nil, err
		}
		if time.Now().After(end) {
			return nil, p.stillHeld(r.Address, err)
		}
		if err := pause(ctx, holdPoll); err != nil {
			return nil, err
		}
	}
}

func (p *Pool) stillHeld(a vfio.Address, cause error) error {
	names := "unknown"
	if f, err := p.d.Host.Function(a); err == nil {
		if holders, err := p.d.Host.Holders(f); err == nil && len(holders) > 0 {
			names = fmt.Sprintf("%s (pid %d, %s)", holders[0].Command, holders[0].PID, holders[0].Path)
		}
	}
	return contract.Refuse("gpu.still-held", "end the process that has it, then `nodeagent gpu reset "+string(a)+"`",
		"%s is still open %s after its guest's end; holder: %s", a, holdLimit, names).Because(cause)
}

func (p *Pool) openOnce(ctx context.Context, a vfio.Address) (*vfio.Device, error) {
	type answer struct {
		file *vfio.Device
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		file, err := p.d.Host.Open(p.d.System, a)
		answers <- answer{file, err}
	}()
	timer := time.NewTimer(openLimit)
	defer timer.Stop()
	late := func() { // whenever the kernel comes back, the file is closed
		if got := <-answers; got.err == nil {
			_ = got.file.Close()
		}
	}
	select {
	case got := <-answers:
		return got.file, got.err
	case <-timer.C:
		go late()
		return nil, stuck(a, "opening it", openLimit)
	case <-ctx.Done():
		go late()
		return nil, context.Cause(ctx)
	}
}

// close gives the device up, which resets it once more.
func (o *opened) close(a vfio.Address) error {
	done := make(chan error, 1)
	go func() { done <- o.file.Close() }()
	timer := time.NewTimer(openLimit)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return stuck(a, "closing it", openLimit)
	}
}

func stuck(a vfio.Address, doing string, limit time.Duration) *contract.Refusal {
	return contract.Refuse("vfio.stuck", "look at the kernel log; the host needs a reboot before this device can be used",
		"%s: %s did not end within %s", a, doing, limit)
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// verify brings a device from whatever it is in to a verified mode: reset,
// mode set, read back, PDI compared. Where a function reset is not enough, and
// the kernel offers it, the second round begins with a reset of the bus. It
// returns what it saw in each round that failed.
func (p *Pool) verify(ctx context.Context, r *Record, mode ccmode.Mode) (evidence []string, err error) {
	f, err := p.d.Host.Function(r.Address)
	if err != nil {
		return nil, err
	}
	for _, method := range []string{"function", "bus"} {
		if method == "bus" {
			if !slices.Contains(f.ResetMethods, method) || incurable(err) {
				break
			}
			if busErr := p.d.Host.ResetFunction(ctx, r.Address, method); busErr != nil {
				return append(evidence, "bus reset: "+busErr.Error()), errors.Join(busErr, err)
			}
		}
		if err = p.renew(ctx, r, mode); err == nil {
			return nil, nil
		}
		evidence = append(evidence, "after a "+method+" reset: "+err.Error())
	}
	return evidence, err
}

// incurable are failures that another reset does not cure, or must not.
func incurable(err error) bool {
	return slices.Contains([]string{
		"vfio.stuck", "gpu.reset-hung", "gpu.still-held", "gpu.in-band-disabled", "gpu.firmware-without-ppcie", "gpu.mode-unsupported",
		"gpu.pdi-changed", "vfio.no-device", "vfio.not-bound", "vfio.group-shared",
	}, contract.AsRefusal(err).Code)
}

// renew is one round of verify.
func (p *Pool) renew(ctx context.Context, r *Record, mode ccmode.Mode) (err error) {
	o, err := p.open(ctx, *r)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close(r.Address)) }()
	reset, cancel := context.WithTimeout(ctx, resetLimit)
	defer cancel()
	if err := o.Reset(reset); err != nil {
		return err
	}
	if err := p.comparePDI(o, r); err != nil { // before CC may hide it
		return err
	}
	if err := p.hook("inside:" + string(r.Step)); err != nil {
		return err
	}
	if _, err := ccmode.Apply(ctx, mode, o.Device); err != nil {
		return err
	}
	return p.readBack(ctx, o, r, mode)
}

// readBack demands a mode, now and after the next reset, and the PDI that is
// known. Whoever opens the device next resets it: what is staged counts.
func (p *Pool) readBack(ctx context.Context, o *opened, r *Record, mode ccmode.Mode) error {
	status, err := o.Query(ctx)
	if err != nil {
		return err
	}
	r.Mode, r.FSP = status.Active.Mode, status.FSPVersion
	for _, seen := range []struct {
		what string
		mode ccmode.Mode
	}{{"is in mode", status.Active.Mode}, {"will after its next reset be in mode", status.Staged.Mode}} {
		if seen.mode != mode {
			return contract.Refuse("gpu.mode-mismatch", "see who else changes its mode (BMC, another tool), then `nodeagent gpu reset "+string(r.Address)+"`",
				"%s %s %s, must be %s (register %#x)", r.Address, seen.what, seen.mode, mode, status.Active.Register)
		}
	}
	return p.comparePDI(o, r)
}

// comparePDI notes the device's id, and refuses another than the one noted. A
// mode may hide it, which is no finding; nor does it matter any more what
// leaves.
func (p *Pool) comparePDI(o *opened, r *Record) error {
	if r.Leaving {
		return nil
	}
	pdi, err := o.PDI()
	if err != nil {
		if contract.AsRefusal(err).Code == "gpu.register-blocked" {
			return nil
		}
		return err
	}
	text := fmt.Sprintf("%016x", pdi)
	if r.PDI != "" && r.PDI != text {
		return contract.Refuse("gpu.pdi-changed", "if the board was exchanged: `nodeagent gpu release "+string(r.Address)+"`, then `nodeagent gpu reset "+string(r.Address)+"`",
			"%s has PDI %s and had %s: it is another device", r.Address, text, r.PDI)
	}
	r.PDI = text
	return nil
}

// nobody is the culprit when a set fails as a whole.
const nobody = -1

// check reads a whole set back before a guest gets it. The set of a board goes
// into PPCIe here, all of it or nothing. culprit is the device that fails, or
// nobody.
func (p *Pool) check(ctx context.Context, set []*Record, mode ccmode.Mode) (culprit int, err error) {
	var all []*ccmode.Device
	var files []*opened
	defer func() {
		for i, o := range files {
			if failed := o.close(set[i].Address); failed != nil {
				culprit, err = i, errors.Join(err, failed)
			}
		}
	}()
	for i, r := range set {
		o, err := p.open(ctx, *r)
		if err != nil {
			return i, err
		}
		files, all = append(files, o), append(all, o.Device)
	}
	if err := p.hook("inside:" + string(StepCheck)); err != nil {
		return nobody, err
	}
	if mode == ccmode.ProtectedPCIe {
		if _, err := ccmode.Apply(ctx, mode, all...); err != nil {
			return nobody, err
		}
	}
	for i, o := range files {
		if err := p.readBack(ctx, o, set[i], mode); err != nil {
			return i, err
		}
	}
	return nobody, nil
}

// off switches CC off and sees the memory cleared.
func (p *Pool) off(ctx context.Context, r *Record) ([]string, error) {
	evidence, err := p.verify(ctx, r, ccmode.Off)
	if err != nil {
		return evidence, err
	}
	o, err := p.open(ctx, *r)
	if err != nil {
		return nil, err
	}
	if err = o.Ready(ctx); err == nil {
		err = o.AwaitScrubbed(ctx)
	}
	return nil, errors.Join(err, o.close(r.Address))
}
