package main

import (
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"

	"github.com/confidential-node/agent/firmware/contract"
)

// system is NVML with the rules that matter: nothing before Init, a report
// needs a nonce and echoes it, ready is for once.
type system struct {
	mock.Interface
	up    bool
	ready uint32
}

func newSystem(settings nvml.SystemConfComputeSettings, devices ...nvml.Device) *system {
	s := &system{}
	s.InitFunc = func() nvml.Return { s.up = true; return nvml.SUCCESS }
	s.DeviceGetCountFunc = func() (int, nvml.Return) {
		if !s.up {
			return 0, nvml.ERROR_UNINITIALIZED
		}
		return len(devices), nvml.SUCCESS
	}
	s.DeviceGetHandleByIndexFunc = func(i int) (nvml.Device, nvml.Return) { return devices[i], nvml.SUCCESS }
	s.SystemGetConfComputeSettingsFunc = func() (nvml.SystemConfComputeSettings, nvml.Return) { return settings, nvml.SUCCESS }
	s.SystemGetConfComputeGpusReadyStateFunc = func() (uint32, nvml.Return) { return s.ready, nvml.SUCCESS }
	s.SystemSetConfComputeGpusReadyStateFunc = func(v uint32) nvml.Return {
		if s.ready != 0 {
			return nvml.ERROR_INVALID_STATE
		}
		s.ready = v
		return nvml.SUCCESS
	}
	return s
}

func device(bus uint32, architecture nvml.DeviceArchitecture, text string) *mock.Device {
	awake := false
	return &mock.Device{
		GetPciInfoFunc:         func() (nvml.PciInfo, nvml.Return) { return nvml.PciInfo{Bus: bus}, nvml.SUCCESS },
		SetPersistenceModeFunc: func(nvml.EnableState) nvml.Return { awake = true; return nvml.SUCCESS },
		GetArchitectureFunc:    func() (nvml.DeviceArchitecture, nvml.Return) { return architecture, nvml.SUCCESS },
		GetConfComputeGpuCertificateFunc: func() (c nvml.ConfComputeGpuCertificate, _ nvml.Return) {
			c.AttestationCertChainSize = uint32(copy(c.AttestationCertChain[:], "chain of "+text))
			return c, nvml.SUCCESS
		},
		GetConfComputeGpuAttestationReportFunc: func(r *nvml.ConfComputeGpuAttestationReport) nvml.Return {
			if !awake {
				return nvml.ERROR_NOT_READY
			}
			r.AttestationReportSize = uint32(copy(r.AttestationReport[:], text) + copy(r.AttestationReport[len(text):], r.Nonce[:]))
			return nvml.SUCCESS
		},
	}
}

func TestTheDriversEvidenceIsInTheOrderOfTheBus(t *testing.T) {
	t.Parallel()
	lib := newSystem(nvml.SystemConfComputeSettings{CcFeature: 1}, device(9, nvml.DEVICE_ARCH_BLACKWELL, "late"), device(3, nvml.DEVICE_ARCH_HOPPER, "early"))
	d, err := open(lib)
	if err != nil {
		t.Fatal(err)
	}
	nonce := [contract.GPUNonceBytes]byte{1, 2, 3}
	gpus, err := d.Evidence(nonce)
	if err != nil || len(gpus) != 2 {
		t.Fatal(gpus, err)
	}
	want := "early" + string(nonce[:])
	if gpus[0].Arch != contract.ArchHopper || gpus[1].Arch != contract.ArchBlackwell || string(gpus[0].Report) != want || string(gpus[0].Certificates) != "chain of early" {
		t.Errorf("%+v", gpus)
	}
	if _, err := contract.EncodeGPUEvidence(gpus); err != nil {
		t.Error(err)
	}
}

func TestTheStateIsWhatTheDriverSays(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		settings     nvml.SystemConfComputeSettings
		cc, devtools bool
	}{
		{nvml.SystemConfComputeSettings{}, false, false},
		{nvml.SystemConfComputeSettings{CcFeature: nvml.CC_SYSTEM_FEATURE_ENABLED}, true, false},
		{nvml.SystemConfComputeSettings{CcFeature: nvml.CC_SYSTEM_FEATURE_ENABLED, DevToolsMode: nvml.CC_SYSTEM_DEVTOOLS_MODE_ON}, true, true},
		{nvml.SystemConfComputeSettings{MultiGpuMode: nvml.CC_SYSTEM_MULTIGPU_PROTECTED_PCIE}, true, false},
	} {
		d, err := open(newSystem(c.settings, device(1, nvml.DEVICE_ARCH_HOPPER, "x")))
		if err != nil {
			t.Fatal(err)
		}
		s, err := d.State()
		if err != nil || s.GPUs != 1 || s.ConfidentialComputing != c.cc || s.Devtools != c.devtools || s.Ready {
			t.Errorf("%+v: %+v, %v", c.settings, s, err)
		}
		if err := d.Ready(); err != nil {
			t.Error(err)
		}
		if s, err := d.State(); err != nil || !s.Ready {
			t.Errorf("after Ready %+v, %v", s, err)
		}
		if err := d.Ready(); err == nil {
			t.Error("made ready twice")
		}
	}
}

func TestWhatNVMLRefusesIsAnError(t *testing.T) {
	t.Parallel()
	fine := nvml.SystemConfComputeSettings{CcFeature: 1}
	lib := newSystem(fine)
	lib.InitFunc = func() nvml.Return { return nvml.ERROR_LIBRARY_NOT_FOUND }
	if _, err := open(lib); err == nil {
		t.Error("no library, no error")
	}
	for name, change := range map[string]func(*mock.Device){
		"no address": func(d *mock.Device) {
			d.GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) { return nvml.PciInfo{}, nvml.ERROR_GPU_IS_LOST }
		},
		"falls asleep": func(d *mock.Device) {
			d.SetPersistenceModeFunc = func(nvml.EnableState) nvml.Return { return nvml.ERROR_NOT_SUPPORTED }
		},
		"other": func(d *mock.Device) {
			d.GetArchitectureFunc = func() (nvml.DeviceArchitecture, nvml.Return) { return nvml.DEVICE_ARCH_AMPERE, nvml.SUCCESS }
		},
		"no certificate": func(d *mock.Device) {
			d.GetConfComputeGpuCertificateFunc = func() (c nvml.ConfComputeGpuCertificate, _ nvml.Return) { return c, nvml.SUCCESS }
		},
		"huge": func(d *mock.Device) {
			d.GetConfComputeGpuAttestationReportFunc = func(r *nvml.ConfComputeGpuAttestationReport) nvml.Return {
				r.AttestationReportSize = 1 << 20
				return nvml.SUCCESS
			}
		},
		"no report": func(d *mock.Device) {
			d.GetConfComputeGpuAttestationReportFunc = func(*nvml.ConfComputeGpuAttestationReport) nvml.Return { return nvml.ERROR_UNKNOWN }
		},
	} {
		gpu := device(1, nvml.DEVICE_ARCH_HOPPER, "x")
		change(gpu)
		d, err := open(newSystem(fine, gpu))
		if err == nil {
			_, err = d.Evidence([contract.GPUNonceBytes]byte{})
		}
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
