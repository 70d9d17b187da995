package vfio_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

// hardware is a device with one register, a command register, and counters.
type hardware struct {
	register, command uint32
	flrs, sbrs        int
}

func (h *hardware) ReadBAR0(uint32) uint32    { return h.register }
func (h *hardware) WriteBAR0(_, value uint32) { h.register = value }
func (h *hardware) FLR()                      { h.flrs, h.register, h.command = h.flrs+1, 0, 0 }
func (h *hardware) SBR()                      { h.sbrs++; h.FLR() }
func (h *hardware) ReadConfig(o uint16, _ int) (uint32, error) {
	return map[uint16]uint32{0: 0x233010de, 4: h.command}[o], nil
}

func (h *hardware) WriteConfig(o uint16, _ int, value uint32) error {
	if o == 4 {
		h.command = value
	}
	return nil
}

func bound(t *testing.T) (*vfiotest.Kernel, *hardware) {
	t.Helper()
	k, err := vfiotest.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &hardware{}
	if err := k.Add(vfiotest.Device{
		Address: h100, Vendor: 0x10de, Device: 0x2330, Class: 0x030200, Group: "11", Driver: "vfio-pci",
		BAR: [3]uint64{16 << 20, 0, 0}, ResetMethods: []string{"flr"}, Hardware: h,
	}); err != nil {
		t.Fatal(err)
	}
	return k, h
}

func TestRegistersThroughVFIO(t *testing.T) {
	for name, old := range map[string]bool{"iommufd": false, "group": true} {
		t.Run(name, func(t *testing.T) {
			k, h := bound(t)
			if old {
				k.WithoutIOMMUFD()
			}
			d := must[*vfio.Device](t)(k.Host().Open(k, h100))
			if _, err := d.Read32(0); !errors.Is(err, unix.EIO) {
				t.Errorf("read with memory decode off: %v", err)
			}
			if err := errors.Join(d.WriteConfig(4, 2, 2), d.Write32(0x1458, 7)); err != nil {
				t.Fatal(err)
			}
			if v, err := d.Read32(0x1458); v != 7 || err != nil {
				t.Errorf("register %d, %v", v, err)
			}
			if v, err := d.ReadConfig(0, 4); v != 0x233010de || err != nil {
				t.Errorf("ids %#x, %v", v, err)
			}
			for _, err := range []error{second(d.Read32(16 << 20)), second(d.Read32(2)), second(d.ReadConfig(0, 3)), second(d.ReadConfig(4095, 2))} {
				if err == nil {
					t.Error("an access outside, or of no size the bus has, went through")
				}
			}
			if _, err := k.Host().Open(k, h100); code(err) != "vfio.busy" {
				t.Errorf("second opener: %v", err) // the kernel says EINVAL or EBUSY, by the way it is open
			}
			if err := d.Reset(t.Context()); err != nil || h.register != 0 {
				t.Errorf("reset: %v, register %d", err, h.register)
			}
			if err := d.Close(); err != nil || k.Held() != 0 || h.flrs != 3 {
				t.Errorf("closed: %v, %d files open, %d resets (open, reset, close)", err, k.Held(), h.flrs)
			}
			if d, err := k.Host().Open(k, h100); err != nil || d.Close() != nil {
				t.Errorf("opened again: %v", err)
			}
		})
	}
}

func second[T any](_ T, err error) error { return err }

