// Package vfio will own PCI functions, IOMMU groups, binding to vfio-pci and
// giving back. There is no code in it yet: a node manages no GPU today, and
// nothing pretends otherwise.
package vfio
