package pool_test

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

func TestWhatASilentSiliconOrKernelDoesIsQuarantined(t *testing.T) {
	devtools := uint32(3)
	for _, c := range []struct {
		name  string
		upset func(w *world)
		want  string
	}{
		{"FSP silent", func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.FSPSilent = true }) }, "gpu.fsp-silent"},
		{"never boots", func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.BootNever = true }) }, "gpu.boot-timeout"},
		{"a reset that changes no mode", func(w *world) {
			w.hardware[first].Break(func(f *gputest.Faults) { f.ModeStuck = true })
			w.hardware[first].SetKnob(8, 0)
		}, ""},
		{"devtools, whatever is set", func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.ModeRegister = &devtools }) }, "gpu.mode-mismatch"},
		{"BMC locks it off", func(w *world) {
			w.hardware[first].SetKnob(8, 0)
			w.hardware[first].SetKnob(7, 0)
		}, "gpu.in-band-disabled"},
		{"off the bus", func(w *world) { w.hardware[first].Vanish() }, "gpu.lost"},
		{"unplugged", func(w *world) {
			if err := w.kernel.Remove(first); err != nil {
				w.t.Fatal(err)
			}
		}, "vfio.no-device"},
		{"reset hangs", func(w *world) { w.kernel.Hang(first) }, "gpu.reset-hung"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, device(first, gputest.H100(), "nvidia"), device(second, gputest.H100(), "nvidia"))
				p, stop := w.life()
				defer stop()
				defer w.kernel.Release()
				rest(t, p)
				if err := errors.Join(p.Reserve(guest, "H100", 1), p.Attach(t.Context(), guest)); err != nil {
					t.Fatal(err)
				}
				c.upset(w)
				start := time.Now()
				if err := p.Return(t.Context(), guest); err != nil {
					t.Fatal(err)
				}
				v := view(t, p, first)
				if c.want == "" {
					if v.State != pool.Clean {
						t.Errorf("%+v", v)
					}
					return
				}
				if v.State != pool.Quarantined || v.Quarantine.Reason.Code != c.want || len(v.Quarantine.Evidence) == 0 ||
					v.Quarantine.Guest != guest || v.Quarantine.Reason.Remedy == "" {
					t.Fatalf("%s %+v", v.State, v.Quarantine)
				}
				if took := time.Since(start); took > 8*time.Minute {
					t.Errorf("quarantined after %s", took)
				}
				if err := p.Reserve(other, "H100", 1); err != nil {
					t.Errorf("the other one: %v", err)
				}
				if err := p.Reserve("x", "H100", 1); code(err) != "gpu.capacity" || !strings.Contains(err.Error(), "1 quarantined") {
					t.Errorf("a quarantined one was offered: %v", err)
				}
			})
		})
	}
}

func TestAnUnbindThatHangsIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), "nvidia"))
		w.kernel.Hang(first)
		defer w.kernel.Release()
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Quarantined || v.Quarantine.Reason.Code != "vfio.stuck" || v.Quarantine.Step != pool.StepBind {
			t.Errorf("%s %+v", v.State, v.Quarantine)
		}
	})
}

