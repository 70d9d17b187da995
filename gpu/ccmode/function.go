package ccmode

import (
	"context"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Function is one PCI function as its owner touches it: BAR0 registers,
// configuration space, reset. Offsets are bytes. An implementation does
// exactly one access of the width asked for.
type Function interface {
	Read32(offset uint32) (uint32, error)
	Write32(offset uint32, value uint32) error
	// ReadConfig and WriteConfig take 1, 2 or 4 bytes at an offset below 4096.
	ReadConfig(offset uint16, size int) (uint32, error)
	WriteConfig(offset uint16, size int, value uint32) error
	// Reset resets the function alone and returns when configuration space is
	// restored. It returns ctx's error when that takes longer.
	Reset(ctx context.Context) error
}

// PCI configuration space, PCI Express Base Specification 5.0 section 7.
const (
	configCommand           = 0x04
	configCapabilities      = 0x34
	commandMemory           = 1 << 1
	capabilityPM            = 0x01
	pmControl               = 4
	pmStateMask             = 3
	extendedStart           = 0x100
	extendedDVSEC           = 0x23
	vendorNVIDIA            = 0x10de
	configSpaceEnd          = 0x1000
	allOnes                 = 0xffffffff
	d0Wait                  = 10 * time.Millisecond
	maxCapabilities         = 48  // of 4 bytes at least in the first 256 bytes
	maxExtendedCapabilities = 960 // of 4 bytes at least in the rest
)

// port is a Function whose failures carry its name and their meaning.
type port struct {
	name string
	Function
}

func (p port) lost(cause error) error {
	refusal := contract.Refuse("gpu.lost",
		"look at the kernel log for PCIe errors; power the host off and on, and reseat the device when it happens again",
		"%s does not answer on the bus", p.name)
	if cause != nil {
		return refusal.Because(cause)
	}
	return refusal
}

func (p port) garbled(cause error) error {
	return contract.Refuse("gpu.fsp-garbled", "reset the device; if it repeats, update its firmware",
		"%s: its boot processor (FSP) answers nonsense: %v", p.name, cause)
}

// read reads a register and refuses what the bus or the chip answers in place
// of a value: all ones (gone, memory decode off, in reset) and 0xbadfxxxx
// (register blocked).
func (p port) read(offset uint32) (uint32, error) {
	value, err := p.Read32(offset)
	switch {
	case err != nil || value == allOnes:
		return 0, p.lost(err)
	case value>>16 == 0xbadf:
		return 0, contract.Refuse("gpu.register-blocked",
			"this register cannot be read in the present mode; switch CC off, or use the value noted before",
			"%s: register %#x is blocked (%#08x)", p.name, offset, value)
	}
	return value, nil
}

// readRaw reads a register whose value may be anything, payload for instance.
func (p port) readRaw(offset uint32) (uint32, error) {
	value, err := p.Read32(offset)
	if err != nil {
		return 0, p.lost(err)
	}
	return value, nil
}

func (p port) write(offset, value uint32) error {
	if err := p.Write32(offset, value); err != nil {
		return p.lost(err)
	}
	return nil
}

func (p port) config(offset uint16, size int) (uint32, error) {
	value, err := p.ReadConfig(offset, size)
	if err != nil {
		return 0, p.lost(err)
	}
	return value, nil
}

// wake brings the function to D0 and lets it decode memory. Without both every
// register reads as all ones, or as zero under some hypervisors.
func (p port) wake(ctx context.Context) error {
	// 0xf0 is inside the device's own area and never all ones on a live one.
	sane, err := p.config(0xf0, 2)
	if err != nil {
		return err
	}
	if sane == 0xffff {
		return p.lost(nil)
	}
	pm, err := p.capability(capabilityPM)
	if err != nil {
		return err
	}
	if pm != 0 {
		control, err := p.config(pm+pmControl, 2)
		if err != nil {
			return err
		}
		if control&pmStateMask != 0 {
			if err := p.WriteConfig(pm+pmControl, 2, control&^pmStateMask); err != nil {
				return p.lost(err)
			}
			if err := pause(ctx, d0Wait); err != nil {
				return err
			}
		}
	}
	command, err := p.config(configCommand, 2)
	if err != nil {
		return err
	}
	if command&commandMemory == 0 {
		if err := p.WriteConfig(configCommand, 2, command|commandMemory); err != nil {
			return p.lost(err)
		}
	}
	return nil
}

// capability returns the offset of a PCI capability, 0 when there is none.
func (p port) capability(id uint32) (uint16, error) {
	next, err := p.config(configCapabilities, 1)
	for range maxCapabilities {
		if err != nil {
			return 0, err
		}
		offset := uint16(next) &^ 3
		if offset < 0x40 || next == 0xff {
			return 0, nil
		}
		var header uint32
		if header, err = p.config(offset, 2); err == nil && header&0xff == id {
			return offset, nil
		}
		next = header >> 8
	}
	return 0, err
}

// vendorCapability returns the offset of NVIDIA's designated vendor-specific
// extended capability with the given id, 0 when there is none. A device may
// have several such capabilities; all are looked at.
func (p port) vendorCapability(id uint32) (uint16, error) {
	offset := uint32(extendedStart)
	for range maxExtendedCapabilities {
		header, err := p.config(uint16(offset), 4)
		if err != nil {
			return 0, err
		}
		if header == 0 || header == allOnes {
			return 0, nil
		}
		if header&0xffff == extendedDVSEC && offset+12 <= configSpaceEnd {
			vendor, err := p.config(uint16(offset)+4, 2)
			if err != nil {
				return 0, err
			}
			number, err := p.config(uint16(offset)+8, 2)
			if err != nil {
				return 0, err
			}
			if vendor == vendorNVIDIA && number == id {
				return uint16(offset), nil
			}
		}
		offset = header >> 20 &^ 3
		if offset < extendedStart {
			return 0, nil
		}
	}
	return 0, nil
}

// poll calls done at most every step until it returns true, an error, or limit
// has passed. It looks once more at the end, so that a starved process does
// not call slow what it did not look at.
func poll(ctx context.Context, step, limit time.Duration, done func() (bool, error)) (bool, error) {
	end := time.Now().Add(limit)
	for {
		late := !time.Now().Before(end)
		ok, err := done()
		if ok || err != nil || late {
			return ok, err
		}
		if err := pause(ctx, step); err != nil {
			return false, err
		}
	}
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
