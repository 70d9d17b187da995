package gpu_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/tests/emulator/gpu"
	"github.com/confidential-node/agent/tests/emulator/gpu/vfiouser"
)

// client touches a function through its socket as QEMU does. It shares no
// code with the server.
type client struct {
	conn net.Conn
	id   uint16
}

func (c *client) ask(command uint16, body []byte) ([]byte, error) {
	c.id++
	message := binary.LittleEndian.AppendUint16(nil, c.id)
	message = binary.LittleEndian.AppendUint16(message, command)
	message = binary.LittleEndian.AppendUint32(message, uint32(16+len(body)))
	if _, err := c.conn.Write(append(append(message, make([]byte, 8)...), body...)); err != nil {
		return nil, err
	}
	head := make([]byte, 16)
	if _, err := io.ReadFull(c.conn, head); err != nil {
		return nil, err
	}
	reply := make([]byte, binary.LittleEndian.Uint32(head[4:])-16)
	if _, err := io.ReadFull(c.conn, reply); err != nil {
		return nil, err
	}
	if head[8]&0x20 != 0 {
		return nil, syscall.Errno(binary.LittleEndian.Uint32(head[12:]))
	}
	return reply, nil
}

func (c *client) access(command uint16, region, offset uint32, size int, data []byte) (uint32, error) {
	body := binary.LittleEndian.AppendUint64(nil, uint64(offset))
	body = binary.LittleEndian.AppendUint32(body, region)
	body = binary.LittleEndian.AppendUint32(body, uint32(size))
	reply, err := c.ask(command, append(body, data...))
	if err != nil || len(reply) == 16 {
		return 0, err
	}
	return binary.LittleEndian.Uint32(append(reply[16:], 0, 0, 0)), nil
}

func bytesOf(value uint32, size int) []byte {
	return binary.LittleEndian.AppendUint32(nil, value)[:size]
}

func (c *client) Read32(offset uint32) (uint32, error) { return c.access(9, 0, offset, 4, nil) }
func (c *client) Write32(offset, value uint32) error {
	_, err := c.access(10, 0, offset, 4, bytesOf(value, 4))
	return err
}

func (c *client) ReadConfig(offset uint16, size int) (uint32, error) {
	return c.access(9, 7, uint32(offset), size, nil)
}

func (c *client) WriteConfig(offset uint16, size int, value uint32) error {
	_, err := c.access(10, 7, uint32(offset), size, bytesOf(value, size))
	return err
}

// Reset is a function reset: the bit of device control, then what the kernel
// puts back.
func (c *client) Reset(context.Context) error {
	control, err := c.ReadConfig(0x78+8, 2)
	if err != nil {
		return err
	}
	if err := c.WriteConfig(0x78+8, 2, control|1<<15); err != nil {
		return err
	}
	return c.WriteConfig(4, 4, 0x0010_0002)
}

// plug serves an emulator and returns a client of it.
func plug(t *testing.T, e *gputest.Emulator) *client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener, err := vfiouser.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- vfiouser.Serve(ctx, listener, gpu.Function{Emulator: e}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() }) //nolint:errcheck // each answer was read
	c := &client{conn: conn}
	if _, err := c.ask(1, append(make([]byte, 4), "{}\x00"...)); err != nil {
		t.Fatal(err)
	}
	return c
}

// swift is a model that boots at once.
func swift(model gputest.Model) gputest.Model {
	model.Timing = gputest.Timing{}
	return model
}

func device(t *testing.T, model gputest.Model, c *client) *ccmode.Device {
	t.Helper()
	chip, err := ccmode.ChipOf(0x10de, model.Device)
	if err != nil {
		t.Fatal(err)
	}
	return ccmode.New(model.Name, chip, c)
}

func TestModesAreSwitchedOverTheSocket(t *testing.T) {
	t.Parallel()
	for name, model := range gpu.Models() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := gputest.New(swift(model))
			d := device(t, model, plug(t, e))
			for _, mode := range d.Chip().Modes() {
				if _, err := ccmode.Apply(t.Context(), mode, d); err != nil {
					t.Fatal(err)
				}
				s := e.State()
				if s.CC != (mode == ccmode.On || mode == ccmode.Devtools) || s.Devtools != (mode == ccmode.Devtools) || s.PPCIe != (mode == ccmode.ProtectedPCIe) {
					t.Errorf("%s: the device is %+v", mode, s)
				}
			}
		})
	}
}

func TestFaultsAreSeenOverTheSocket(t *testing.T) {
	t.Parallel()
	for want, faults := range map[string]gputest.Faults{
		"gpu.fsp-garbled":    {WrongType: true},
		"gpu.fsp-refused":    {WriteCode: 0x9e},
		"gpu.mode-mismatch":  {ModeStuck: true},
		"gpu.recovery-mode":  {Recovery: true},
		"gpu.security-fault": {Boot0: 0xbadf0200},
		"gpu.lost":           {Boot0: 0xffffffff},
	} {
		for _, model := range []gputest.Model{gputest.H100(), gputest.B200()} {
			t.Run(want+" "+model.Name, func(t *testing.T) {
				t.Parallel()
				e := gputest.New(swift(model))
				d := device(t, model, plug(t, e))
				e.Break(func(f *gputest.Faults) { *f = faults })
				_, err := ccmode.Apply(t.Context(), ccmode.On, d)
				if err == nil || contract.AsRefusal(err).Code != want {
					t.Errorf("%v, want %s", err, want)
				}
			})
		}
	}
}

