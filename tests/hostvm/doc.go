// Command hostvm is a provider's host in a virtual machine: a Debian with
// systemd, a real kernel with a (software) IOMMU, libvirt and the agent's own
// unit, and emulated GPUs on its PCI Express ports. `make test-rig` runs it:
//
//	hostvm run --image DIR --programs DIR [--match REGEXP] [--keep]
//
// It boots the image, goes through what a GPU can meet on a host, and ends with
// a table of what ran. Nothing of it needs KVM, a GPU or a kernel module of the
// machine it runs on. Inside the machine the same program carries out orders
// (hostvm inside), switches modes by the agent's own packages (hostvm mode),
// and is the init of a guest in the guest (hostvm guest).
package main
