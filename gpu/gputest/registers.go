package gputest

import "time"

// ReadBAR0 and WriteBAR0 are what the bus sees: no errors, all ones for what
// is not there.
func (e *Emulator) ReadBAR0(offset uint32) uint32 {
	e.mu.Lock()
	defer e.mu.Unlock()
	value := e.readBAR0(offset)
	e.note(Access{Offset: offset, Value: value})
	return value
}

// WriteBAR0 writes a register.
func (e *Emulator) WriteBAR0(offset, value uint32) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.note(Access{Write: true, Offset: offset, Value: value})
	if e.deaf() {
		return
	}
	switch {
	case e.fspWrite(offset, value):
	case offset == 0x12004c, offset == 0x122204, offset == 0x1458, offset == 0xdfe0, offset == 0x91288:
		e.scratch[offset] = value
	}
}

// Read32 reads a register the way an access path does.
func (e *Emulator) Read32(offset uint32) (uint32, error) { return e.ReadBAR0(offset), nil }

// Write32 writes a register the way an access path does.
func (e *Emulator) Write32(offset, value uint32) error {
	e.WriteBAR0(offset, value)
	return nil
}

func (e *Emulator) note(a Access) {
	if e.recording {
		e.traffic = append(e.traffic, a)
	}
}

// deaf tells whether the function does not answer on its BARs.
func (e *Emulator) deaf() bool {
	return e.touch() || e.config[powerCap+4]&3 != 0 || e.config[4]&2 == 0 || e.firewallShut()
}

func (e *Emulator) readBAR0(offset uint32) uint32 {
	if e.deaf() {
		return 0xffffffff
	}
	if value, ok := e.fspRead(offset); ok {
		return value
	}
	switch offset {
	case 0:
		if e.faults.Boot0 != 0 {
			return e.faults.Boot0
		}
		return e.model.Boot0
	case 0xa00:
		return e.model.Boot0
	case e.model.chip.boot:
		if e.booted() {
			return 0xff
		}
		if e.model.chip.blackwell {
			return 0xbadf4100
		}
		return 0
	case e.model.chip.mode:
		return e.modeRegister()
	case e.model.chip.recovery:
		if !e.faults.Recovery {
			return 0
		}
		if e.model.chip.blackwell {
			return 2
		}
		return 1 << 30
	case 0x8f0334:
		return 0x312
	case 0x8f0320, 0x8f0324, 0x8f0328, 0x8f032c:
		return offset & 0xff
	case 0x8f0abc:
		return 0x20
	case 0x8f012c, 0x8f0278, 0x224fc:
		return 0
	}
	return e.readInside(offset)
}

// readInside reads what a decoupled BAR0 keeps from the host.
func (e *Emulator) readInside(offset uint32) uint32 {
	blocked := e.applied.decoupler == 2 && (e.applied.cc || e.applied.ppcie)
	switch offset {
	case 0x820344, 0x820348:
		if e.faults.BlocksPDI && blocked {
			return 0xbadf4100
		}
		if offset == 0x820344 {
			return uint32(e.model.PDI)
		}
		return uint32(e.model.PDI >> 32)
	case e.model.chip.scrub:
		if blocked || e.applied.cc {
			return 0xbadf4100
		}
		if e.faults.ScrubNever || time.Since(e.reset) < e.model.Timing.Scrub {
			return 0
		}
		return 1
	}
	if blocked {
		return 0xbadf4100
	}
	return e.scratch[offset]
}

func (e *Emulator) modeRegister() (value uint32) {
	if e.faults.ModeRegister != nil {
		return *e.faults.ModeRegister
	}
	set := func(on bool, bit int) {
		if on {
			value |= 1 << bit
		}
	}
	a := e.applied
	if e.model.chip.nvswitch {
		set(a.ppcie, 0)
		return value
	}
	set(a.cc, 0)
	set(a.devtools, 1)
	if e.model.chip.blackwell {
		set(a.decoupler == 2, 2)
		return value
	}
	set(a.ppcie, 5)
	set(true, 8) // power-efficiency mode supported
	return value
}
