package ccmode

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/gpu/gputest"
)

// Each fault ends in its own refusal, with something to do next, and in time.
func TestEveryFaultHasItsName(t *testing.T) {
	two := uint32(2)
	for _, c := range []struct {
		name  string
		model gputest.Model
		fault func(*gputest.Faults)
		want  string // of setting CC on; "" succeeds all the same
		says  string
	}{
		{"FSP never answers", gputest.H100(), func(f *gputest.Faults) { f.FSPSilent = true }, "gpu.fsp-silent", "FSP status"},
		{"FSP never answers", gputest.B200(), func(f *gputest.Faults) { f.FSPSilent = true }, "gpu.fsp-silent", "no answer"},
		{"FSP takes nothing", gputest.B200(), func(f *gputest.Faults) { f.FSPStuck = true }, "gpu.fsp-silent", "not ready"},
		{"FSP takes nothing", gputest.H100(), func(f *gputest.Faults) { f.FSPStuck = true }, "gpu.fsp-silent", ""},
		{"FSP answers after 4.9 s", gputest.H100(), func(f *gputest.Faults) { f.ReplyDelay = 4900 * time.Millisecond }, "", ""},
		{"FSP answers after 4.9 s", gputest.B200(), func(f *gputest.Faults) { f.ReplyDelay = 4900 * time.Millisecond }, "", ""},
		{"wrong type", gputest.H100(), func(f *gputest.Faults) { f.WrongType = true }, "gpu.fsp-garbled", "type 0x14"},
		{"short reply", gputest.H100(), func(f *gputest.Faults) { f.ShortReply = true }, "gpu.fsp-garbled", "8 bytes"},
		{"short reply", gputest.B200(), func(f *gputest.Faults) { f.ShortReply = true }, "gpu.fsp-garbled", "2 dwords"},
		{"long reply", gputest.H100(), func(f *gputest.Faults) { f.LongReply = true }, "gpu.fsp-garbled", "2 dwords"},
		{"mailbox error", gputest.B200(), func(f *gputest.Faults) { f.MailboxError = true }, "gpu.fsp-garbled", "mailbox error"},
		{"request spoilt on its way", gputest.B200(), func(f *gputest.Faults) { f.RequestError = true }, "gpu.fsp-garbled", "after the message"},
		{"answer spoilt on its way", gputest.B200(), func(f *gputest.Faults) { f.AnswerError = true }, "gpu.fsp-garbled", "after the message"},
		{"invalid state", gputest.H100(), func(f *gputest.Faults) { f.WriteCode = 0x9e }, "gpu.fsp-refused", "0x9e, invalid state"},
		{"not supported", gputest.B200(), func(f *gputest.Faults) { f.ReplyCode = 0xa0 }, "gpu.fsp-refused", "not supported"},
		{"unpublished code", gputest.B200(), func(f *gputest.Faults) { f.ReplyCode = 0x77 }, "gpu.fsp-refused", "0x77, meaning not published"},
		{"no CC knob", gputest.B200(), func(f *gputest.Faults) { f.NoKnobs = []uint16{8} }, "gpu.fsp-refused", "CCM"},
		{"boot never completes", gputest.H100(), func(f *gputest.Faults) { f.BootNever = true }, "gpu.boot-timeout", "10s"},
		{"boot never completes", gputest.B200(), func(f *gputest.Faults) { f.BootNever = true }, "gpu.boot-timeout", "20s"},
		{"firewall never opens", gputest.B200(), func(f *gputest.Faults) { f.FirewallNever = true }, "gpu.firewall-closed", ""},
		{"all ones", gputest.H100(), func(f *gputest.Faults) { f.Boot0 = 0xffffffff }, "gpu.lost", ""},
		{"security fault", gputest.H100(), func(f *gputest.Faults) { f.Boot0 = 0xbadf0200 }, "gpu.security-fault", "cause 0x00000800"},
		{"security fault", gputest.B200(), func(f *gputest.Faults) { f.Boot0 = 0xbad00200 }, "gpu.security-fault", "cause 0x00002000"},
		{"recovery", gputest.H100(), func(f *gputest.Faults) { f.Recovery = true }, "gpu.recovery-mode", ""},
		{"recovery", gputest.B200(), func(f *gputest.Faults) { f.Recovery = true }, "gpu.recovery-mode", ""},
		{"recovery", gputest.NVSwitch(), func(f *gputest.Faults) { f.Recovery = true }, "gpu.recovery-mode", ""},
		{"mode register without meaning", gputest.H100(), func(f *gputest.Faults) { f.ModeRegister = &two }, "gpu.mode-mismatch", "unknown"},
		{"mode does not change", gputest.H100(), func(f *gputest.Faults) { f.ModeStuck = true }, "gpu.mode-mismatch", "off"},
		{"knob writes are lost", gputest.B200(), func(f *gputest.Faults) { f.LosesKnobWrites = true }, "gpu.mode-mismatch", ""},
		{"reset loses memory decode", gputest.H100(), func(f *gputest.Faults) { f.LosesMemory = true }, "", ""},
		{"reset fails", gputest.H100(), func(f *gputest.Faults) { f.ResetFails = errors.New("ENOTTY") }, "gpu.reset-failed", ""},
		{"reset blocks", gputest.H100(), func(f *gputest.Faults) { f.ResetBlocks = time.Hour }, "gpu.reset-hung", ""},
		{"reset takes a minute", gputest.H100(), func(f *gputest.Faults) { f.ResetBlocks = time.Minute }, "", ""},
	} {
		t.Run(c.name+" "+c.model.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, d := device(t, c.model)
				e.Break(c.fault)
				mode := On
				if c.model.Name == "NVSwitch" {
					mode = ProtectedPCIe
				}
				start := time.Now()
				_, err := Apply(t.Context(), mode, d)
				if code(err) != c.want || (err != nil && !strings.Contains(err.Error(), c.says)) {
					t.Errorf("%v, want %q with %q", err, c.want, c.says)
				}
				if took := time.Since(start); took > 3*time.Minute {
					t.Errorf("took %s", took)
				}
			})
		})
	}
}

