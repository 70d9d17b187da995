package ccmode

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/gputest"
)

// device returns the emulated device and ours in front of it.
func device(t *testing.T, model gputest.Model) (*gputest.Emulator, *Device) {
	t.Helper()
	chip, err := ChipOf(0x10de, model.Device)
	if err != nil {
		t.Fatal(err)
	}
	e := gputest.New(model)
	return e, New("0000:41:00.0", chip, e)
}

// code of a refusal, "" for none.
func code(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}

// words renders requests without their two headers, writes with their value.
func words(t *testing.T, requests [][]uint32) string {
	t.Helper()
	var out []string
	for _, r := range requests {
		if len(r) < 3 || r[0] != 0xc0000000 || r[1] != 0x1310de7e {
			t.Fatalf("request %08x has other headers than one packet of PRC", r)
		}
		word := fmt.Sprintf("%08X", r[2])
		if len(r) == 4 {
			word += fmt.Sprintf("=%d", r[3])
		}
		out = append(out, word)
	}
	return strings.Join(out, " ")
}

// The packets that NVIDIA's admin tool sends, in its order.
func TestStagingSendsThePublishedPackets(t *testing.T) {
	for _, c := range []struct {
		name  string
		model gputest.Model
		knobs map[uint16]uint16
		gone  []uint16
		mode  Mode
		want  string
	}{
		{
			"Hopper on", gputest.H100(), nil, nil, On,
			"002D020C 0002020C 0004020C 0022020C 002D020C 000A020C 000A020D=2 0008020C 0008020D=1 0006020C",
		},
		{
			"Hopper on to devtools", gputest.H100(),
			map[uint16]uint16{10: 2, 8: 1},
			nil, Devtools,
			"002D020C 0002020C 0004020C 0022020C 002D020C 000A020C 000A020D=0 0008020C 0006020C 0006020D=1",
		},
		{
			"Hopper devtools to off", gputest.H100(),
			map[uint16]uint16{8: 1, 6: 1},
			nil, Off,
			"002D020C 000A020C 0006020C 0006020D=0 0008020C 0008020D=0",
		},
		{
			"Hopper PPCIe", gputest.H100(), nil, nil, ProtectedPCIe,
			"0008020C 0002020C 0004020C 0022020C 0006020C 0008020C 000A020C 000A020D=2 002D020C 002D020D=1",
		},
		{
			"Hopper PPCIe to off", gputest.H100(),
			map[uint16]uint16{45: 1, 10: 2},
			nil, Off,
			"002D020C 000A020C 000A020D=0 0006020C 0008020C 002D020D=0",
		},
		{
			"old Hopper firmware on", gputest.H100(), nil,
			[]uint16{44, 45},
			On,
			"002D020C 0002020C 0004020C 0022020C 000A020C 000A020D=2 0008020C 0008020D=1 0006020C",
		},
		{
			"Hopper on with features in the way", gputest.H100(),
			map[uint16]uint16{2: 1, 34: 1},
			nil, On,
			"002D020C 0002020C 0002020D=0 0004020C 0022020C 0022020D=0 002D020C 000A020C 000A020D=2 0008020C 0008020D=1 0006020C",
		},
		{
			"Blackwell on", gputest.B200(), nil, nil, On,
			"0002020C 0004020C 0022020C 0008020C 0008020D=1 0006020C",
		},
		{
			"Blackwell RTX off", gputest.RTXPRO6000(),
			map[uint16]uint16{8: 1},
			nil, Off,
			"0006020C 0008020C 0008020D=0",
		},
		{
			"NVSwitch PPCIe", gputest.NVSwitch(), nil, nil, ProtectedPCIe,
			"0008020C 0002020C 0004020C 0022020C 0006020C 0008020C 000A020C 002D020C 002D020D=1",
		},
		{
			"NVSwitch off", gputest.NVSwitch(),
			map[uint16]uint16{45: 1},
			nil, Off,
			"000A020C 002D020C 002D020D=0",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, d := device(t, c.model)
			for k, v := range c.knobs {
				e.SetKnob(k, v)
			}
			e.Break(func(f *gputest.Faults) { f.NoKnobs = c.gone })
			if _, err := d.stage(t.Context(), c.mode); err != nil {
				t.Fatal(err)
			}
			if got := words(t, e.Requests()); got != c.want {
				t.Errorf("packets\n  %s\nwant\n  %s", got, c.want)
			}
		})
	}
}

