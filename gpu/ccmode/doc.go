// Package ccmode speaks with the boot processor (FSP) of NVIDIA's Hopper and
// Blackwell GPUs and of the third generation NVSwitch, and so reads, stages and
// activates their Confidential Computing modes. It needs no NVIDIA driver.
//
// A device has a staged mode, kept in knobs that survive power cycles, and an
// active mode, which the FSP took from the knobs at the last reset:
//
//	Apply: stage on every device ─▶ reset every device ─▶ wait ─▶ read back
//	            │ fails: knobs restored      │ fails: the caller quarantines
//
// Both modes are reported, and nothing is called active that was not read
// back after a reset. A value that cannot be decoded is an error, never "off".
//
// The package touches a device only through Function, so that the kernel's
// VFIO and sysfs files and an emulator look alike. Who calls it owns the
// device: no driver bound, no guest running. A Device is not safe for
// concurrent use; different Devices are independent.
//
// Registers, packets and orders are those of NVIDIA's public admin tools
// v2025.10.20 and open kernel modules 595.45.04. They are exercised here
// against an emulator of these registers. What only silicon can settle is said
// where it matters: error codes of a locked knob, whether the device id (PDI)
// can be read under CC, and how long each model needs to boot.
package ccmode
