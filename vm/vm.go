// Package vm is a guest as libvirt sees it: the specification of a domain, its
// observed state and its events, as plain values. Rendering a specification to
// domain XML is in domain, talking to libvirtd in libvirt; what runs inside
// the guest is in guest. This package does no I/O.
//
//	spec ──domain.Render──▶ XML ──libvirt.Start──▶ running ──▶ stopped
//	                                                 │ agent restarts:
//	                                                 └ List finds it again by its metadata
package vm

import "time"

// Spec is everything a domain is made of. Paths are on the host and readable
// by QEMU's user.
type Spec struct {
	// GuestID is a lower-case UUID; it is also the domain's UUID and, with
	// NamePrefix, its name.
	GuestID    string
	Generation uint64
	// VCPUs, 1 to 512, all present at start: each one is measured.
	VCPUs     int
	MemoryMiB uint64
	// CPUModel is a named QEMU model; "host" would make the launch digest
	// depend on the chip's stepping and is refused.
	CPUModel string
	// Firmware is loaded as a ROM; Kernel and Initrd are booted directly.
	Firmware, Kernel, Initrd string
	Cmdline                  string
	// Disks are read-only and raw, at most 16.
	Disks []Disk
	NIC   NIC
	TEE   TEE
	// Devices are passed through, in this order: GPUs first, then NVSwitches.
	// They come with the guest and leave with it; there is no hotplug.
	Devices []PCIDevice
	// IOMMUFD attaches them through iommufd (floor.Attach decides), else type1.
	IOMMUFD bool
	// CPUs are those of the host that its vCPUs may run on; none leaves it to
	// the kernel.
	CPUs []int
	// ConsoleLog receives the serial console of a debug image; "" gives the
	// guest none.
	ConsoleLog string
}

// NamePrefix starts the name of every domain of ours.
const NamePrefix = "nodeagent-"

// Disk is one sealed input.
type Disk struct {
	Path string
	// Serial has at most 20 characters: virtio-blk cuts there.
	Serial string
}

// Kind of a device that is passed through.
type Kind string

// Kinds.
const (
	KindGPU      Kind = "gpu"
	KindNVSwitch Kind = "nvswitch"
)

// PCIDevice is a function that is passed through, bound to vfio-pci already.
type PCIDevice struct {
	// Address is DDDD:BB:SS.F in lower-case hex.
	Address string
	Kind    Kind
	// BARs are the sizes in bytes of its memory BARs.
	BARs []uint64
	// IOMMUGroup of the device: no other function of it may stay outside.
	IOMMUGroup int
}

// NIC is the guest's only network interface, on a tap that exists already.
type NIC struct{ Tap, MAC string }

// TEE is exactly one of its fields.
type TEE struct {
	SNP      *SNP
	Emulated *Emulated
}

// SNP starts the guest under SEV-SNP.
type SNP struct {
	// Policy is the guest policy (AMD 56860); bit 17 must be set.
	Policy uint64
	// HostData is 32 bytes.
	HostData []byte
	// IDBlock (96 bytes) and IDAuth (4096 bytes), as their publisher signed
	// them: both or neither.
	IDBlock, IDAuth []byte
}

// Emulated starts the guest under software emulation, with a process that
// plays the PSP. Builds with the tag "emulated" only.
type Emulated struct {
	Policy   uint64
	HostData []byte
	// HashTable is a file with the kernel hashes table, loaded at
	// HashTableGPA, as QEMU itself does under SNP.
	HashTable    string
	HashTableGPA uint64
	// PSPSocket is where the PSP's process listens.
	PSPSocket string
}

// State of a domain.
type State string

// States.
const (
	StateRunning State = "running"
	StatePaused  State = "paused"
	StateGone    State = "gone"
	StateCrashed State = "crashed"
	StateOther   State = "other"
)

// Cause of a domain's end.
type Cause string

// Causes.
const (
	// CauseDied: its QEMU ended without having been told to.
	CauseDied Cause = "died"
	// CauseDestroyed: somebody had libvirt end it.
	CauseDestroyed Cause = "destroyed"
)

// Observed is one domain of ours as libvirt lists it.
type Observed struct {
	GuestID string
	// Generation is 0 when the domain has our name but no mark of ours that
	// can be read: it is reported, and nothing ever ends it but an operator.
	Generation uint64
	State      State
	// VCPUs and MemoryMiB are what it takes of the host.
	VCPUs     int
	MemoryMiB uint64
}

// Event is a change of a domain of ours.
type Event struct {
	// GuestID is empty when events may have been missed, because the
	// connection was new or the reader slow: list to know where things are.
	GuestID string
	// State after the change.
	State State
	// Cause of an end that was not the guest's own; empty when it was, or
	// nobody knows.
	Cause Cause
	// Reason is libvirt's word for it, for people.
	Reason string
	At     time.Time
}
