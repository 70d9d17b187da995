package host

import (
	"fmt"
	"slices"
	"strings"
)

// cause is the level of rules that say why KVM offers no SNP.
const cause Level = "cause"

// rule finds nothing, or findings without their level.
type rule struct {
	level Level
	find  func(*Report) []Finding
}

// when is a rule of one finding.
func when(level Level, find func(*Report) *Finding) rule {
	return rule{level, func(r *Report) []Finding {
		if f := find(r); f != nil {
			return []Finding{*f}
		}
		return nil
	}}
}

// rules in the order in which an operator works through them: verdict,
// machine, BIOS, kernel, firmware, what verifiers think, notes.
func rules() []rule {
	return slices.Concat(
		[]rule{when(Blocking, verdict), {Unknown, unread}},
		[]rule{when(cause, virtualMachine), when(Blocking, notEligible), when(cause, noSNP)},
		[]rule{when(cause, encryptionOff), when(cause, noASIDs), when(cause, rmpMissing), when(cause, rmpSmall), when(cause, legacyBoot)},
		[]rule{when(cause, iommuOff), when(cause, iommuPassthrough), when(cause, iommuWithoutSNP)},
		[]rule{{cause, traps}, when(cause, oldKernel), when(cause, kernelWithoutSEV), when(cause, flagCleared), when(cause, notSwitchedOn)},
		[]rule{when(cause, moduleMissing), {cause, parametersOff}},
		[]rule{when(cause, noSEVDevice), when(cause, notInitialized), when(cause, firmwareBelow151)},
		[]rule{when(Blocking, chipKeyMasked), when(Blocking, chipIDMasked)},
		[]rule{when(Warning, milan), when(Warning, aliasCheck), when(Warning, firmwareBelow155), when(Warning, exhausted), when(Warning, unknownBits)},
		[]rule{when(Note, esOff), when(Note, heldBack), when(Note, vlek), when(Note, smt)},
	)
}

func verdict(r *Report) *Finding {
	if k := r.Facts.KVM; k != nil && !k.SNP() {
		return &Finding{
			Code:     "kvm.no-snp",
			Message:  "KVM offers no SEV-SNP guests",
			Observed: fmt.Sprintf("KVM_CAP_VM_TYPES = %#x, bit %d is clear", k.VMTypes, vmTypeSNP),
			Remedy:   "follow the other findings; when there are none, look for \"SEV\" and \"SNP\" in the kernel log",
		}
	}
	if r.Facts.KVM == nil {
		return &Finding{
			Code:    "kvm.unknown",
			Message: "KVM could not be asked whether it offers SEV-SNP guests",
			Remedy:  "make " + kvmDevice + " usable: see the finding about it",
		}
	}
	return nil
}

func unread(r *Report) []Finding {
	var out []Finding
	for _, u := range r.Facts.Unread {
		out = append(out, Finding{Code: "unread." + strings.ReplaceAll(u.Source, "/", "."), Message: u.Source + " could not be read, so nothing is known from it", Remedy: u.Remedy, Observed: u.Why})
	}
	return out
}

// bare says that rules about the machine itself make sense: inside a virtual
// machine everything is the outer hypervisor's.
func bare(r *Report) bool { return !r.Facts.CPU.Hypervisor }

// silicon says that the processor has SNP: by CPUID, or where that could not
// be read, by its name, since every processor with a name here has it.
func silicon(r *Report) bool {
	if r.Facts.Encryption == nil {
		return bare(r) && r.Processor != nil
	}
	return bare(r) && r.Facts.Encryption.SEVSNP
}

func virtualMachine(r *Report) *Finding {
	if bare(r) {
		return nil
	}
	return &Finding{
		Code:     "machine.virtual",
		Message:  "this machine is itself a virtual machine; SNP hosting needs bare metal",
		Observed: "CPUID 1 ECX bit 31 (cpuinfo flag \"hypervisor\") is set",
		Remedy:   "use a bare-metal server with EPYC 9004, 8004 (Genoa, Bergamo, Siena) or 9005 (Turin)",
	}
}

