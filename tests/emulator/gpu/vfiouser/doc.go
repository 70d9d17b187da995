// Package vfiouser serves a PCI function over the vfio-user protocol
// (QEMU, docs/interop/vfio-user.rst, version 0.0), so that a virtual machine
// sees it as one of its devices. It does what a device without DMA,
// interrupts and mapped regions needs: information, regions, reset. DMA
// mappings are accepted and forgotten. Whatever it does not know is answered
// with an error, and what is malformed ends the connection.
package vfiouser

// Regions and interrupts of a PCI function, linux/vfio.h
// VFIO_PCI_*_REGION_INDEX and VFIO_PCI_*_IRQ_INDEX.
const (
	RegionConfig = 7
	Regions      = 9
	irqs         = 5
)

// Device is the function behind the socket. Its methods are called one at a
// time for each connection.
type Device interface {
	// Region returns a region's size in bytes, 0 when there is none.
	Region(index int) uint64
	// Read fills p from a region. It is called inside the region only.
	Read(index int, offset uint64, p []byte) error
	// Write writes p to a region.
	Write(index int, offset uint64, p []byte) error
	// Reset is the bus's: cold start, secondary bus reset, a new machine.
	Reset() error
}
