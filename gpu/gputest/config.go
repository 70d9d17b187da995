package gputest

import (
	"encoding/binary"
	"errors"
	"time"
)

const (
	powerCap  = 0x60
	expressOf = 0x78
	dvsecAt   = 0xaf0
	serialAt  = 0x148

	firstBAR, endOfBARs = 0x10, 0x28 // three of 64 bits
)

// buildConfig lays out configuration space: ids, power management, PCI
// Express, and on Blackwell first a foreign vendor-specific capability and
// then NVIDIA's, so that who takes the first one it meets is wrong.
func (e *Emulator) buildConfig() {
	put16 := func(at int, v uint16) { binary.LittleEndian.PutUint16(e.config[at:], v) }
	put32 := func(at int, v uint32) { binary.LittleEndian.PutUint32(e.config[at:], v) }
	put16(0, 0x10de)
	put16(2, e.model.Device)
	put16(4, 1<<1)
	put16(6, 1<<4)
	put32(8, e.model.Class<<8|0xa1)
	e.forgetBARs()
	put16(0x2c, 0x10de)
	put16(0x2e, e.model.Subsystem)
	e.config[0x34] = powerCap
	put16(powerCap, expressOf<<8|1)
	put16(powerCap+2, 3)
	put16(powerCap+4, 8) // no soft reset
	put16(expressOf, 0x10)
	put16(expressOf+2, 2)
	put32(expressOf+4, 1<<28|1<<15|2)
	put32(expressOf+12, 16<<4|5)
	put16(expressOf+18, 16<<4|5)
	put32(expressOf+44, 0x3e)
	put16(expressOf+48, 5)
	put16(0xf0, 0x1000)
	put32(0x100, serialAt<<20|2<<16|1)
	next := uint32(0)
	if e.model.chip.blackwell {
		next = 0xa00
	}
	put32(serialAt, next<<20|1<<16|3)
	put32(serialAt+4, uint32(e.model.PDI))
	put32(serialAt+8, uint32(e.model.PDI>>32))
	if e.model.chip.blackwell {
		put32(0xa00, dvsecAt<<20|1<<16|0x23)
		put32(0xa04, 0x0c<<20|0x1e98)
		put32(dvsecAt, 1<<16|0x23)
		put32(dvsecAt+4, 0x1c<<20|0x10de)
	}
}

// errAccess is the answer to a size or place no access path has.
var errAccess = errors.New("gputest: access of 1, 2 or 4 bytes inside 4096")

// ReadConfig reads configuration space; a device that fell off the bus gives
// all ones.
func (e *Emulator) ReadConfig(offset uint16, size int) (uint32, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !validConfig(offset, size) {
		return 0, errAccess
	}
	if e.touch() {
		return allOnes(size), nil
	}
	if e.model.chip.blackwell {
		word := uint32(0)
		if e.firewallShut() {
			word = 1 << 20
		}
		binary.LittleEndian.PutUint32(e.config[dvsecAt+8:], word)
		binary.LittleEndian.PutUint32(e.config[dvsecAt+0x14:], 1<<13)
	} else {
		binary.LittleEndian.PutUint32(e.config[0x2b4:], 1<<11)
	}
	var value uint32
	for i := range size {
		value |= uint32(e.config[int(offset)+i]) << (8 * i)
	}
	return value, nil
}

// WriteConfig writes what is writable: command, BARs, power state, device
// control. Bit 15 of device control is a reset.
func (e *Emulator) WriteConfig(offset uint16, size int, value uint32) error {
	e.mu.Lock()
	if !validConfig(offset, size) {
		e.mu.Unlock()
		return errAccess
	}
	if e.touch() {
		e.mu.Unlock()
		return nil
	}
	var flr bool
	for i := range size {
		at := int(offset) + i
		b := byte(value >> (8 * i))
		mask := e.writable(at)
		if at == expressOf+9 && b&0x80 != 0 {
			flr = true
		}
		e.config[at] = e.config[at]&^mask | b&mask
	}
	e.mu.Unlock()
	if flr {
		e.FLR()
	}
	return nil
}

// writable tells which bits of a byte keep what is written.
func (e *Emulator) writable(at int) byte {
	switch {
	case at == 4:
		return 0x46
	case at == 5:
		return 0x05
	case at >= firstBAR && at < endOfBARs: // address bits, so that all ones read back as the size
		size := e.model.BAR[(at-firstBAR)/8]
		if size == 0 {
			return 0
		}
		return byte(-size >> (8 * ((at - firstBAR) % 8)))
	case at == powerCap+4:
		return 0x03
	case at == powerCap+5:
		return 0x01
	case at == expressOf+8:
		return 0xff
	case at == expressOf+9:
		return 0x7f
	case at >= 0x104 && at < serialAt: // AER masks and severities
		return 0xff
	}
	return 0
}

// forgetConfig is what a reset does to configuration space: no decoding, no
// addresses, power on, device control and error masks by default.
func (e *Emulator) forgetConfig() {
	e.config[4], e.config[5] = 0, 0
	e.forgetBARs()
	e.config[powerCap+4] &^= 0x03
	e.config[powerCap+5] &^= 0x01
	clear(e.config[expressOf+8 : expressOf+10])
	clear(e.config[0x104:serialAt])
}

func (e *Emulator) forgetBARs() {
	clear(e.config[firstBAR:endOfBARs])
	for i, size := range e.model.BAR {
		if size > 0 {
			e.config[firstBAR+8*i] = 0xc // 64-bit, prefetchable
		}
	}
}

func validConfig(offset uint16, size int) bool {
	return (size == 1 || size == 2 || size == 4) && int(offset)+size <= 4096
}

func allOnes(size int) uint32 { return uint32(1<<(8*size) - 1) }

// touch counts an access and tells whether the device is gone.
func (e *Emulator) touch() bool {
	e.access++
	if e.faults.VanishAfter > 0 && e.access > e.faults.VanishAfter {
		e.gone = true
	}
	return e.gone
}

// Vanish takes the device off the bus.
func (e *Emulator) Vanish() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.gone = true
}

// Sleep puts the function into D3hot, as an idle driver does.
func (e *Emulator) Sleep() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.config[powerCap+4] |= 3
}

func (e *Emulator) firewallShut() bool {
	return e.model.chip.blackwell && (e.faults.FirewallNever || time.Since(e.reset) < e.model.Timing.Firewall)
}

func (e *Emulator) booted() bool {
	return !e.faults.BootNever && time.Since(e.reset) >= e.model.Timing.Boot
}