// What QEMU reads and does when it takes a device.
func TestTheFunctionIsWhatAKernelExpects(t *testing.T) {
	t.Parallel()
	model := swift(gputest.H100())
	e := gputest.New(model)
	c := plug(t, e)
	for region, want := range []uint64{16 << 20, 0, 256 << 20, 0, 32 << 20, 0, 0, 4096, 0} {
		body := make([]byte, 32)
		body[0], body[8] = 32, byte(region)
		reply, err := c.ask(5, body)
		if err != nil || binary.LittleEndian.Uint64(reply[16:]) != want {
			t.Errorf("region %d: % x, %v, want %d bytes", region, reply, err, want)
		}
	}
	space, err := c.ask(9, append(append(make([]byte, 8), 7, 0, 0, 0), bytesOf(4096, 4)...))
	if err != nil || len(space) != 16+4096 || string(space[16:20]) != "\xde\x10\x30\x23" {
		t.Errorf("configuration space: %d bytes, %v", len(space), err)
	}
	for _, access := range []struct {
		size int
		want uint32
	}{{1, 0xa1}, {2, 0x00a1}, {4, 0x180000a1}} {
		if got, err := c.access(9, 0, 0, access.size, nil); err != nil || got != access.want {
			t.Errorf("%d bytes of BAR0: %#x, %v", access.size, got, err)
		}
	}
	if _, err := c.access(10, 0, 2, 2, []byte{1, 2}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("half a register is written: %v", err)
	}
	if got, err := c.access(9, 2, 0x1000, 4, nil); err != nil || got != 0 {
		t.Errorf("memory: %#x, %v", got, err)
	}
	// A scratch register that survives a function reset and not one of the bus.
	if err := c.Write32(0x91288, 7); err != nil {
		t.Fatal(err)
	}
	if err := c.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Read32(0x91288); err != nil || got != 7 {
		t.Errorf("after a function reset %#x, %v", got, err)
	}
	if _, err := c.ask(13, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteConfig(4, 2, 2); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Read32(0x91288); err != nil || got != 0 {
		t.Errorf("after a reset of the bus %#x, %v", got, err)
	}
	if got := e.State().Resets; got != 2 {
		t.Errorf("%d resets", got)
	}
}

func TestKnobsOutliveTheProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state")
	model := swift(gputest.H100())
	failed := func(err error) { t.Error(err) }
	first := gputest.New(model)
	if err := gpu.Keep(first, path, failed); err != nil {
		t.Fatal(err)
	}
	if _, err := ccmode.Apply(t.Context(), ccmode.On, device(t, model, plug(t, first))); err != nil {
		t.Fatal(err)
	}
	second := gputest.New(model)
	if err := gpu.Keep(second, path, failed); err != nil {
		t.Fatal(err)
	}
	if a, b := first.State(), second.State(); !maps.Equal(a.Knobs, b.Knobs) || b.CC {
		t.Errorf("before %+v\nafter %+v", a, b)
	}
	second.SBR() // power
	if !second.State().CC {
		t.Error("CC was staged, and is off after a reset")
	}
}

func TestOrdersLookAndBreak(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "ctl")
	listener, err := vfiouser.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	e := gputest.New(swift(gputest.H100()))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- gpu.Control(ctx, listener, e) }()
	if s, err := gpu.Command(t.Context(), path, gpu.Order{Do: "knob", Knob: 7, Value: 0}); err != nil || s.Knobs[7] != 0 || s.Model != "H100" {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := gpu.Command(t.Context(), path, gpu.Order{Do: "break", Faults: &gputest.Faults{Boot0: 5, ReplyDelay: time.Second}}); err != nil {
		t.Error(err)
	}
	if got := e.ReadBAR0(0); got != 5 {
		t.Errorf("broken, it reads %#x", got)
	}
	if s, err := gpu.Command(t.Context(), path, gpu.Order{Do: "vanish"}); err != nil || !s.Gone {
		t.Errorf("%+v, %v", s, err)
	}
	for _, order := range []gpu.Order{{}, {Do: "break"}, {Do: "dance"}} {
		if _, err := gpu.Command(t.Context(), path, order); err == nil {
			t.Errorf("%+v is carried out", order)
		}
	}
	for _, line := range []string{"", "{", `{"do":"state","more":1}`, `{"do":"break","faults":{"ResetFails":{}}}`} {
		if err := gpu.Obey([]byte(line), e); err == nil {
			t.Errorf("%q is carried out", line)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func FuzzObey(f *testing.F) {
	for _, order := range []string{`{"do":"state"}`, `{"do":"break","faults":{"FSPSilent":true,"NoKnobs":[8]}}`, `{"do":"knob","knob":8,"value":1}`, `{"do":"vanish"}`} {
		f.Add([]byte(order))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		e := gputest.New(swift(gputest.H100()))
		if err := gpu.Obey(line, e); err == nil {
			e.ReadBAR0(0)
		}
	})
}

func TestModelsAreNamed(t *testing.T) {
	t.Parallel()
	if names := slices.Sorted(maps.Keys(gpu.Models())); fmt.Sprint(names) != "[b200 h100 nvswitch rtx-pro-6000]" {
		t.Error(names)
	}
}