func TestTheHostMayBeForbiddenToChangeModes(t *testing.T) {
	for _, c := range []struct {
		model gputest.Model
		knob  uint16
		mode  Mode
	}{
		{gputest.H100(), 7, On},
		{gputest.H100(), 9, On},
		{gputest.H100(), 5, Devtools},
		{gputest.H100(), 44, ProtectedPCIe},
		{gputest.B200(), 7, On},
		{gputest.NVSwitch(), 44, ProtectedPCIe},
	} {
		e, d := device(t, c.model)
		e.SetKnob(c.knob, 0)
		_, err := Apply(t.Context(), c.mode, d)
		if code(err) != "gpu.in-band-disabled" || e.Resets() != 0 {
			t.Errorf("%s, knob %d is 0: %v", c.model.Name, c.knob, err)
		}
		if _, err := Apply(t.Context(), Off, d); err != nil {
			t.Errorf("%s, knob %d is 0, already off: %v", c.model.Name, c.knob, err)
		}
	}
}

func TestOldFirmwareHasNoPPCIe(t *testing.T) {
	e, d := device(t, gputest.H100())
	e.Break(func(f *gputest.Faults) { f.NoKnobs = []uint16{44, 45} })
	if _, err := Apply(t.Context(), ProtectedPCIe, d); code(err) != "gpu.firmware-without-ppcie" {
		t.Error(err)
	}
	_, blackwell := device(t, gputest.B200())
	if _, err := Apply(t.Context(), ProtectedPCIe, blackwell); code(err) != "gpu.mode-unsupported" {
		t.Error(err)
	}
}

func TestAStaleAnswerIsNotTakenForOurs(t *testing.T) {
	for _, model := range []gputest.Model{gputest.H100(), gputest.B200()} {
		synctest.Test(t, func(t *testing.T) {
			e, d := device(t, model)
			e.Stale() // says 1
			if v, err := d.readKnob(t.Context(), CCM); v != 0 || err != nil {
				t.Errorf("%s: knob %d, %v", model.Name, v, err)
			}
		})
	}
}

// After a time-out an answer may come late, and nothing in it says to what.
func TestAfterATimeoutNothingIsAskedBeforeAReset(t *testing.T) {
	for _, model := range []gputest.Model{gputest.H100(), gputest.B200()} {
		synctest.Test(t, func(t *testing.T) {
			e, d := device(t, model)
			e.SetKnob(8, 1)
			e.Break(func(f *gputest.Faults) { f.ReplyDelay = 11 * time.Second })
			if _, err := d.readKnob(t.Context(), CCM); code(err) != "gpu.fsp-silent" {
				t.Fatalf("%s: %v", model.Name, err)
			}
			e.Break(func(f *gputest.Faults) { f.ReplyDelay = 0 })
			if _, err := d.readKnob(t.Context(), CCD); code(err) != "gpu.fsp-silent" {
				t.Errorf("%s: asked again before a reset: %v", model.Name, err)
			}
			if err := d.Reset(t.Context()); err != nil {
				t.Fatal(err)
			}
			if v, err := d.readKnob(t.Context(), CCD); v != 0 || err != nil {
				t.Errorf("%s: after the reset: %d, %v", model.Name, v, err)
			}
		})
	}
}

func TestASleepingDeviceIsWokenAndALostOneIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, d := device(t, gputest.H100())
		e.Sleep()
		if err := e.WriteConfig(4, 2, 0); err != nil {
			t.Fatal(err)
		}
		if a, err := d.Active(t.Context()); err != nil || a.Mode != Off {
			t.Errorf("asleep with memory decode off: %+v, %v", a, err)
		}
		e.Vanish()
		if _, err := d.Active(t.Context()); code(err) != "gpu.lost" {
			t.Errorf("vanished: %v", err)
		}
	})
}

// Wherever a device vanishes, Apply ends with a refusal that says so.
func TestADeviceMayVanishAtAnyAccess(t *testing.T) {
	for _, model := range []gputest.Model{gputest.H100(), gputest.B200()} {
		done := false
		for n := 1; !done; n += 1 + n/60 {
			synctest.Test(t, func(t *testing.T) {
				e, d := device(t, model)
				e.Break(func(f *gputest.Faults) { f.VanishAfter = n })
				_, err := Apply(t.Context(), On, d)
				if done = err == nil; done {
					if n < 50 {
						t.Errorf("%s: only %d accesses", model.Name, n)
					}
					return
				}
				if c := code(err); c != "gpu.lost" && c != "gpu.half-staged" {
					t.Errorf("%s vanished after access %d: %v", model.Name, n, err)
				}
			})
		}
	}
}

func TestACallerMayGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, d := device(t, gputest.H100())
		e.Break(func(f *gputest.Faults) { f.BootNever = true })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := d.Active(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want the context's error", err)
		}
	})
}

func TestModesAndChipsByName(t *testing.T) {
	for _, m := range []Mode{Unknown, Off, On, Devtools, ProtectedPCIe} {
		var back Mode
		text, _ := m.MarshalText()
		if err := back.UnmarshalText(text); err != nil || back != m {
			t.Errorf("%s: %v, %v", m, back, err)
		}
	}
	if _, err := ParseMode("unknown"); err == nil {
		t.Error("unknown can be set")
	}
	for device, want := range map[uint16]Chip{0x2330: Hopper, 0x22a3: NVSwitch3, 0x2901: Blackwell, 0x3182: Blackwell, 0x2bb5: BlackwellRTX} {
		if got, err := ChipOf(0x10de, device); got != want || err != nil {
			t.Errorf("%04x: %s, %v", device, got, err)
		}
	}
	for _, device := range []uint16{0x20b0, 0x2684, 0x26b9, 0x22a4} {
		if _, err := ChipOf(0x10de, device); code(err) != "gpu.unsupported-chip" {
			t.Errorf("%04x: %v", device, err)
		}
	}
	if _, err := ChipOf(0x8086, 0x2330); code(err) != "gpu.unsupported-chip" {
		t.Errorf("another vendor: %v", err)
	}
}

func FuzzParseReply(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\xc0\x7e\xde\x10\x15\x01\x00\x00\x00\x13\x00\x00\x00\x00\x00\x00\x00\x01\x00\xad\xde"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		packet := make([]uint32, len(raw)/4)
		for i := range packet {
			packet[i] = uint32(raw[4*i]) | uint32(raw[4*i+1])<<8 | uint32(raw[4*i+2])<<16 | uint32(raw[4*i+3])<<24
		}
		r, err := parseReply(nvdmPRC, packet)
		if err == nil && (len(r.payload) != len(packet)-5 || packet[3] != 0x13) {
			t.Errorf("%08x became %+v", packet, r)
		}
	})
}

// FuzzConfigSpace walks arbitrary configuration spaces, which come from the device.
func FuzzConfigSpace(f *testing.F) {
	f.Add([]byte{0x34: 0x40, 0x40: 1, 0x41: 0x40}, uint16(0x23))
	f.Fuzz(func(t *testing.T, raw []byte, id uint16) {
		p := port{"fuzz", space(raw)}
		if at, err := p.capability(uint32(id)); err != nil || at >= 0x100 {
			t.Errorf("capability at %#x, %v", at, err)
		}
		if at, err := p.vendorCapability(uint32(id)); err != nil || (at != 0 && (at < 0x100 || at > 0xff4)) {
			t.Errorf("extended capability at %#x, %v", at, err)
		}
	})
}

// space is configuration space alone, zero beyond its bytes.
type space []byte

func (s space) ReadConfig(offset uint16, size int) (value uint32, err error) {
	if int(offset)+size > 4096 {
		return 0, errors.New("outside configuration space")
	}
	for i := range size {
		if at := int(offset) + i; at < len(s) {
			value |= uint32(s[at]) << (8 * i)
		}
	}
	return value, nil
}
func (space) WriteConfig(uint16, int, uint32) error { return nil }
func (space) Read32(uint32) (uint32, error)         { return 0, nil }
func (space) Write32(uint32, uint32) error          { return nil }
func (space) Reset(context.Context) error           { return nil }