func TestAResetThatHangsMakesTheDeviceStuck(t *testing.T) {
	k, _ := bound(t)
	d := must[*vfio.Device](t)(k.Host().Open(k, h100))
	k.Hang(h100)
	t.Cleanup(k.Release)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.Reset(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if _, err := d.Read32(0); code(err) != "vfio.stuck" {
		t.Errorf("read after it: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestADeviceWithStrangersInItsGroupDoesNotOpen(t *testing.T) {
	k, _ := bound(t)
	if err := k.Add(vfiotest.Device{Address: "0000:41:00.2", Vendor: 0x15b3, Device: 0x1021, Class: 0x020000, Group: "11", Driver: "nouveau"}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Host().Open(k, h100); code(err) != "vfio.busy" {
		t.Errorf("iommufd: %v", err)
	}
	k.WithoutIOMMUFD()
	if _, err := k.Host().Open(k, h100); code(err) != "vfio.group-shared" || k.Held() != 0 {
		t.Errorf("group: %v, %d files left open", err, k.Held())
	}
	if _, err := k.Host().Open(k, "0000:41:00.2"); code(err) != "vfio.not-bound" {
		t.Errorf("on another driver: %v", err)
	}
}

// Seen on a real kernel whose IOMMU remaps no interrupts.
func TestADeviceWhoseInterruptsNobodyChecksIsRefusedInWords(t *testing.T) {
	k, _ := bound(t)
	k.WithoutInterruptRemapping()
	for _, way := range []string{"iommufd", "group"} {
		if _, err := k.Host().Open(k, h100); code(err) != "vfio.interrupts-not-isolated" || k.Held() != 0 {
			t.Errorf("%s: %v, %d files left open", way, err, k.Held())
		}
		k.WithoutIOMMUFD()
	}
}

// Registers through a real mapping of a file in place of the BAR.
func TestRegistersThroughSysfs(t *testing.T) {
	k, _ := bound(t)
	dir := filepath.Join(k.Host().Sysfs, "bus/pci/devices", string(h100))
	bar := make([]byte, 16<<20)
	bar[0x1458] = 7
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "resource0"), bar, 0o600),
		os.WriteFile(filepath.Join(dir, "config"), append([]byte{0xde, 0x10, 0x30, 0x23}, make([]byte, 252)...), 0o600)); err != nil {
		t.Fatal(err)
	}
	r := must[*vfio.Registers](t)(k.Host().OpenRegisters(h100))
	if v, err := r.Read32(0x1458); v != 7 || err != nil {
		t.Errorf("register %d, %v", v, err)
	}
	if err := errors.Join(r.Write32(0x1000, 0xdeadbeef), r.WriteConfig(4, 2, 2), r.Reset(t.Context())); err != nil {
		t.Error(err)
	}
	written, _ := os.ReadFile(filepath.Join(dir, "resource0"))
	if string(written[0x1000:0x1004]) != "\xef\xbe\xad\xde" {
		t.Errorf("wrote % x", written[0x1000:0x1004])
	}
	if v, err := r.ReadConfig(0, 4); v != 0x233010de || err != nil {
		t.Errorf("ids %#x, %v", v, err)
	}
	if _, err := r.Read32(16 << 20); err == nil {
		t.Error("a register outside the BAR was read")
	}
	// The device goes while it is mapped: SIGBUS.
	if err := os.Truncate(filepath.Join(dir, "resource0"), 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read32(0x100000); err == nil || !strings.Contains(err.Error(), "faults") {
		t.Errorf("a device that has gone: %v", err)
	}
	if v, err := r.Read32(0x1000 - 4); v != 0 || err != nil {
		t.Errorf("after the fault: %d, %v", v, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// TestMain lets the test binary be the disposable child.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "write-value" {
		os.Exit(vfio.WriteMain(os.Args[2]))
	}
	os.Exit(m.Run())
}

func TestAWriteHappensInAProcessOfItsOwn(t *testing.T) {
	dir := t.TempDir()
	w := vfio.Disposable{Command: []string{os.Args[0], "write-value"}, Limit: 20 * time.Second}
	path := filepath.Join(dir, "value")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := w.Write(t.Context(), path, "vfio-pci\n"); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(path); string(text) != "vfio-pci\n" {
		t.Errorf("wrote %q", text)
	}
	if err := w.Write(t.Context(), filepath.Join(dir, "missing"), "1"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v: want the kernel's own words", err)
	}
	// A pipe without a reader blocks its writer.
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := w.Write(ctx, pipe, "1"); code(err) != "vfio.stuck" {
		t.Errorf("a write that hangs: %v", err)
	}
}
