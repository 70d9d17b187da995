// Package gputest plays NVIDIA GPUs and NVSwitches at register level: boot,
// BAR firewall, FSP mailboxes (EMEM and MNOC), persistent knobs, modes that
// change only at a reset, and the faults that are seen in the field. It knows
// nothing of the code it tests and takes no constant from it, so that a wrong
// offset cannot agree with itself.
//
// An Emulator is the device, not an access path: in-process tests hand it to
// the code as it is, and the vfio-user server shows the same one to a real
// kernel. Time is the real clock, or the fake one inside testing/synctest. It
// is safe for concurrent use.
package gputest

import (
	"context"
	"maps"
	"sync"
	"time"
)

// Model says what an Emulator is.
type Model struct {
	Name              string
	Device, Subsystem uint16
	Class             uint32 // 24 bits
	Boot0             uint32
	PDI               uint64
	// BAR sizes in bytes, by region index 0, 2, 4. BAR0 is always there.
	BAR    [3]uint64
	Timing Timing

	chip chip
}

type chip struct {
	boot, mode, scrub, recovery uint32
	blackwell, nvswitch         bool
}

func hopper() chip {
	return chip{boot: 0x200bc, mode: 0x1182cc, scrub: 0x100b20, recovery: 0x20120}
}

// H100 is an H100 SXM 80 GB. Its VRAM aperture is made small.
func H100() Model {
	return Model{
		Name: "H100", Device: 0x2330, Subsystem: 0x16c1, Class: 0x030200, Boot0: 0x180000a1, PDI: 0x2921ce551e4eeda3,
		BAR: [3]uint64{16 << 20, 256 << 20, 32 << 20}, Timing: usual(), chip: hopper(),
	}
}

// B200 is a B200 SXM 180 GB. Its VRAM aperture is made small.
func B200() Model {
	return Model{
		Name: "B200", Device: 0x2901, Subsystem: 0x1999, Class: 0x030200, Boot0: 0x1a0000a1, PDI: 0x51f00d0000b200aa,
		BAR: [3]uint64{64 << 20, 256 << 20, 32 << 20}, Timing: usual(),
		chip: chip{boot: 0x200bc, mode: 0x590, scrub: 0x8a004c, recovery: 0x8aa128, blackwell: true},
	}
}

// RTXPRO6000 is an RTX PRO 6000 Blackwell Server Edition.
func RTXPRO6000() Model {
	m := B200()
	m.Name, m.Device, m.Subsystem, m.Boot0, m.PDI = "RTX PRO 6000", 0x2bb5, 0x204e, 0x1b2000a1, 0x6000b1ac00000001
	m.chip.boot = 0xad00bc
	return m
}

// NVSwitch is the switch of an HGX Hopper board.
func NVSwitch() Model {
	return Model{
		Name: "NVSwitch", Device: 0x22a3, Subsystem: 0x1796, Class: 0x068000, Boot0: 0x7000a1, PDI: 0x5417c40000000001,
		BAR: [3]uint64{32 << 20, 0, 0}, Timing: usual(), chip: chip{boot: 0x660bc, mode: 0x28c50, recovery: 0x66120, nvswitch: true},
	}
}

// Faults are what is wrong with a device. The zero value is a sound one.
// Change them through Emulator.Break, at any time.
type Faults struct {
	FSPSilent       bool          // takes requests, never answers
	FSPStuck        bool          // never even takes a request
	ReplyDelay      time.Duration // before each answer
	WrongType       bool          // answers a message of another type
	ShortReply      bool          // answers with too few dwords
	LongReply       bool          // answers with a dword too many
	ReplyCode       uint32        // answers every request with this error
	WriteCode       uint32        // answers knob writes with this error
	MailboxError    bool          // MNOC only: the error bit is set
	RequestError    bool          // MNOC only: set once a request is written
	AnswerError     bool          // MNOC only: set once an answer is read
	BootNever       bool
	FirewallNever   bool
	Boot0           uint32 // overrides PMC_BOOT_0 unless 0
	Recovery        bool
	ModeRegister    *uint32       // overrides what is active
	ModeStuck       bool          // a reset changes no mode
	ScrubNever      bool          // memory is never reported clear
	LosesMemory     bool          // memory decode is off after a reset
	VanishAfter     int           // falls off the bus after so many accesses; 0: never
	ResetBlocks     time.Duration `json:"-"` // the reset takes so long; in process only
	ResetFails      error         `json:"-"` // likewise
	NoKnobs         []uint16      // firmware without these
	BlocksPDI       bool          // PDI unreadable under CC
	LosesKnobWrites bool          // says yes and stores nothing
}

// Timing is how long a device needs, from its reset on unless said otherwise.
type Timing struct {
	Reset    time.Duration // the reset itself, as the kernel waits for it
	Firewall time.Duration // Blackwell: until BAR0 opens
	Boot     time.Duration
	Scrub    time.Duration // until memory is clear
}

func usual() Timing {
	return Timing{Reset: 100 * time.Millisecond, Firewall: 300 * time.Millisecond, Boot: time.Second, Scrub: 2 * time.Second}
}

// Emulator is one device.
type Emulator struct {
	mu     sync.Mutex
	model  Model
	faults Faults
	config [4096]byte

	knobs   map[uint16]uint16
	applied struct {
		cc, devtools, ppcie bool
		decoupler           uint16
	}
	reset   time.Time
	scratch map[uint32]uint32 // plain storage
	access  int
	gone    bool
	resets  int // of every kind
	bus     int // of which by the bridge

	fsp    fsp
	stored func(knobs map[uint16]uint16)
	// requests are the packets the FSP took, for comparison with vectors.
	requests [][]uint32
	// traffic is every BAR0 access since Record, nil when not recording.
	traffic   []Access
	recording bool
}

