// Package nvidia asks NVIDIA's driver, through NVML, what it knows of the GPUs
// it drives: facts for a host's qualification before a device is taken from
// that driver. It changes nothing, decides nothing, and is not needed: a host
// without driver or library is ErrAbsent, the usual state of a host that rents
// GPUs out.
//
// The library is loaded when Read is called and let go before it returns: a
// process that keeps it open holds every GPU, and none could be taken from the
// driver. Read may be called from one goroutine at a time.
package nvidia

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/confidential-node/agent/vfio"
)

// ErrAbsent means that there is no library, or no driver behind it.
var ErrAbsent = errors.New("the nvidia driver is not there")

// Library is what is asked of NVML; nvml.New() is one.
type Library interface {
	Init() nvml.Return
	Shutdown() nvml.Return
	SystemGetDriverVersion() (string, nvml.Return)
	DeviceGetCount() (int, nvml.Return)
	DeviceGetHandleByIndex(index int) (nvml.Device, nvml.Return)
	EventSetCreate() (nvml.EventSet, nvml.Return)
}

// Report is what the driver knows.
type Report struct {
	Driver string `json:"driver"`
	GPUs   []GPU  `json:"gpus"`
}

// GPU is one device on the nvidia driver. A pointer is nil where the device
// or the driver does not tell.
type GPU struct {
	Address      vfio.Address  `json:"address"`
	Name         string        `json:"name,omitempty"`
	UUID         string        `json:"uuid,omitempty"`
	VBIOS        string        `json:"vbios,omitempty"`
	ECC          *bool         `json:"ecc,omitempty"`
	TemperatureC *uint32       `json:"temperature_c,omitempty"`
	Rows         *RemappedRows `json:"remapped_rows,omitempty"`
	// Xids are the driver's error numbers that came while it was watched.
	Xids []uint64 `json:"xids,omitempty"`
}

// RemappedRows are rows of memory that were replaced by spare ones.
type RemappedRows struct {
	Correctable   int `json:"correctable"`
	Uncorrectable int `json:"uncorrectable"`
	// Pending ones take effect at the next reset.
	Pending bool `json:"pending"`
	// Failed: no spare row was left.
	Failed bool `json:"failed"`
}

// Read asks the driver for all its GPUs, and watches for Xids that long. A GPU
// that does not answer is left out and named in the error; the others are
// there all the same.
func Read(lib Library, watch time.Duration) (r Report, err error) {
	switch ret := lib.Init(); {
	case ret == nvml.ERROR_LIBRARY_NOT_FOUND, ret == nvml.ERROR_DRIVER_NOT_LOADED:
		return r, fmt.Errorf("%w: %w", ErrAbsent, ret)
	case ret != nvml.SUCCESS:
		return r, failed("initialising NVML", ret)
	}
	defer func() { err = errors.Join(err, failed("letting NVML go", lib.Shutdown())) }()
	version, ret := lib.SystemGetDriverVersion()
	if ret == nvml.SUCCESS {
		r.Driver = version
	}
	count, ret := lib.DeviceGetCount()
	if ret != nvml.SUCCESS {
		return r, failed("counting GPUs", ret)
	}
	handles := map[vfio.Address]nvml.Device{}
	var errs []error
	for i := range count {
		device, ret := lib.DeviceGetHandleByIndex(i)
		if ret != nvml.SUCCESS {
			errs = append(errs, failed(fmt.Sprintf("opening GPU %d", i), ret))
			continue
		}
		g, err := read(device)
		if err != nil {
			errs = append(errs, fmt.Errorf("GPU %d: %w", i, err))
			continue
		}
		handles[g.Address] = device
		r.GPUs = append(r.GPUs, g)
	}
	slices.SortFunc(r.GPUs, func(a, b GPU) int { return cmp.Compare(a.Address, b.Address) })
	if watch > 0 && len(r.GPUs) > 0 {
		errs = append(errs, r.watchXids(lib, handles, watch))
	}
	return r, errors.Join(errs...)
}

// failed is nil for success.
func failed(doing string, ret nvml.Return) error {
	if ret == nvml.SUCCESS {
		return nil
	}
	return fmt.Errorf("%s: %w", doing, ret)
}

func read(device nvml.Device) (g GPU, err error) {
	pci, ret := device.GetPciInfo()
	if ret != nvml.SUCCESS {
		return g, failed("asking for its PCI address", ret)
	}
	if g.Address, err = vfio.ParseAddress(fmt.Sprintf("%04x:%02x:%02x.0", pci.Domain, pci.Bus, pci.Device)); err != nil {
		return g, err
	}
	text := func(ask func() (string, nvml.Return)) string {
		value, ret := ask()
		if ret != nvml.SUCCESS {
			return ""
		}
		return value
	}
	g.Name, g.UUID, g.VBIOS = text(device.GetName), text(device.GetUUID), text(device.GetVbiosVersion)
	if now, _, ret := device.GetEccMode(); ret == nvml.SUCCESS {
		on := now == nvml.FEATURE_ENABLED
		g.ECC = &on
	}
	if t, ret := device.GetTemperature(nvml.TEMPERATURE_GPU); ret == nvml.SUCCESS {
		g.TemperatureC = &t
	}
	if c, u, pending, failed, ret := device.GetRemappedRows(); ret == nvml.SUCCESS {
		g.Rows = &RemappedRows{c, u, pending, failed}
	}
	return g, nil
}

// maxXids bounds what a device in a loop of errors can say.
const maxXids = 64

// watchXids collects the driver's errors until the time is over. A driver
// that cannot tell them is no error.
func (r *Report) watchXids(lib Library, handles map[vfio.Address]nvml.Device, watch time.Duration) (err error) {
	set, ret := lib.EventSetCreate()
	if ret == nvml.ERROR_NOT_SUPPORTED {
		return nil
	}
	if ret != nvml.SUCCESS {
		return failed("watching for Xids", ret)
	}
	defer func() { err = errors.Join(err, failed("ending the watch for Xids", set.Free())) }()
	registered := false
	for _, device := range handles {
		registered = device.RegisterEvents(nvml.EventTypeXidCriticalError, set) == nvml.SUCCESS || registered
	}
	for end := time.Now().Add(watch); registered; {
		left := time.Until(end)
		if left <= 0 {
			return nil
		}
		event, ret := set.Wait(uint32(left.Milliseconds()) + 1)
		switch {
		case ret == nvml.ERROR_TIMEOUT:
			return nil
		case ret != nvml.SUCCESS:
			return failed("waiting for Xids", ret)
		}
		for i := range r.GPUs {
			if g := &r.GPUs[i]; handles[g.Address] == event.Device && event.EventType == nvml.EventTypeXidCriticalError && len(g.Xids) < maxXids {
				g.Xids = append(g.Xids, event.EventData)
			}
		}
	}
	return nil
}
