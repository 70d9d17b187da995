package pool_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

// TestAReleaseThatFailsKeepsTheGPU goes through what can fail on the way to the old driver. A GPU
// whose CC is not seen to be off stays, unless it is wanted back anyway.
func TestAReleaseThatFailsKeepsTheGPU(t *testing.T) {
	on := uint32(1)
	for name, c := range map[string]struct {
		upset func(w *world)
		want  string
		step  pool.Step
		// anyway says that --anyway gets it back all the same.
		anyway bool
	}{
		"FSP silent":          {func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.FSPSilent = true }) }, "gpu.fsp-silent", pool.StepOff, true},
		"CC stays on":         {func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.ModeRegister = &on }) }, "gpu.mode-mismatch", pool.StepOff, true},
		"the BMC forbids it":  {func(w *world) { w.hardware[first].SetKnob(7, 0) }, "gpu.in-band-disabled", pool.StepOff, true},
		"memory is not clear": {func(w *world) { w.hardware[first].Break(func(f *gputest.Faults) { f.ScrubNever = true }) }, "gpu.not-scrubbed", pool.StepOff, true},
		"its reset hangs":     {func(w *world) { w.kernel.Hang(first) }, "gpu.reset-hung", pool.StepOff, false},
		"the unbind fails":    {func(w *world) { w.kernel.Fail("unbind", unix.EIO) }, "", pool.StepReturn, false},
	} {
		for _, anyway := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, anyway %t", name, anyway), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, device(first, gputest.H100(), "nvidia"))
					p, stop := w.life()
					defer stop()
					defer w.kernel.Release()
					rest(t, p)
					c.upset(w)
					if err := p.Release(first, anyway); err != nil {
						t.Fatal(err)
					}
					rest(t, p)
					v := view(t, p, first)
					if anyway && c.anyway {
						if v.State != pool.Unmanaged || v.Duty || w.binding(first) != w.before[first] {
							t.Errorf("wanted back anyway: %s %+v on %s", v.State, v.Quarantine, w.binding(first))
						}
						return
					}
					want, step := c.want, c.step
					if anyway && want == "gpu.reset-hung" { // and so does the way back
						want, step = "vfio.stuck", pool.StepReturn
					}
					if v.State != pool.Quarantined || v.Leaving || v.Quarantine.Step != step || (want != "" && v.Quarantine.Reason.Code != want) || w.kernel.Driver(first) != "vfio-pci" {
						t.Errorf("%s %+v on %q, want %s in step %s", v.State, v.Quarantine, w.kernel.Driver(first), want, step)
					}
				})
			})
		}
	}
}

func TestAReleaseWaitsForTheOldDriverAndMayBeCalledOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, device(first, gputest.H100(), "nvidia"))
		p, stop := w.life()
		defer stop()
		rest(t, p)
		if err := errors.Join(w.kernel.Unload("nvidia"), p.Release(first, false)); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		v := view(t, p, first)
		if !v.Leaving || v.Step != pool.StepReturn || v.Finding == nil || v.Finding.Code != "vfio.no-driver" || w.hardware[first].Knob(8) != 0 {
			t.Errorf("%s %s %+v, CC knob %d", v.State, v.Step, v.Finding, w.hardware[first].Knob(8))
		}
		if err := p.Reserve(guest, "H100", 1); code(err) != "gpu.capacity" {
			t.Errorf("offered although it leaves: %v", err)
		}
		if err := p.Reset(first); err != nil {
			t.Fatal(err)
		}
		rest(t, p)
		if v := view(t, p, first); v.State != pool.Clean || v.Leaving || v.Mode != ccmode.On || w.kernel.Driver(first) != "vfio-pci" {
			t.Errorf("called off: %s %+v in %s", v.State, v.Quarantine, v.Mode)
		}
	})
}

// hgx is a whole Hopper board; its devices need no time.
func hgx() (all []vfiotest.Device) {
	quick := func(a vfio.Address, model gputest.Model) {
		model.Timing = gputest.Timing{}
		all = append(all, device(a, model, ""))
	}
	for i := range 8 {
		quick(vfio.Address(fmt.Sprintf("0000:5%d:00.0", i)), gputest.H100())
	}
	for i := range 4 {
		quick(vfio.Address(fmt.Sprintf("0000:6%d:00.0", i)), gputest.NVSwitch())
	}
	return all
}

// idle demands that every device of the board but one is as it was before.
func idle(t *testing.T, p *pool.Pool, but vfio.Address) {
	t.Helper()
	for a, s := range states(p) {
		want := ccmode.On
		if a >= "0000:60:00.0" {
			want = ccmode.Off
		}
		if v := view(t, p, a); a != but && (s != pool.Clean || v.Mode != want) {
			t.Errorf("%s is %s in %s, %+v", a, s, v.Mode, v.Quarantine)
		}
	}
}

func TestOneBadDeviceOfABoardLeavesNoneInPPCIe(t *testing.T) {
	const bad = vfio.Address("0000:56:00.0")
	for name, c := range map[string]struct {
		upset func(e *gputest.Emulator)
		at    vfio.Address
		want  string
		// cured says that resetting it afterwards finds nothing.
		cured bool
	}{
		"a GPU's FSP is silent":       {func(e *gputest.Emulator) { e.Break(func(f *gputest.Faults) { f.FSPSilent = true }) }, bad, "gpu.fsp-silent", false},
		"a GPU's firmware is too old": {func(e *gputest.Emulator) { e.Break(func(f *gputest.Faults) { f.NoKnobs = []uint16{44, 45} }) }, bad, "gpu.firmware-without-ppcie", true},
		"a switch is in recovery":     {func(e *gputest.Emulator) { e.Break(func(f *gputest.Faults) { f.Recovery = true }) }, "0000:62:00.0", "gpu.recovery-mode", false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, hgx()...)
				p, stop := w.life()
				defer stop()
				rest(t, p)
				if err := p.Reserve(guest, "H100", 8); err != nil {
					t.Fatal(err)
				}
				c.upset(w.hardware[c.at])
				if err := p.Attach(t.Context(), guest); code(err) != c.want {
					t.Errorf("attached: %v, want %s", err, c.want)
				}
				for a, s := range states(p) {
					if s == pool.Attached {
						t.Errorf("%s is the guest's", a)
					}
				}
				if err := p.Return(t.Context(), guest); err != nil {
					t.Fatal(err)
				}
				rest(t, p)
				if c.cured {
					idle(t, p, "")
					return
				}
				idle(t, p, c.at)
				if v := view(t, p, c.at); v.State != pool.Quarantined {
					t.Errorf("the bad one is %s", v.State)
				}
			})
		})
	}
}

func TestADeathWithABoardInPPCIeIsRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, hgx()...)
		p, stop := w.life()
		rest(t, p)
		if err := p.Reserve(guest, "H100", 8); err != nil {
			t.Fatal(err)
		}
		w.dieAt = "did:check" // all of it is in PPCIe, and nobody has it on record as the guest's
		_ = p.Attach(t.Context(), guest)
		if !w.died(stop) {
			t.Fatal("it lived")
		}
		p, stop = w.life()
		defer stop()
		rest(t, p)
		idle(t, p, "")
	})
}