// Access is one recorded BAR0 access.
type Access struct {
	Write         bool
	Offset, Value uint32
}

// New returns a device as it leaves the factory, booted long ago: all knobs 0
// except that the host may change modes.
func New(model Model) *Emulator {
	e := &Emulator{model: model, knobs: map[uint16]uint16{}, scratch: map[uint32]uint32{}, reset: time.Now().Add(-time.Hour)}
	for k := uint16(1); k <= 47; k++ {
		e.knobs[k] = 0
	}
	for _, allow := range []uint16{5, 7, 9, 44} {
		e.knobs[allow] = 1
	}
	if model.chip.blackwell {
		delete(e.knobs, 44)
		delete(e.knobs, 45)
	}
	e.buildConfig()
	e.fsp.clear()
	return e
}

// Break changes the device's faults.
func (e *Emulator) Break(change func(*Faults)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.faults)
}

// SetKnob stages a value behind the host's back, as a BMC does.
func (e *Emulator) SetKnob(k, value uint16) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.setKnob(k, value)
}

func (e *Emulator) setKnob(k, value uint16) {
	e.knobs[k] = value
	if e.stored != nil {
		e.stored(maps.Clone(e.knobs))
	}
}

// Persist makes knobs what a non-volatile memory holds, and has store called
// with all of them whenever one has changed, before the FSP answers. Knobs that
// this model lacks are ignored.
func (e *Emulator) Persist(knobs map[uint16]uint16, store func(knobs map[uint16]uint16)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for k := range e.knobs {
		if value, ok := knobs[k]; ok {
			e.knobs[k] = value
		}
	}
	e.stored = store
}

// State is what a device would tell somebody who sees into it.
type State struct {
	Model    string            `json:"model"`
	PDI      uint64            `json:"pdi"`
	Knobs    map[uint16]uint16 `json:"knobs"`
	CC       bool              `json:"cc"` // this and the next two: active
	Devtools bool              `json:"devtools"`
	PPCIe    bool              `json:"ppcie"`
	Resets   int               `json:"resets"` // of every kind
	Bus      int               `json:"bus_resets"`
	Accesses int               `json:"accesses"`
	Gone     bool              `json:"gone"`
}

// State looks into the device.
func (e *Emulator) State() State {
	e.mu.Lock()
	defer e.mu.Unlock()
	return State{
		Model: e.model.Name, PDI: e.model.PDI, Knobs: maps.Clone(e.knobs),
		CC: e.applied.cc, Devtools: e.applied.devtools, PPCIe: e.applied.ppcie,
		Resets: e.resets, Bus: e.bus, Accesses: e.access, Gone: e.gone,
	}
}

// Knob returns a staged value.
func (e *Emulator) Knob(k uint16) uint16 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.knobs[k]
}

// Resets returns how often the device was reset.
func (e *Emulator) Resets() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.resets
}

// Requests returns the packets the FSP took, and forgets them.
func (e *Emulator) Requests() [][]uint32 {
	e.mu.Lock()
	defer e.mu.Unlock()
	taken := e.requests
	e.requests = nil
	return taken
}

// Record starts recording BAR0 accesses anew.
func (e *Emulator) Record() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.recording, e.traffic = true, nil
}

// Traffic returns what was recorded.
func (e *Emulator) Traffic() []Access {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.traffic
}

// Model returns what the device is.
func (e *Emulator) Model() Model { return e.model }

// Stale leaves an answer in the mailbox that nobody fetched.
func (e *Emulator) Stale() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fsp.answer([]uint32{0xc0000000, 0x1510de7e, 1, 0x13, 0, 0xdead0001})
}

// Reset is the kernel's function reset: FLR between saving and restoring
// configuration space.
func (e *Emulator) Reset(ctx context.Context) error {
	e.mu.Lock()
	blocks, fails := e.faults.ResetBlocks, e.faults.ResetFails
	before := e.config
	e.mu.Unlock()
	if fails != nil {
		return fails
	}
	timer := time.NewTimer(max(blocks, e.model.Timing.Reset))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	e.FLR()
	e.mu.Lock()
	defer e.mu.Unlock()
	copy(e.config[firstBAR:endOfBARs], before[firstBAR:])
	if !e.faults.LosesMemory {
		e.config[4] = before[4]
	}
	return nil
}

// FLR resets the function: knobs become the active mode, the boot processor
// starts anew, configuration space is as after power on.
func (e *Emulator) FLR() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.functionReset()
	delete(e.scratch, 0x1458)
	delete(e.scratch, 0xdfe0)
}

// SBR is a reset by the bridge above: everything FLR does, and more scratch.
func (e *Emulator) SBR() {
	e.FLR()
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.scratch, 0x91288)
	e.bus++
}

func (e *Emulator) functionReset() {
	e.resets++
	e.reset = time.Now()
	e.fsp.clear()
	e.forgetConfig()
	if e.faults.ModeStuck {
		return
	}
	e.applied.cc = e.knobs[8] == 1
	e.applied.devtools = e.knobs[6] == 1
	e.applied.ppcie = e.knobs[45] == 1
	e.applied.decoupler = e.knobs[10]
}
