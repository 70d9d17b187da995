package ccmode

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Device is one GPU or NVSwitch whose modes can be read and set.
type Device struct {
	port
	chip   Chip
	layout layout
	fsp    transport
	opened bool  // the mailbox is empty and ours
	silent error // why the mailbox must not be used before a reset
}

// New returns the device behind a function. Name is for messages, usually the
// PCI address. It touches nothing.
func New(name string, chip Chip, function Function) *Device {
	p := port{name: name, Function: function}
	d := &Device{port: p, chip: chip, layout: chip.layout(), fsp: emem{p}}
	if d.layout.mnoc {
		d.fsp = mnoc{p}
	}
	return d
}

// Chip returns the device's family.
func (d *Device) Chip() Chip { return d.chip }

// Register offsets that all chips share.
const (
	registerBoot0   = 0x000000
	registerFSP     = 0x8f0334
	registerPDILow  = 0x820344
	registerPDIHigh = 0x820348
)

// Ready brings the device to D0 with memory decoding on and waits until its
// boot processor has booted. Errors: gpu.lost, gpu.firewall-closed,
// gpu.security-fault, gpu.recovery-mode, gpu.boot-timeout.
func (d *Device) Ready(ctx context.Context) error {
	if err := d.wake(ctx); err != nil {
		return err
	}
	if d.layout.firewall {
		if err := d.awaitFirewall(ctx); err != nil {
			return err
		}
	}
	if err := d.alive(); err != nil {
		return err
	}
	if d.layout.privRing {
		if err := errors.Join(d.write(0x12004c, 4), d.write(0x122204, 2)); err != nil {
			return err
		}
	}
	return d.awaitBoot(ctx)
}

// awaitFirewall waits until a Blackwell GPU opens its BAR after a reset.
func (d *Device) awaitFirewall(ctx context.Context) error {
	const limit = 10 * time.Second
	dvsec, err := d.vendorCapability(0)
	if err != nil {
		return err
	}
	if dvsec == 0 { // hidden by the hypervisor: registers answer when it is open
		open, err := poll(ctx, fastPoll, limit, func() (bool, error) {
			value, err := d.readRaw(registerBoot0)
			return value != allOnes, err
		})
		if err == nil && !open {
			return d.lost(nil)
		}
		return err
	}
	var word uint32
	open, err := poll(ctx, fastPoll, limit, func() (bool, error) {
		word, err = d.config(dvsec+8, 4)
		return word != allOnes && word&(1<<20) == 0, err
	})
	switch {
	case err != nil:
		return err
	case word == allOnes:
		return d.lost(nil)
	case !open:
		return contract.Refuse("gpu.firewall-closed", "power the host off and on; if it repeats, update the device's firmware",
			"%s keeps its registers shut %s after its reset (%#08x)", d.name, limit, word)
	}
	return nil
}

// alive tells a working device from one that is locked down or waits for firmware.
func (d *Device) alive() error {
	boot0, err := d.readRaw(registerBoot0)
	switch {
	case err != nil:
		return err
	case boot0 == allOnes:
		return d.lost(nil)
	case boot0 == 0xbadf0200, boot0 == 0xbad00200:
		return contract.Refuse("gpu.security-fault", "power the host off and on; if it repeats, have the device replaced",
			"%s has locked itself down after a security fault%s", d.name, d.faultCause())
	case boot0 == 0 && d.chip == Hopper:
		return d.inRecovery(0)
	}
	value, err := d.readRaw(d.layout.recovery)
	if err != nil {
		return err
	}
	if value>>16 != 0xbadf && value != allOnes && d.layout.recovering(value) {
		return d.inRecovery(value)
	}
	return nil
}

func (d *Device) inRecovery(value uint32) error {
	return contract.Refuse("gpu.recovery-mode", "restore the device's firmware with the vendor's tool, or have it replaced",
		"%s is in recovery mode (%#x): its firmware did not load", d.name, value)
}

func (d *Device) faultCause() string {
	offset := d.layout.faultConfig
	if d.layout.firewall {
		dvsec, err := d.vendorCapability(0)
		if err != nil || dvsec == 0 {
			return ""
		}
		offset = dvsec + 0x14
	}
	if offset == 0 {
		return ""
	}
	cause, err := d.config(offset, 4)
	if err != nil {
		return ""
	}
	return fmt.Sprintf(", cause %#08x", cause)
}