func TestBlackwellFirewallPackets(t *testing.T) {
	e, d := device(t, gputest.B200())
	if err := d.StageBAR0Firewall(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if got, want := words(t, e.Requests()), "000A020C 000A020D=2"; got != want {
		t.Errorf("packets %s, want %s", got, want)
	}
	_, hopper := device(t, gputest.H100())
	if err := hopper.StageBAR0Firewall(t.Context(), true); code(err) != "gpu.mode-unsupported" {
		t.Errorf("Hopper: %v", err)
	}
}

// Register by register, what one knob read and one knob write do.
func TestMailboxTrafficIsThePublishedOne(t *testing.T) {
	w := func(o, v uint32) gputest.Access { return gputest.Access{Write: true, Offset: o, Value: v} }
	for _, c := range []struct {
		name        string
		model       gputest.Model
		read, write []gputest.Access // the writes among the accesses
	}{
		{
			"Hopper", gputest.H100(),
			[]gputest.Access{
				w(0x8f2ad0, 0x03000800), w(0x8f2ad4, 0xc0000000), w(0x8f2ad4, 0x1310de7e), w(0x8f2ad4, 0x0008020c),
				w(0x8f2c14, 0x808), w(0x8f2c10, 0x800), w(0x8f2ad0, 0x03000800), w(0x8f2c94, 0x800),
			},
			[]gputest.Access{
				w(0x8f2ad0, 0x03000800), w(0x8f2ad4, 0xc0000000), w(0x8f2ad4, 0x1310de7e), w(0x8f2ad4, 0x0008020d), w(0x8f2ad4, 1),
				w(0x8f2c14, 0x80c), w(0x8f2c10, 0x800), w(0x8f2ad0, 0x03000800), w(0x8f2c94, 0x800),
			},
		},
		{
			"Blackwell", gputest.B200(),
			[]gputest.Access{w(0x8f1f84, 0x0010000c), w(0x8f1f88, 0xc0000000), w(0x8f1f88, 0x1310de7e), w(0x8f1f88, 0x0008020c)},
			[]gputest.Access{w(0x8f1f84, 0x00100010), w(0x8f1f88, 0xc0000000), w(0x8f1f88, 0x1310de7e), w(0x8f1f88, 0x0008020d), w(0x8f1f88, 1)},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, d := device(t, c.model)
			writes := func() []gputest.Access {
				return slices.DeleteFunc(e.Traffic(), func(a gputest.Access) bool { return !a.Write })
			}
			e.Record()
			if v, err := d.readKnob(t.Context(), CCM); v != 0 || err != nil {
				t.Fatalf("knob %d, %v: the dirty upper half must be cut", v, err)
			}
			if got := writes(); !slices.Equal(got, c.read) {
				t.Errorf("a knob read writes\n%+v, want\n%+v", got, c.read)
			}
			e.Record()
			if err := d.writeKnob(t.Context(), CCM, 1); err != nil {
				t.Fatal(err)
			}
			if got := writes(); !slices.Equal(got, c.write) {
				t.Errorf("a knob write writes\n%+v, want\n%+v", got, c.write)
			}
		})
	}
}

