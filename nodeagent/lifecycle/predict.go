package lifecycle

import (
	"github.com/confidential-node/agent/firmware/catalogue"
	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/firmware/ovmf"
)

// Boot is what a launch digest covers: the very files QEMU will load.
type Boot struct {
	// Firmware is the path of the copy.
	Firmware       string
	Kernel, Initrd [32]byte
	Cmdline        string
	VCPUs          int
	CPUModel       string
	GuestFeatures  uint64
}

// Measured is a prediction.
type Measured struct {
	Digest [measure.Size]byte
	// HashTable lies at HashTableGPA in the guest's memory.
	HashTable    []byte
	HashTableGPA uint64
}

// Predict computes what the silicon will measure.
func Predict(b Boot) (Measured, error) {
	image, err := catalogue.Read(b.Firmware)
	if err != nil {
		return Measured{}, err
	}
	parsed, err := ovmf.RequireAmdSev(image)
	if err != nil {
		return Measured{}, err
	}
	digest, err := measure.Digest(measure.Input{
		Firmware: image, Kernel: &measure.KernelDigests{Kernel: b.Kernel, Initrd: b.Initrd, Cmdline: b.Cmdline},
		VCPUs: b.VCPUs, CPUModel: b.CPUModel, GuestFeatures: b.GuestFeatures,
	})
	if err != nil {
		return Measured{}, err
	}
	table := measure.HashTable(b.Kernel, b.Initrd, b.Cmdline)
	return Measured{Digest: digest, HashTable: table[:], HashTableGPA: uint64(parsed.HashTable.Base)}, nil
}
