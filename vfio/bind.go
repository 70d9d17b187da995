package vfio

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// driver is the one driver functions are bound to. Variants exist only for
// devices with a Grace CPU, which cannot be rented out.
const driver = "vfio-pci"

// Bound tells whether the function is on vfio-pci.
func (f Function) Bound() bool { return f.Driver == driver }

// Binding is what a function was before it was bound, for giving it back.
type Binding struct {
	Address Address `json:"address"`
	// Vendor and Device tell after a restart whether it is still the same device.
	Vendor uint16 `json:"vendor"`
	Device uint16 `json:"device"`
	// Driver is empty when the function had none.
	Driver   string `json:"driver,omitempty"`
	Override string `json:"driver_override,omitempty"`
	// PowerControl is the runtime power policy, "on" or "auto".
	PowerControl string `json:"power_control,omitempty"`
	// D3ColdAllowed is "1" or "0"; empty where it is not known.
	D3ColdAllowed string `json:"d3cold_allowed,omitempty"`
}

// Plan returns what Bind will have to undo, and changes nothing. Store it
// before Bind. It refuses a function in use (vfio.in-use) and a kernel without
// the driver (vfio.no-driver). A function that is on vfio-pci already is given
// back to nobody: its binding is the operator's.
func (h Host) Plan(a Address) (Binding, error) {
	f, err := h.Function(a)
	if err != nil {
		return Binding{}, err
	}
	if err := h.inUse(f); err != nil {
		return Binding{}, err
	}
	if err := h.hasDriver(driver, "load it: modprobe vfio-pci"); err != nil {
		return Binding{}, err
	}
	power, err := readAttribute(h.path(a, "power/control"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Binding{}, err
	}
	d3cold, err := readAttribute(h.path(a, "d3cold_allowed"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Binding{}, err
	}
	return Binding{
		Address: a, Vendor: f.Vendor, Device: f.Device, Driver: f.Driver, Override: f.Override, PowerControl: power, D3ColdAllowed: d3cold,
	}, nil
}

func (h Host) hasDriver(name, remedy string) error {
	if _, err := os.Stat(filepath.Join(h.Sysfs, "bus/pci/drivers", name)); err != nil {
		return contract.Refuse("vfio.no-driver", remedy, "the kernel has no driver %s loaded", name).Because(err)
	}
	return nil
}

// same refuses a device that is not the one the binding speaks of.
func (h Host) same(b Binding) (Function, error) {
	f, err := h.Function(b.Address)
	if err == nil && (f.Vendor != b.Vendor || f.Device != b.Device) {
		err = contract.Refuse("vfio.device-changed", "release the old device from the node's configuration, then manage the new one",
			"%s was %04x:%04x and is %04x:%04x now", b.Address, b.Vendor, b.Device, f.Vendor, f.Device)
	}
	return f, err
}

// Bind hands the function to vfio-pci and keeps it awake. It may be called
// again after any interruption. driver_override is set before the old driver
// lets go, so that no other can step in between; new_id is not used, since it
// would match every device of the kind.
//
// Errors: vfio.no-device, vfio.device-changed, vfio.in-use, vfio.no-driver,
// vfio.stuck, vfio.wrong-driver.
func (h Host) Bind(ctx context.Context, b Binding) error {
	f, err := h.same(b)
	if err != nil {
		return err
	}
	if f.Driver != driver {
		if err := h.inUse(f); err != nil {
			return err
		}
		if err := h.hasDriver(driver, "load it: modprobe vfio-pci"); err != nil {
			return err
		}
		if err := h.Writer.Write(ctx, h.path(b.Address, "driver_override"), driver+"\n"); err != nil {
			return err
		}
		if err := h.release(ctx, f); err != nil {
			return err
		}
		if err := h.Writer.Write(ctx, filepath.Join(h.Sysfs, "bus/pci/drivers_probe"), string(f.Address)+"\n"); err != nil {
			return err
		}
		if f, err = h.Function(b.Address); err != nil {
			return err
		}
		if f.Driver != driver {
			return contract.Refuse("vfio.wrong-driver", "block that driver with modprobe.d, or look at the kernel log why vfio-pci refused",
				"%s should be on %s and is on %s", b.Address, driver, orNone(f.Driver))
		}
	}
	return h.keepAwake(ctx, f)
}

func orNone(name string) string {
	if name == "" {
		return "no driver"
	}
	return name
}

// release takes the function from its driver, if it has one.
func (h Host) release(ctx context.Context, f Function) error {
	if f.Driver == "" {
		return nil
	}
	return h.Writer.Write(ctx, h.path(f.Address, "driver/unbind"), string(f.Address)+"\n")
}

// keepAwake keeps the function and its port in D0. An idle one goes to D3hot,
// later D3cold, from where some GPUs do not come back. With "on" vfio-pci's own
// idle D3 is off too, for these devices alone; its parameter disable_idle_d3
// would be for all of the host's.
func (h Host) keepAwake(ctx context.Context, f Function) error {
	for _, set := range []struct {
		address     Address
		name, value string
	}{
		{f.Bridge, "power/control", "on"}, {f.Address, "power/control", "on"}, {f.Address, "d3cold_allowed", "0"},
	} {
		path := h.path(set.address, set.name)
		if _, err := os.Stat(path); set.address == "" || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := h.Writer.Write(ctx, path, set.value+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// GiveBack returns the function to what it was before Bind. It may be called
// again after any interruption. Errors are those of Bind; vfio.no-driver names
// the old driver when it is no longer loaded, the function then has none.
func (h Host) GiveBack(ctx context.Context, b Binding) error {
	f, err := h.same(b)
	if err != nil {
		return err
	}
	if f.Driver == b.Driver && f.Override == b.Override {
		return h.restorePower(ctx, b)
	}
	if err := h.inUse(f); err != nil {
		return err
	}
	if err := h.Writer.Write(ctx, h.path(b.Address, "driver_override"), b.Override+"\n"); err != nil {
		return err
	}
	if f.Driver != b.Driver {
		if err := h.release(ctx, f); err != nil {
			return err
		}
	}
	if f.Driver != b.Driver && b.Driver != "" {
		if err := h.hasDriver(b.Driver, "load it and bind the device by hand, or leave it without a driver"); err != nil {
			return err
		}
		if err := h.Writer.Write(ctx, filepath.Join(h.Sysfs, "bus/pci/drivers", b.Driver, "bind"), string(b.Address)+"\n"); err != nil {
			return err
		}
	}
	return h.restorePower(ctx, b)
}

// restorePower leaves the port awake: other functions may be below it.
func (h Host) restorePower(ctx context.Context, b Binding) error {
	for _, was := range []struct{ name, value string }{{"d3cold_allowed", b.D3ColdAllowed}, {"power/control", b.PowerControl}} {
		if was.value == "" {
			continue
		}
		if err := h.Writer.Write(ctx, h.path(b.Address, was.name), was.value+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// ResetFunction resets the function by the kernel's method, "" for its own
// choice: "flr", or "bus" where that leaves too much behind. The choice is put
// back afterwards. vfio.no-reset when the kernel offers no such method.
func (h Host) ResetFunction(ctx context.Context, a Address, method string) error {
	f, err := h.Function(a)
	if err != nil {
		return err
	}
	offered := f.ResetMethods
	if len(offered) == 0 || (method != "" && !slices.Contains(offered, method)) {
		return contract.Refuse("vfio.no-reset", "power the host off and on instead", "%s cannot be reset by %q, the kernel offers %q", a, method, offered)
	}
	if method != "" && (len(offered) > 1 || offered[0] != method) {
		if err := h.Writer.Write(ctx, h.path(a, "reset_method"), method+"\n"); err != nil {
			return err
		}
		defer func() {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			_ = h.Writer.Write(undo, h.path(a, "reset_method"), strings.Join(offered, " ")+"\n")
		}()
	}
	return h.Writer.Write(ctx, h.path(a, "reset"), "1\n")
}
