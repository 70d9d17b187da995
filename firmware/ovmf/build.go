package ovmf

import (
	"errors"
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
)

// Build is what an image was built as, as far as its tables tell.
type Build string

// Builds. Only BuildAmdSev starts a guest whose kernel is part of the launch
// digest.
const (
	BuildAmdSev    Build = "AmdSev"
	BuildX64       Build = "OvmfPkgX64" // or IntelTdx: SEV-SNP metadata, no kernel hashes
	BuildNoSNP     Build = "OVMF without SEV-SNP"
	BuildVariables Build = "UEFI variable store"
	BuildDamaged   Build = "damaged OVMF"
	BuildOther     Build = "no OVMF"
)

// Codes of refusals.
const (
	// CodeNotAmdSev: sound or not, it is another build.
	CodeNotAmdSev = "firmware.not-amdsev"
	// CodeDamaged: tables that contradict themselves.
	CodeDamaged = "firmware.damaged"
)

// The build that is wanted, and where it is found.
const remedyAmdSev = "use the AmdSev build of OVMF: Debian's package ovmf-amdsev, file /usr/share/ovmf/OVMF.amdsev.fd (tried with 2026.08+ds-2; " +
	"releases before forky lack it: download the .deb and unpack it with dpkg-deb -x, it need not be installed)"

// qemuUnit divides the size of every image that QEMU loads as a ROM.
const qemuUnit = 64 << 10

// Offsets and GUID of a UEFI firmware volume's header (UEFI PI, volume 3).
const (
	volumeGUID      = 0x10
	volumeSignature = 0x28
	guidVariables   = "fff12b8d-7696-4c8b-a985-2747075b4f50" // gEfiSystemNvDataFvGuid
)

// Describe tells what an image is. The firmware is nil unless its SEV-SNP
// metadata is whole; the refusal is nil when the image can boot guests.
func Describe(image []byte) (Build, *Firmware, *contract.Refusal) {
	f, err := Parse(image)
	footer := guidAt(image, len(image)-resetVectorSize-16) == guidFooter
	switch {
	case err == nil:
		return f.describe()
	case len(image) > MaxSize:
		return BuildOther, nil, refuse(BuildOther, fmt.Sprintf("it has more than %d bytes", MaxSize))
	case !footer && isVariableStore(image):
		return BuildVariables, nil, refuse(BuildVariables, "it holds settings and no code")
	case !footer:
		return BuildOther, nil, refuse(BuildOther, "it has no footer table")
	case errors.Is(err, ErrNotSEV):
		return BuildNoSNP, nil, refuse(BuildNoSNP, "it says nothing of the memory that SEV-SNP measures")
	}
	return BuildDamaged, nil, contract.Refuse(CodeDamaged, remedyAmdSev, "the firmware's tables are damaged").Because(err)
}

func (f *Firmware) describe() (Build, *Firmware, *contract.Refusal) {
	if f.SupportsKernelHashes() != nil {
		return BuildX64, f, refuse(BuildX64, "it boots any kernel: it has no place for kernel hashes")
	}
	// Without these a guest has neither a way to ask for a report nor a CPUID
	// table to believe.
	for _, want := range []SectionType{SectionSecrets, SectionCPUID} {
		count := 0
		for _, s := range f.Sections {
			if s.Type == want {
				count++
			}
		}
		if count != 1 {
			return BuildDamaged, f, contract.Refuse(CodeDamaged, remedyAmdSev, "the firmware has %d sections of type %s, want 1", count, want)
		}
	}
	if f.Size%qemuUnit != 0 {
		return BuildDamaged, f, contract.Refuse(CodeDamaged, remedyAmdSev, "the firmware has %d bytes, QEMU loads multiples of %d: it is cut off or code without its variable store", f.Size, qemuUnit)
	}
	return BuildAmdSev, f, nil
}

// RequireAmdSev parses an image that boots guests, and refuses every other by
// name with the remedy.
func RequireAmdSev(image []byte) (*Firmware, error) {
	_, f, refusal := Describe(image)
	if refusal != nil {
		return nil, refusal
	}
	return f, nil
}

func refuse(build Build, why string) *contract.Refusal {
	return contract.Refuse(CodeNotAmdSev, remedyAmdSev, "the firmware is %s: %s", build, why)
}

func isVariableStore(image []byte) bool {
	return len(image) >= volumeSignature+4 && string(image[volumeSignature:volumeSignature+4]) == "_FVH" && guidAt(image, volumeGUID) == guidVariables
}

// String is edk2's name (OvmfSevMetadata.asm).
func (t SectionType) String() string {
	switch t {
	case SectionSNPMemory:
		return "SNP_SEC_MEM"
	case SectionSecrets:
		return "SNP_SECRETS"
	case SectionCPUID:
		return "CPUID"
	case SectionSVSMCAA:
		return "SVSM_CAA"
	case SectionKernelHashes:
		return "SNP_KERNEL_HASHES"
	}
	return fmt.Sprintf("%#x", uint32(t))
}