func TestModesChangeAtTheResetAndAreReadBack(t *testing.T) {
	for _, model := range []gputest.Model{gputest.H100(), gputest.B200(), gputest.RTXPRO6000(), gputest.NVSwitch()} {
		t.Run(model.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, d := device(t, model)
				modes := d.Chip().Modes()
				for _, mode := range append(slices.Clone(modes), reversed(modes)...) {
					before := e.Resets()
					outcomes, err := Apply(t.Context(), mode, d)
					if err != nil {
						t.Fatalf("%s: %v", mode, err)
					}
					if outcomes[0].After.Mode != mode {
						t.Errorf("%s: outcome %+v", mode, outcomes[0])
					}
					if resets := e.Resets() - before; resets > 1 || (resets == 1) != outcomes[0].Changed {
						t.Errorf("%s: %d resets, outcome %+v", mode, resets, outcomes[0])
					}
					status, err := d.Query(t.Context())
					if err != nil || status.Active.Mode != mode || status.Staged.Mode != mode || status.FSPVersion != "3.18" {
						t.Errorf("%s: status %+v, %v", mode, status, err)
					}
				}
			})
		})
	}
}

func TestAStagedModeIsNotAnActiveOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, d := device(t, gputest.H100())
		e.SetKnob(8, 1)
		e.SetKnob(10, 2)
		status, err := d.Query(t.Context())
		if err != nil || status.Active.Mode != Off || status.Staged.Mode != On {
			t.Fatalf("status %+v, %v: want active off, staged on", status, err)
		}
		// The knobs need no write; the reset is what is missing.
		outcomes, err := Apply(t.Context(), On, d)
		if err != nil || !outcomes[0].Changed || e.Resets() != 1 {
			t.Fatalf("outcome %+v, %v after %d resets", outcomes, err, e.Resets())
		}
	})
}

func TestTheDeviceIDSurvivesWhereItCanBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, d := device(t, gputest.H100())
		if pdi, err := d.PDI(); pdi != 0x2921ce551e4eeda3 || err != nil {
			t.Errorf("PDI %#x, %v", pdi, err)
		}
		e.Break(func(f *gputest.Faults) { f.BlocksPDI = true })
		if _, err := Apply(t.Context(), On, d); err != nil {
			t.Fatal(err)
		}
		if _, err := d.PDI(); code(err) != "gpu.register-blocked" {
			t.Errorf("blocked PDI: %v", err)
		}
	})
}

func TestMemoryIsClearAfterTheResetWhileCCIsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, d := device(t, gputest.H100())
		if err := errors.Join(d.Reset(t.Context()), d.AwaitScrubbed(t.Context())); err != nil {
			t.Fatal(err)
		}
		e.Break(func(f *gputest.Faults) { f.ScrubNever = true })
		if err := d.AwaitScrubbed(t.Context()); code(err) != "gpu.not-scrubbed" {
			t.Errorf("memory never clear: %v", err)
		}
	})
}

// A whole HGX Hopper board goes to PPCIe, or nothing of it changes.
func TestABoardChangesAsAWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var board []*Device
		var emulators []*gputest.Emulator
		for i := range 12 {
			model := gputest.H100()
			if i >= 8 {
				model = gputest.NVSwitch()
			}
			e, d := device(t, model)
			emulators, board = append(emulators, e), append(board, d)
		}
		start := time.Now()
		if _, err := Apply(t.Context(), ProtectedPCIe, board...); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("twelve devices took %s: they did not boot side by side", took)
		}
		emulators[9].SetKnob(44, 0) // the BMC locks a switch
		if _, err := Apply(t.Context(), Off, board...); code(err) != "gpu.in-band-disabled" {
			t.Fatalf("locked switch: %v", err)
		}
		for i, e := range emulators {
			if e.Resets() != 1 || e.Knob(45) != 1 {
				t.Errorf("device %d: %d resets, PPCIE %d: a refused change must change nothing", i, e.Resets(), e.Knob(45))
			}
			if i < 8 && e.Knob(10) != 2 {
				t.Errorf("device %d: decoupler %d, want it put back to 2", i, e.Knob(10))
			}
		}
	})
}

func reversed(modes []Mode) []Mode {
	modes = slices.Clone(modes)
	slices.Reverse(modes)
	return modes
}