// A guest with much pinned memory lets go long after its domain is gone.
func TestAGuestsDescriptorsAreWaitedFor(t *testing.T) {
	for _, old := range []bool{false, true} {
		for after, want := range map[time.Duration]string{time.Minute: "", time.Hour: "gpu.still-held"} {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, device(first, gputest.H100(), "nvidia"))
				if old {
					w.kernel.WithoutIOMMUFD()
				}
				p, stop := w.life()
				defer stop()
				rest(t, p)
				if err := errors.Join(p.Reserve(guest, "H100", 1), p.Attach(t.Context(), guest)); err != nil {
					t.Fatal(err)
				}
				qemu, err := w.kernel.Host().Open(w.kernel, first)
				if err != nil {
					t.Fatal(err)
				}
				closed := make(chan error, 1)
				go func() { wait(after); closed <- qemu.Close() }()
				start := time.Now()
				if err := p.Return(t.Context(), guest); err != nil {
					t.Fatal(err)
				}
				v := view(t, p, first)
				if want == "" && (v.State != pool.Clean || time.Since(start) < after) {
					t.Errorf("%s after %s, %+v", v.State, time.Since(start), v.Quarantine)
				}
				if want != "" && (v.State != pool.Quarantined || v.Quarantine.Reason.Code != want) {
					t.Errorf("%s %+v", v.State, v.Quarantine)
				}
				if err := <-closed; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestAGPUThatIsTakenAwayIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), "nvidia"), device(second, gputest.H100(), "nvidia"))
		p, stop := w.life()
		defer stop()
		rest(t, p)
		resets := w.hardware[second].Resets()
		b := vfio.Binding{Address: second, Vendor: 0x10de, Device: 0x2330, Driver: "nvidia"}
		if err := errors.Join(w.kernel.Remove(first), w.kernel.Host().GiveBack(t.Context(), b)); err != nil {
			t.Fatal(err)
		}
		wait(2 * time.Minute)
		if v := view(t, p, first); v.State != pool.Quarantined || v.Quarantine.Reason.Code != "vfio.no-device" {
			t.Errorf("unplugged: %s %+v", v.State, v.Quarantine)
		}
		if v := view(t, p, second); v.State != pool.Clean || w.kernel.Driver(second) != "vfio-pci" || w.hardware[second].Resets() == resets {
			t.Errorf("given to its driver behind our back: %s on %s", v.State, w.kernel.Driver(second))
		}
	})
}

func TestABindThatFailsInTheMiddleLeavesNothingHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(vga, gputest.RTXPRO6000(), "nouveau"),
			vfiotest.Device{Address: sound, Vendor: 0x10de, Device: 0x22e8, Class: 0x040300, Group: "44", Driver: "snd_hda_intel"})
		w.kernel.Fail("unbind", unix.EIO)
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if v := view(t, p, vga); v.State != pool.Quarantined || v.Quarantine.Step != pool.StepBind {
			t.Errorf("%s %+v", v.State, v.Quarantine)
		}
		for _, a := range []vfio.Address{vga, sound} {
			if now := w.binding(a); now != w.before[a] {
				t.Errorf("%s is %s, was %s", a, now, w.before[a])
			}
		}
		w.kernel.Fail("unbind", nil)
		if err := p.Reset(vga); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		if v := view(t, p, vga); v.State != pool.Clean || w.kernel.Driver(sound) != "vfio-pci" {
			t.Errorf("the way out: %s %+v", v.State, v.Quarantine)
		}
	})
}

// sticky is a GPU that a killed guest left so that only its bus's reset helps.
type sticky struct {
	*gputest.Emulator
}

func (s sticky) SBR() {
	s.Break(func(f *gputest.Faults) { f.FSPSilent = false })
	s.Emulator.SBR()
}

func TestWhereAFunctionResetIsNotEnoughTheBusIsReset(t *testing.T) {
	for name, methods := range map[string][]string{"": {"flr", "bus"}, "gpu.fsp-silent": {"flr"}} {
		synctest.Test(t, func(t *testing.T) {
			d := device(first, gputest.H100(), "nvidia")
			e := gputest.New(gputest.H100())
			d.Hardware, d.ResetMethods = sticky{e}, methods
			w := newWorld(t, d)
			p, stop := w.life()
			defer stop()
			rest(t, p)
			if err := errors.Join(p.Reserve(guest, "H100", 1), p.Attach(t.Context(), guest)); err != nil {
				t.Fatal(err)
			}
			e.Break(func(f *gputest.Faults) { f.FSPSilent = true })
			if err := p.Return(t.Context(), guest); err != nil {
				t.Fatal(err)
			}
			v := view(t, p, first)
			if name == "" && v.State != pool.Clean {
				t.Errorf("with a bus reset: %+v", v.Quarantine)
			}
			if name != "" && (v.State != pool.Quarantined || v.Quarantine.Reason.Code != name) {
				t.Errorf("without: %s %+v", v.State, v.Quarantine)
			}
			if name == "" {
				return
			}
			// The operator's way out.
			e.Break(func(f *gputest.Faults) { f.FSPSilent = false })
			if err := p.Reset(first); err != nil {
				t.Fatal(err)
			}
			rest(t, p)
			if v := view(t, p, first); v.State != pool.Clean || v.Quarantine != nil {
				t.Errorf("after the operator's reset: %+v", v)
			}
		})
	}
}

