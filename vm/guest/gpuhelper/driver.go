package main

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/gpu"
)

// library is what is asked of NVML; nvml.New() is one.
type library interface {
	Init() nvml.Return
	DeviceGetCount() (int, nvml.Return)
	DeviceGetHandleByIndex(index int) (nvml.Device, nvml.Return)
	SystemGetConfComputeSettings() (nvml.SystemConfComputeSettings, nvml.Return)
	SystemGetConfComputeGpusReadyState() (uint32, nvml.Return)
	SystemSetConfComputeGpusReadyState(isAcceptingWork uint32) nvml.Return
}

// driver is NVIDIA's, kept open.
type driver struct {
	lib     library
	devices []nvml.Device // in the order of their PCI addresses
}

func failed(what string, ret nvml.Return) error {
	if ret == nvml.SUCCESS {
		return nil
	}
	return fmt.Errorf("%s: NVML error %d", what, int(ret))
}

// open initialises the library, takes hold of every GPU and has the driver
// keep it awake.
func open(lib library) (*driver, error) {
	if err := failed("loading NVML", lib.Init()); err != nil {
		return nil, err
	}
	count, ret := lib.DeviceGetCount()
	if err := failed("counting", ret); err != nil {
		return nil, err
	}
	d := &driver{lib: lib}
	address := map[nvml.Device]string{}
	for i := range count {
		device, ret := lib.DeviceGetHandleByIndex(i)
		if err := failed(fmt.Sprintf("opening GPU %d", i), ret); err != nil {
			return nil, err
		}
		pci, ret := device.GetPciInfo()
		if err := failed(fmt.Sprintf("address of GPU %d", i), ret); err != nil {
			return nil, err
		}
		address[device] = fmt.Sprintf("%08x:%02x:%02x", pci.Domain, pci.Bus, pci.Device)
		if err := failed("keeping "+address[device]+" awake", device.SetPersistenceMode(nvml.FEATURE_ENABLED)); err != nil {
			return nil, err
		}
		d.devices = append(d.devices, device)
	}
	slices.SortFunc(d.devices, func(a, b nvml.Device) int { return cmp.Compare(address[a], address[b]) })
	return d, nil
}

// State implements gpu.Driver.
func (d *driver) State() (gpu.State, error) {
	settings, ret := d.lib.SystemGetConfComputeSettings()
	if err := failed("asking for the mode", ret); err != nil {
		return gpu.State{}, err
	}
	ready, ret := d.lib.SystemGetConfComputeGpusReadyState()
	if err := failed("asking for the ready state", ret); err != nil {
		return gpu.State{}, err
	}
	count, ret := d.lib.DeviceGetCount()
	if err := failed("counting", ret); err != nil {
		return gpu.State{}, err
	}
	return gpu.State{
		GPUs: count,
		// Under protected PCIe the feature is off and the multi-GPU mode says so.
		ConfidentialComputing: settings.CcFeature == nvml.CC_SYSTEM_FEATURE_ENABLED || settings.MultiGpuMode == nvml.CC_SYSTEM_MULTIGPU_PROTECTED_PCIE,
		Devtools:              settings.DevToolsMode != nvml.CC_SYSTEM_DEVTOOLS_MODE_OFF,
		Ready:                 ready != nvml.CC_ACCEPTING_CLIENT_REQUESTS_FALSE,
	}, nil
}

// Evidence implements gpu.Driver.
func (d *driver) Evidence(nonce [contract.GPUNonceBytes]byte) (out []contract.GPUEvidence, err error) {
	for i, device := range d.devices {
		g, err := evidence(device, nonce)
		if err != nil {
			return nil, fmt.Errorf("GPU %d: %w", i, err)
		}
		out = append(out, g)
	}
	return out, nil
}

func evidence(device nvml.Device, nonce [contract.GPUNonceBytes]byte) (g contract.GPUEvidence, err error) {
	architecture, ret := device.GetArchitecture()
	if err := failed("architecture", ret); err != nil {
		return g, err
	}
	name, ok := map[nvml.DeviceArchitecture]string{nvml.DEVICE_ARCH_HOPPER: contract.ArchHopper, nvml.DEVICE_ARCH_BLACKWELL: contract.ArchBlackwell}[architecture]
	if !ok {
		return g, fmt.Errorf("architecture %d cannot prove itself", architecture)
	}
	certificate, ret := device.GetConfComputeGpuCertificate()
	if err := failed("certificates", ret); err != nil {
		return g, err
	}
	report := nvml.ConfComputeGpuAttestationReport{Nonce: nonce}
	if err := failed("report", device.GetConfComputeGpuAttestationReport(&report)); err != nil {
		return g, err
	}
	chain, chainErr := part(certificate.AttestationCertChain[:], certificate.AttestationCertChainSize)
	transcript, reportErr := part(report.AttestationReport[:], report.AttestationReportSize)
	return contract.GPUEvidence{Arch: name, Nonce: hex.EncodeToString(nonce[:]), Report: transcript, Certificates: chain}, errors.Join(chainErr, reportErr)
}

func part(buffer []byte, size uint32) ([]byte, error) {
	if size == 0 || uint64(size) > uint64(len(buffer)) {
		return nil, fmt.Errorf("the driver says %d bytes of at most %d", size, len(buffer))
	}
	return slices.Clone(buffer[:size]), nil
}

// Ready implements gpu.Driver.
func (d *driver) Ready() error {
	return failed("setting the ready state", d.lib.SystemSetConfComputeGpusReadyState(nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE))
}
