package gpu_test

import (
	"encoding/binary"
	"path/filepath"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/tests/emulator/gpu"
	"github.com/confidential-node/agent/tests/emulator/gpu/vfiouser"
)

// write and read are whole words of configuration space.
func write(t *testing.T, c *client, at uint16, value uint32) {
	t.Helper()
	if err := c.WriteConfig(at, 4, value); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, c *client, at uint16) uint32 {
	t.Helper()
	value, err := c.ReadConfig(at, 4)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func TestAKernelLearnsSizesOfBARsAndTheSerialNumber(t *testing.T) {
	t.Parallel()
	model := swift(gputest.H100())
	model.BAR[1] = 128 << 30
	c := plug(t, gputest.New(model))
	for i, size := range model.BAR {
		at := uint16(0x10 + 8*i)
		write(t, c, at, 0xffffffff)
		write(t, c, at+4, 0xffffffff)
		low, high := read(t, c, at), read(t, c, at+4)
		if mask := uint64(high)<<32 | uint64(low&^0xf); -mask != size || low&0xf != 0xc {
			t.Errorf("BAR%d: %#x %#x, want %d bytes, 64-bit and prefetchable", 2*i, low, high, size)
		}
	}
	if serial := uint64(read(t, c, 0x150))<<32 | uint64(read(t, c, 0x14c)); serial != model.PDI {
		t.Errorf("serial number %#x", serial)
	}
}

func TestAResetLeavesConfigurationAsAfterPowerOn(t *testing.T) {
	t.Parallel()
	for name, model := range gpu.Models() {
		c := plug(t, gputest.New(swift(model)))
		fresh := make(map[uint16]uint32)
		for at := uint16(0); at < 4096; at += 4 {
			fresh[at] = read(t, c, at)
		}
		for at := uint16(0); at < 4096; at += 4 {
			if at != 0x80 { // device control, whose bit 15 is the reset
				write(t, c, at, 0xffffffff)
			}
		}
		write(t, c, 0x80, 0x0000ffff)
		fresh[4] &^= 2 // the emulator is made with memory decoding on
		for at := uint16(0); at < 4096; at += 4 {
			if got := read(t, c, at); got != fresh[at] {
				t.Errorf("%s: %#x at %#x after a reset, want %#x", name, got, at, fresh[at])
			}
		}
	}
}

// A guest may write anything to the mailboxes: the emulator drops it, and the
// next request is answered.
func TestRequestsThatAreNoneAreDropped(t *testing.T) {
	t.Parallel()
	for _, model := range []gputest.Model{gputest.H100(), gputest.B200()} {
		e := gputest.New(swift(model))
		c := plug(t, e)
		for _, w := range [][2]uint32{
			{0x8f2c14, 0x800}, {0x8f2c10, 0xfffffffc}, // the tail before the head
			{0x8f2c14, 0xfffffffc}, {0x8f2c10, 0x800}, // and outside the channel
			{0x8f1f88, 1}, {0x8f1f88, 2}, // dwords that nobody announced
			{0x8f1f84, 1<<20 | 0xfffff}, {0x8f1f88, 3}, // a message larger than any
			{0x8f1f84, 1 << 20}, {0x8f1f88, 4}, // and an empty one
		} {
			if err := c.Write32(w[0], w[1]); err != nil {
				t.Fatal(err)
			}
		}
		for _, request := range e.Requests() {
			if len(request) != 0 {
				t.Errorf("%s: %d dwords were taken for a request", model.Name, len(request))
			}
		}
		if _, err := ccmode.Apply(t.Context(), ccmode.On, device(t, model, c)); err != nil {
			t.Errorf("%s: %v", model.Name, err)
		}
	}
}

func TestWhatABMCSetsIsKeptAndWhatWasBrokenIsRepaired(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state")
	keep := func() *gputest.Emulator {
		e := gputest.New(swift(gputest.B200()))
		if err := gpu.Keep(e, path, func(err error) { t.Error(err) }); err != nil {
			t.Fatal(err)
		}
		return e
	}
	e := keep()
	for _, line := range []string{`{"do":"knob","knob":7,"value":0}`, `{"do":"break","faults":{"NoKnobs":[8]}}`, `{"do":"break","faults":{}}`} {
		if err := gpu.Obey([]byte(line), e); err != nil {
			t.Fatal(err)
		}
	}
	if err := gpu.Obey([]byte(`{"do":"knob","knob":45,"value":1}`), e); err == nil {
		t.Error("a B200 has no PPCIe, and its knob is set")
	}
	after := keep()
	_, err := ccmode.Apply(t.Context(), ccmode.On, device(t, swift(gputest.B200()), plug(t, after)))
	if err == nil || contract.AsRefusal(err).Code != "gpu.in-band-disabled" {
		t.Errorf("the BMC forbade changes before the restart: %v", err)
	}
	if err := gpu.Obey([]byte(`{"do":"knob","knob":7,"value":1}`), e); err != nil {
		t.Fatal(err)
	}
	if _, err := ccmode.Apply(t.Context(), ccmode.On, device(t, swift(gputest.B200()), plug(t, e))); err != nil {
		t.Errorf("repaired: %v", err)
	}
}

// Faults that show by waiting, all at once: the longest limit is 20 s.
func TestFaultsThatTakeTimeAreSeenOverTheSocket(t *testing.T) {
	if testing.Short() {
		t.Skip("waits up to 20 s")
	}
	t.Parallel()
	h100, b200 := gputest.H100(), gputest.B200()
	type outcome struct {
		name, want string
		err        error
	}
	cases := []struct {
		model  gputest.Model
		name   string
		faults gputest.Faults
		want   string
	}{
		{h100, "FSP never answers", gputest.Faults{FSPSilent: true}, "gpu.fsp-silent"},
		{b200, "FSP never answers", gputest.Faults{FSPSilent: true}, "gpu.fsp-silent"},
		{h100, "FSP takes nothing", gputest.Faults{FSPStuck: true}, "gpu.fsp-silent"},
		{b200, "FSP takes nothing", gputest.Faults{FSPStuck: true}, "gpu.fsp-silent"},
		{h100, "boot never completes", gputest.Faults{BootNever: true}, "gpu.boot-timeout"},
		{b200, "boot never completes", gputest.Faults{BootNever: true}, "gpu.boot-timeout"},
		{b200, "firewall never opens", gputest.Faults{FirewallNever: true}, "gpu.firewall-closed"},
		{h100, "FSP is slow", gputest.Faults{ReplyDelay: 300 * time.Millisecond}, ""},
		{b200, "FSP is slow", gputest.Faults{ReplyDelay: 300 * time.Millisecond}, ""},
		{h100, "vanishes", gputest.Faults{VanishAfter: 30}, "gpu.lost"},
		{b200, "vanishes", gputest.Faults{VanishAfter: 30}, "gpu.lost"},
	}
	outcomes := make(chan outcome, len(cases))
	for _, c := range cases {
		e := gputest.New(swift(c.model))
		d := device(t, c.model, plug(t, e))
		e.Break(func(f *gputest.Faults) { *f = c.faults })
		go func() {
			_, err := d.Active(t.Context()) // Apply would wait for the boot twice
			if err == nil {
				_, err = ccmode.Apply(t.Context(), ccmode.On, d)
			}
			outcomes <- outcome{c.model.Name + ", " + c.name, c.want, err}
		}()
	}
	for range cases {
		o := <-outcomes
		if (o.err == nil) != (o.want == "") || (o.err != nil && contract.AsRefusal(o.err).Code != o.want) {
			t.Errorf("%s: %v, want %q", o.name, o.err, o.want)
		}
	}
}

// FuzzAccess does what a guest may: any access to any region, and resets.
func FuzzAccess(f *testing.F) {
	access := func(kind byte, offset uint32, value uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32([]byte{kind}, offset), value)
	}
	const configWrite, registerRead, registerWrite, reset = 0x31, 0x30, 0x32, 0x03
	f.Add(false, append(access(configWrite, 0x80, 1<<15), access(registerRead, 0, 0)...))
	f.Add(false, append(access(registerWrite, 0x8f2c14, 0x80c), access(registerWrite, 0x8f2c10, 0x800)...))
	f.Add(true, append(access(registerWrite, 0x8f1f84, 0x10000c), access(registerWrite, 0x8f1f88, 0xc0000000)...))
	f.Add(true, access(reset, 0, 0))
	f.Fuzz(func(t *testing.T, blackwell bool, script []byte) {
		model := swift(gputest.H100())
		if blackwell {
			model = swift(gputest.B200())
		}
		function := gpu.Function{Emulator: gputest.New(model)}
		for ; len(script) >= 9; script = script[9:] {
			size, offset := 1+int(script[0]>>4), uint64(binary.LittleEndian.Uint32(script[1:]))
			data := append(script[5:9:9], make([]byte, 12)...)[:size]
			region := 0
			if script[0]&2 == 0 || script[0]&3 == 1 {
				region = []int{0, vfiouser.RegionConfig}[script[0]&1]
			}
			if offset > function.Region(region)-uint64(size) {
				offset %= function.Region(region) - uint64(size)
			}
			switch script[0] & 3 {
			case 0:
				_ = function.Read(region, offset, data)
			case 3:
				_ = function.Reset()
			default:
				_ = function.Write(region, offset, data)
			}
		}
		id := make([]byte, 4)
		if err := function.Read(vfiouser.RegionConfig, 0, id); err != nil || binary.LittleEndian.Uint32(id) != uint32(model.Device)<<16|0x10de {
			t.Errorf("the device is % x afterwards, %v", id, err)
		}
	})
}