// awaitBoot waits for the FSP's word that it has booted. Blackwell answers
// with "blocked" until then.
func (d *Device) awaitBoot(ctx context.Context) error {
	var value uint32
	booted, err := poll(ctx, slowPoll, d.layout.bootLimit, func() (_ bool, err error) {
		value, err = d.readRaw(d.layout.boot)
		return value == 0xff, err
	})
	switch {
	case err != nil:
		return err
	case value == allOnes:
		return d.lost(nil)
	case !booted:
		return contract.Refuse("gpu.boot-timeout", "reset the device; if it repeats, power the host off and on",
			"%s has not booted within %s of its reset (status %#x)%s", d.name, d.layout.bootLimit, value, d.fspStatus())
	}
	return nil
}

// Active reads the mode the device is in since its last reset.
func (d *Device) Active(ctx context.Context) (Active, error) {
	if err := d.Ready(ctx); err != nil {
		return Active{}, err
	}
	register, err := d.read(d.layout.mode)
	if err != nil {
		return Active{}, err
	}
	return decodeActive(d.chip, register), nil
}

// Staged reads the mode the device will be in after its next reset, and
// whether the host may change it.
func (d *Device) Staged(ctx context.Context) (Staged, error) {
	knobs := map[Knob]uint16{}
	for _, k := range []Knob{CCM, CCD, Decoupler, CCMAllowInBand, CCDAllowInBand, DecouplerAllowInBand, PPCIE, PPCIEAllowInBand} {
		value, err := d.readKnob(ctx, k)
		if _, absent := errors.AsType[noKnobError](err); absent {
			continue
		}
		if err != nil {
			return Staged{}, err
		}
		knobs[k] = value
	}
	return decodeStaged(knobs), nil
}

// Query reads everything the device says about its modes. When its boot
// processor does not answer, Active is still filled and the error says so.
func (d *Device) Query(ctx context.Context) (Status, error) {
	status := Status{Chip: d.chip}
	var err error
	if status.Active, err = d.Active(ctx); err != nil {
		return status, err
	}
	if version, err := d.read(registerFSP); err == nil {
		status.FSPVersion = fmt.Sprintf("%d.%d", version>>8&0xf, version&0xff)
	}
	status.Staged, err = d.Staged(ctx)
	return status, err
}

// PDI reads the device's unique 64-bit id, which its attestation certificate
// carries too. It may be blocked in CC mode (gpu.register-blocked): whoever
// needs it then notes it while CC is off.
func (d *Device) PDI() (uint64, error) {
	low, err := d.read(registerPDILow)
	if err != nil {
		return 0, err
	}
	high, err := d.read(registerPDIHigh)
	return uint64(high)<<32 | uint64(low), err
}

// Reset resets the device, which activates its staged mode, and waits until it
// has booted. Errors: those of Ready, gpu.reset-hung, gpu.reset-failed.
func (d *Device) Reset(ctx context.Context) error {
	if err := d.Function.Reset(ctx); err != nil {
		return d.resetError(ctx, err)
	}
	d.opened, d.silent = false, nil
	return d.Ready(ctx)
}

func (d *Device) resetError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return contract.Refuse("gpu.reset-hung", "power the host off and on",
			"%s: its reset did not end in time", d.name).Because(err)
	}
	return contract.Refuse("gpu.reset-failed", "look at the kernel log; power the host off and on",
		"%s cannot be reset", d.name).Because(err)
}

// AwaitScrubbed waits until the reset has cleared the device's memory. It can
// be seen only while CC is off; under CC the memory's keys end with the reset.
func (d *Device) AwaitScrubbed(ctx context.Context) error {
	const limit = 10 * time.Second
	if d.layout.scrub == 0 {
		return nil
	}
	scrubbed, err := poll(ctx, slowPoll, limit, func() (bool, error) {
		value, err := d.read(d.layout.scrub)
		return value == 1, err
	})
	if err == nil && !scrubbed {
		return contract.Refuse("gpu.not-scrubbed", "reset the device again; if it repeats, power the host off and on",
			"%s has not cleared its memory within %s of its reset", d.name, limit)
	}
	return err
}
