package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/vfio"
)

// kernelsBus is the real PCI bus. Writes that may hang go through this program.
func kernelsBus() vfio.Host {
	return vfio.Host{Sysfs: "/sys", Dev: "/dev", Proc: "/proc", Writer: vfio.Disposable{Command: []string{"/proc/self/exe", "write"}, Limit: 90 * time.Second}}
}

// withDevice opens a device that is bound to vfio-pci, through VFIO, or one
// that is nobody's, through sysfs.
func withDevice(address string, through string, do func(*ccmode.Device) error) (err error) {
	a, err := vfio.ParseAddress(address)
	if err != nil {
		return err
	}
	host := kernelsBus()
	f, err := host.Function(a)
	if err != nil {
		return err
	}
	chip, err := ccmode.ChipOf(f.Vendor, f.Device)
	if err != nil {
		return err
	}
	var path interface {
		ccmode.Function
		io.Closer
	}
	switch through {
	case "vfio":
		path, err = host.Open(vfio.Kernel{}, a)
	case "sysfs":
		path, err = host.OpenRegisters(a)
	default:
		err = fmt.Errorf("a device is reached through vfio or sysfs, not %q", through)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, path.Close()) }()
	return do(ccmode.New(address, chip, path))
}

// setMode brings a device into a mode; with "query" it only reads.
func setMode(ctx context.Context, through, address, mode string, out io.Writer) error {
	return withDevice(address, through, func(d *ccmode.Device) error {
		if mode != "query" {
			m, err := ccmode.ParseMode(mode)
			if err != nil {
				return err
			}
			if _, err := ccmode.Apply(ctx, m, d); err != nil {
				return err
			}
		}
		status, err := d.Query(ctx)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(out, status.Active.Mode)
		return err
	})
}

// hold keeps a device open until ctx ends, as a guest does.
func hold(ctx context.Context, address string, out io.Writer) error {
	return withDevice(address, "vfio", func(*ccmode.Device) error {
		if _, err := fmt.Fprintln(out, "held"); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	})
}

// guestInit is the first process of a guest in the guest: it tells what PCI
// devices it has and ends the machine.
func guestInit(out io.Writer) error {
	if err := mountSysfs(); err != nil {
		return err
	}
	devices, err := filepath.Glob("/sys/bus/pci/devices/*")
	if err != nil {
		return err
	}
	for _, d := range devices {
		var ids [3]string
		for i, name := range []string{"vendor", "device", "class"} {
			text, err := os.ReadFile(filepath.Join(d, name))
			if err != nil {
				return err
			}
			ids[i] = string(text[:len(text)-1])
		}
		fmt.Fprintf(out, "guest sees %s %s class %s\n", ids[0], ids[1], ids[2])
	}
	return powerOff()
}
