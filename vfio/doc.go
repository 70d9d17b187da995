// Package vfio owns PCI functions as the kernel shows them: what they are, who
// drives them, with whom they share an IOMMU group, binding them to vfio-pci
// and giving them back, and touching their registers while nobody else does.
//
//	Functions, Groups ─▶ Plan (what was before) ─▶ caller's disk ─▶ Bind ─▶ Open
//	                                                     └────────▶ GiveBack
//
// Plan changes nothing and returns what GiveBack needs; the caller stores it
// before it calls Bind. Bind and GiveBack may be repeated after a death in
// their middle. A function somebody holds is refused before anything is
// written, because the kernel would wait for the holder, for ever if need be;
// each write runs under a deadline in a process of its own (Writer), and one
// that does not end is vfio.stuck.
//
// Nothing here knows about NVIDIA's products. Reading goes through real files
// below Host's roots; vfiotest builds such a tree and plays the kernel's part.
package vfio
