// Package host says what a machine has of AMD SEV-SNP, and why not more. It
// owns the facts of the host side (CPUID, MSRs, RMP, ASIDs, IOMMU, kernel
// command line, module parameters, firmware) and the conclusions drawn from
// them.
//
// Facts are read below a root by a Reader and judged by the pure function
// Judge; neither changes anything, and nothing here imports the agent. What
// could not be read is unknown, is said in words, and never counts as good.
//
// CPUID is read through /dev/cpu/0/cpuid instead of the instruction: a
// library (klauspost/cpuid) would give half of the leaf, nothing of leaf
// 0x80000025, and this machine's values in every test. A Reader may be used by
// one goroutine at a time.
package host

import (
	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

// Facts is what was read. A nil or empty member was not there or could not be
// read; Unread says why.
type Facts struct {
	CPU CPU `json:"cpu"`
	// Encryption is CPUID leaf 0x8000001F, RMPSegments leaf 0x80000025.
	Encryption  *EncryptionLeaf  `json:"encryption,omitempty"`
	RMPSegments *RMPSegmentsLeaf `json:"rmp_segments,omitempty"`
	MSRs        *MSRs            `json:"msrs,omitempty"`
	// MemoryEnd is the address behind the last byte of system RAM.
	MemoryEnd uint64 `json:"memory_end,omitempty"`

	Kernel  Kernel  `json:"kernel"`
	UEFI    bool    `json:"uefi"`
	IOMMU   IOMMU   `json:"iommu"`
	Modules Modules `json:"modules"`
	KVM     *KVM    `json:"kvm,omitempty"`
	// ASIDUse is what KVM charges, from the cgroup controller "misc".
	ASIDUse *ASIDUse `json:"asid_use,omitempty"`

	SEVDevice bool `json:"sev_device"`
	// SEVFirmware is the answer to PLATFORM_STATUS, SNPFirmware the one to
	// SNP_PLATFORM_STATUS. The latter is asked only where KVM has SNP on:
	// some kernels would start the firmware for it and stop it again.
	SEVFirmware *psp.PlatformStatus `json:"sev_firmware,omitempty"`
	SNPFirmware *psp.SNPStatus      `json:"snp_firmware,omitempty"`
	ChipIDs     []string            `json:"chip_ids,omitempty"`

	Unread []Unread `json:"unread,omitempty"`
}

// Unread is a source that could not be read.
type Unread struct {
	Source string `json:"source"`
	Why    string `json:"why"`
	Remedy string `json:"remedy"`
}

// CPU is the first processor of /proc/cpuinfo.
type CPU struct {
	Vendor    string `json:"vendor"`
	Brand     string `json:"brand"`
	Family    uint8  `json:"family"`
	Model     uint8  `json:"model"`
	Stepping  uint8  `json:"stepping"`
	Microcode string `json:"microcode,omitempty"`
	// Hypervisor: this machine is itself a guest.
	Hypervisor bool `json:"hypervisor"`
	// Flags are the kernel's of SEV: sme, sev, sev_es, sev_snp, as present.
	Flags []string `json:"flags,omitempty"`
	SMT   bool     `json:"smt"`
}

// Kernel is the running kernel.
type Kernel struct {
	Release string `json:"release"`
	// Parameters are those of its command line that can matter to SNP.
	Parameters []string `json:"parameters,omitempty"`
	// Config holds the interesting lines of its configuration, if the
	// distribution ships one in /boot.
	Config map[string]string `json:"config,omitempty"`
}

// IOMMU is what the kernel made of the IOMMUs.
type IOMMU struct {
	// Features are the extended features of each AMD IOMMU, in hex.
	Features []string `json:"features,omitempty"`
	Groups   int      `json:"groups"`
	// Types counts groups by the type of their default domain.
	Types map[string]int `json:"types,omitempty"`
}

// Modules holds parameters of kvm_amd and kvm, as the kernel prints them.
type Modules struct {
	KVMAMD map[string]string `json:"kvm_amd,omitempty"`
	KVM    map[string]string `json:"kvm,omitempty"`
}

// KVM is what /dev/kvm answers.
type KVM struct {
	// VMTypes is KVM_CAP_VM_TYPES; bit 4 is KVM_X86_SNP_VM.
	VMTypes uint32 `json:"vm_types"`
}

// SNP says whether KVM can start SNP guests.
func (k KVM) SNP() bool { return k.VMTypes&(1<<vmTypeSNP) != 0 }

// ASIDUse is the part of the misc controller about SEV-ES and SNP, which
// share their ASIDs.
type ASIDUse struct {
	Capacity uint32 `json:"capacity"`
	Current  uint32 `json:"current"`
}