func TestBeforeAGuestGetsItTheModeMustBeOn(t *testing.T) {
	for _, c := range []struct {
		name  string
		upset func(e *gputest.Emulator)
		want  string
	}{
		{"devtools staged by the BMC", func(e *gputest.Emulator) { e.SetKnob(6, 1) }, "gpu.mode-mismatch"},
		{"CC off staged by the BMC", func(e *gputest.Emulator) { e.SetKnob(8, 0) }, "gpu.mode-mismatch"},
		{"devtools staged, and resets without effect", func(e *gputest.Emulator) {
			e.Break(func(f *gputest.Faults) { f.ModeStuck = true })
			e.SetKnob(6, 1)
		}, "gpu.mode-mismatch"},
		{"no mode at all", func(e *gputest.Emulator) {
			two := uint32(2)
			e.Break(func(f *gputest.Faults) { f.ModeRegister = &two })
		}, "gpu.mode-mismatch"},
		{"silent", func(e *gputest.Emulator) { e.Break(func(f *gputest.Faults) { f.FSPSilent = true }) }, "gpu.fsp-silent"},
		{"sound", func(*gputest.Emulator) {}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, device(first, gputest.B200(), ""), device(second, gputest.B200(), ""))
				p, stop := w.life()
				defer stop()
				rest(t, p)
				if err := p.Reserve(guest, "B200", 2); err != nil {
					t.Fatal(err)
				}
				c.upset(w.hardware[second])
				err := p.Attach(t.Context(), guest)
				if code(err) != c.want {
					t.Fatalf("%v, want %q", err, c.want)
				}
				if c.want == "" {
					return
				}
				if s := states(p); s[first] != pool.Reserved || s[second] != pool.Quarantined {
					t.Errorf("%v", s)
				}
				if err := p.Return(t.Context(), guest); err != nil {
					t.Fatal(err)
				}
				if s := states(p); s[first] != pool.Clean || s[second] != pool.Quarantined || w.kernel.Held() != 0 {
					t.Errorf("%v, %d files open", s, w.kernel.Held())
				}
			})
		})
	}
}

func TestAnExchangedBoardIsQuarantined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.B200(), ""))
		p, stop := w.life()
		rest(t, p)
		stop()
		pdi := view(t, p, first).PDI
		r := w.records()[0]
		r.PDI = "00000000000000aa"
		if err := w.disk.PutGPUs(r); err != nil {
			t.Fatal(err)
		}
		p, stop = w.life()
		defer stop()
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Quarantined || v.Quarantine.Reason.Code != "gpu.pdi-changed" {
			t.Fatalf("%s %+v", v.State, v.Quarantine)
		}
		if err := p.Release(first, false); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		if err := p.Reset(first); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Clean || v.PDI != pdi {
			t.Errorf("taken over anew: %s, PDI %s, %+v", v.State, v.PDI, v.Quarantine)
		}
	})
}

func TestAHiddenPDIIsNoFinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), ""))
		w.hardware[first].Break(func(f *gputest.Faults) { f.BlocksPDI = true })
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Clean || v.PDI != "2921ce551e4eeda3" {
			t.Errorf("%s, PDI %q: it can be seen while CC is off", v.State, v.PDI)
		}
	})
}
