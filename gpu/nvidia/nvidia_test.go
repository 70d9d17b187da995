package nvidia

import (
	"encoding/json"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
)

// board is go-nvml's DGX A100 with what its mock leaves out.
func board(t *testing.T) (*dgxa100.Server, *int) {
	t.Helper()
	s, open := dgxa100.New(), 0
	s.InitFunc = func() nvml.Return { open++; return nvml.SUCCESS }
	s.ShutdownFunc = func() nvml.Return { open--; return nvml.SUCCESS }
	for i := range s.Devices {
		d, ok := s.Devices[i].(*dgxa100.Device)
		if !ok {
			t.Fatalf("%T", s.Devices[i])
		}
		d.GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) {
			return nvml.PciInfo{Bus: uint32(0xc0 - i)}, nvml.SUCCESS
		}
		d.GetVbiosVersionFunc = func() (string, nvml.Return) { return "92.00.36.00.01", nvml.SUCCESS }
		d.GetEccModeFunc = func() (nvml.EnableState, nvml.EnableState, nvml.Return) {
			return nvml.FEATURE_ENABLED, nvml.FEATURE_DISABLED, nvml.SUCCESS
		}
		d.GetTemperatureFunc = func(nvml.TemperatureSensors) (uint32, nvml.Return) { return 31, nvml.SUCCESS }
		d.GetRemappedRowsFunc = func() (int, int, bool, bool, nvml.Return) { return 1, 2, true, false, nvml.SUCCESS }
		d.RegisterEventsFunc = func(uint64, nvml.EventSet) nvml.Return { return nvml.SUCCESS }
	}
	return s, &open
}

func dev(t *testing.T, s *dgxa100.Server, i int) *dgxa100.Device {
	t.Helper()
	d, ok := s.Devices[i].(*dgxa100.Device)
	if !ok {
		t.Fatalf("%T", s.Devices[i])
	}
	return d
}

func TestTheDriverTellsItsGPUs(t *testing.T) {
	s, open := board(t)
	var waits int
	s.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) {
		return &mock.EventSet{
			WaitFunc: func(uint32) (nvml.EventData, nvml.Return) {
				if waits++; waits > 2 {
					return nvml.EventData{}, nvml.ERROR_TIMEOUT
				}
				return nvml.EventData{Device: s.Devices[1], EventType: nvml.EventTypeXidCriticalError, EventData: 78 + uint64(waits)}, nvml.SUCCESS
			},
			FreeFunc: func() nvml.Return { return nvml.SUCCESS },
		}, nvml.SUCCESS
	}
	r, err := Read(s, time.Minute)
	if err != nil || len(r.GPUs) != 8 || r.Driver != s.DriverVersion || *open != 0 {
		t.Fatalf("%+v, %v, %d times left open", r, err, *open)
	}
	// In the order of addresses, which is not the driver's.
	g := r.GPUs[6]
	text, _ := json.Marshal(g)
	want := `{"address":"0000:bf:00.0","name":"Mock NVIDIA A100-SXM4-40GB","uuid":"` + dev(t, s, 1).UUID +
		`","vbios":"92.00.36.00.01","ecc":true,"temperature_c":31,"remapped_rows":{"correctable":1,"uncorrectable":2,"pending":true,"failed":false},"xids":[79,80]}`
	if string(text) != want {
		t.Errorf("got\n%s, want\n%s", text, want)
	}
	if len(r.GPUs[7].Xids) != 0 {
		t.Errorf("another GPU's Xids: %v", r.GPUs[7].Xids)
	}
}

func TestAbsenceIsANormalState(t *testing.T) {
	for _, ret := range []nvml.Return{nvml.ERROR_LIBRARY_NOT_FOUND, nvml.ERROR_DRIVER_NOT_LOADED} {
		s, _ := board(t)
		s.InitFunc = func() nvml.Return { return ret }
		s.ShutdownFunc = func() nvml.Return { t.Error("shut down, and never initialised"); return nvml.SUCCESS }
		if _, err := Read(s, 0); !errors.Is(err, ErrAbsent) {
			t.Errorf("%v: %v", ret, err)
		}
	}
	s, _ := board(t)
	s.InitFunc = func() nvml.Return { return nvml.ERROR_NO_PERMISSION }
	if _, err := Read(s, 0); err == nil || errors.Is(err, ErrAbsent) {
		t.Errorf("no permission is no absence: %v", err)
	}
	// The real library of a machine without the driver, or with one.
	if _, err := Read(nvml.New(), 0); err != nil && !errors.Is(err, ErrAbsent) {
		t.Logf("a driver that fails: %v", err)
	}
}

func TestWhatIsNotToldIsLeftOut(t *testing.T) {
	s, open := board(t)
	d := dev(t, s, 0)
	d.GetEccModeFunc = func() (nvml.EnableState, nvml.EnableState, nvml.Return) { return 0, 0, nvml.ERROR_NOT_SUPPORTED }
	d.GetTemperatureFunc = func(nvml.TemperatureSensors) (uint32, nvml.Return) { return 0, nvml.ERROR_GPU_IS_LOST }
	d.GetRemappedRowsFunc = func() (int, int, bool, bool, nvml.Return) { return 0, 0, false, false, nvml.ERROR_NOT_SUPPORTED }
	d.GetVbiosVersionFunc = func() (string, nvml.Return) { return "rubbish", nvml.ERROR_UNKNOWN }
	dev(t, s, 1).GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) { return nvml.PciInfo{}, nvml.ERROR_GPU_IS_LOST }
	s.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) { return nil, nvml.ERROR_NOT_SUPPORTED }
	r, err := Read(s, time.Second)
	if err == nil || len(r.GPUs) != 7 || *open != 0 {
		t.Fatalf("%d GPUs, %v", len(r.GPUs), err)
	}
	at := slices.IndexFunc(r.GPUs, func(g GPU) bool { return g.Address == "0000:c0:00.0" })
	if g := r.GPUs[at]; g.ECC != nil || g.TemperatureC != nil || g.Rows != nil || g.VBIOS != "" || g.Name == "" {
		t.Errorf("%+v", g)
	}
}