func notEligible(r *Report) *Finding {
	c := r.Facts.CPU
	if c.Vendor == "" || r.Processor != nil {
		return nil
	}
	return &Finding{
		Code: "processor.not-eligible", Message: fmt.Sprintf("the processor %q is none of those whose reports can be verified", c.Brand),
		Observed: fmt.Sprintf("%s family %#x model %#x stepping %d", c.Vendor, c.Family, c.Model, c.Stepping),
		Remedy:   "use a server with EPYC 9004, 8004 (Genoa, Bergamo, Siena) or 9005 (Turin); for a newer processor update the agent",
	}
}

func noSNP(r *Report) *Finding {
	if !bare(r) || r.Facts.Encryption == nil || r.Facts.Encryption.SEVSNP {
		return nil
	}
	return &Finding{
		Code: "processor.no-snp", Message: "the processor offers no SEV-SNP", Observed: "CPUID 0x8000001f " + r.Facts.Encryption.Raw,
		Remedy: "enable SVM Mode and SMEE in the BIOS; a processor that then still lacks it cannot host SNP",
	}
}

func encryptionOff(r *Report) *Finding {
	if m := r.Facts.MSRs; silicon(r) && m != nil && m.SYSCFG&syscfgMemoryEncryption == 0 {
		return &Finding{
			Code:     "bios.memory-encryption-off",
			Message:  "the BIOS left memory encryption off",
			Observed: fmt.Sprintf("SYSCFG = %#x, bit 23 is clear", m.SYSCFG),
			Remedy:   "in the BIOS set CBS > CPU Common > SMEE to Enabled",
		}
	}
	return nil
}

func noASIDs(r *Report) *Finding {
	if !silicon(r) || r.Facts.Encryption == nil || r.Facts.Encryption.MinSEVASID > 1 {
		return nil
	}
	return &Finding{
		Code: "bios.no-asids", Message: "the BIOS gives no ASIDs to SEV-ES and SNP guests", Observed: "CPUID 0x8000001f " + r.Facts.Encryption.Raw,
		Remedy: "in the BIOS set CBS > CPU Common > SEV-ES ASID Space Limit Control to Manual, and the limit to the number of guests plus one, for instance 100",
	}
}

const remedyCoverage = "in the BIOS set CBS > CPU Common > SNP Memory (RMP Table) Coverage to Enabled, for all memory, and reboot; a board without that item needs a BIOS update first"

func observedRMP(r *Report) string {
	m := r.Facts.MSRs
	text := fmt.Sprintf("RMP_BASE = %#x, RMP_END = %#x", m.RMPBase, m.RMPEnd)
	if m.RMPCfg != nil {
		text += fmt.Sprintf(", RMP_CFG = %#x", *m.RMPCfg)
	}
	if r.RMP.Required > 0 {
		text += fmt.Sprintf(", needs %#x bytes, has %#x", r.RMP.Required, r.RMP.Size)
	}
	return fmt.Sprintf("%s, memory ends at %#x", text, r.RMP.MemoryEnd)
}

func rmpMissing(r *Report) *Finding {
	if !silicon(r) || r.RMP == nil || r.RMP.Mode != RMPNone {
		return nil
	}
	return &Finding{
		Code:     "bios.rmp-not-reserved",
		Message:  "the BIOS reserved no memory for the reverse map table (RMP)",
		Observed: observedRMP(r),
		Remedy:   remedyCoverage,
	}
}

func rmpSmall(r *Report) *Finding {
	if !silicon(r) || r.RMP == nil || r.RMP.Mode == RMPNone || r.RMP.Covers != CoversNo {
		return nil
	}
	return &Finding{
		Code:     "bios.rmp-not-covering",
		Message:  "the reverse map table (RMP) does not cover all memory: " + r.RMP.Why,
		Observed: observedRMP(r),
		Remedy:   remedyCoverage,
	}
}

func legacyBoot(r *Report) *Finding {
	if !silicon(r) || r.Facts.UEFI {
		return nil
	}
	return &Finding{
		Code:     "bios.legacy-boot",
		Message:  "the machine was booted by legacy BIOS, with which the SEV firmware does not start",
		Observed: "there is no /" + efiDir,
		Remedy:   "boot with UEFI",
	}
}
