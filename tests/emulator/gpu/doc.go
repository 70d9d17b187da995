// Package gpu is an emulated NVIDIA GPU or NVSwitch as a PCI device of a
// virtual machine: the registers of gpu/gputest, with their faults, served
// over the vfio-user protocol. Its knobs outlive the process, as the real
// ones outlive power; everything else is gone with a reset. A second socket
// looks into the device and breaks it.
package gpu
