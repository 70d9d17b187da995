package diagnosis

import (
	"regexp"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Kernel explains one line of the host's kernel log about SEV-SNP. A line
// that is known and as it should be has no refusal.
func Kernel(line string) (r *contract.Refusal, isKnown bool) {
	line = clip(line)
	for _, parts := range oneOf("SEV-SNP: RMP table physical range", "IOMMU SNP support enabled", "SEV-SNP API:", "SEV-SNP enabled (ASIDs",
		// Firmware of 2025 and later turns SEV-ES off; SEV-SNP does not need it.
		"SEV-ES unusable (ASIDs") {
		if containsAll(line, parts) {
			return nil, true
		}
	}
	if strings.Contains(line, "failed to INIT error") {
		if m := regexp.MustCompile(initFailed).FindStringSubmatch(line); m != nil {
			return initAnswer(m[1])
		}
	}
	return find(kernelTexts(), line)
}

func kernelTexts() []known {
	return []known{
		{
			"host.iommu-passthrough", "the IOMMU is off or in passthrough mode, which silently disables SEV-SNP",
			"remove iommu=pt, iommu.passthrough=1 and amd_iommu=off from the kernel command line, or add iommu=nopt, and reboot",
			oneOf("IOMMU disabled or configured in passthrough mode"),
		},
		{
			"host.iommu-page-tables", "the IOMMU uses version 2 page tables, which disables SEV-SNP",
			"remove amd_iommu=pgtbl_v2 from the kernel command line and reboot", oneOf("IOMMU is configured with V2 page table mode"),
		},
		{
			"host.iommu-no-snp", "the IOMMU's SEV-SNP support is off",
			"enable SEV-SNP Support under NBIO Common Options in the BIOS", oneOf("IOMMU SNP feature not enabled"),
		},
		{
			"host.rmp-not-reserved", "the BIOS reserved no memory for the RMP table",
			"enable SNP Memory (RMP Table) Coverage in the BIOS; a board without it needs a BIOS update", oneOf("Memory for the RMP table has not been reserved"),
		},
		{
			"host.rmp-too-small", "the RMP table does not cover all of the host's memory",
			"set SNP Memory (RMP Table) Coverage to Enabled, not Custom, in the BIOS and reboot; memory may have been added", oneOf("RMP table does not cover full system RAM"),
		},
		{
			"host.firmware-too-old", "the SEV firmware is too old for SEV-SNP",
			"update the BIOS, on EPYC 7003 also amd_sev_fam19h_model0xh.sbin, to firmware 1.55 or later", oneOf("SEV-SNP support requires firmware version"),
		},
	}
}

// initFailed is the kernel's report that the security processor could not be
// initialised.
const initFailed = `SEV(?:-SNP)?: failed to INIT error (0x[0-9a-f]{1,8})`

func initAnswer(code string) (*contract.Refusal, bool) {
	const name = "host.psp-init"
	switch code {
	case "0x1":
		return contract.Refuse(name, "power the host off and on: firmware was probably updated without a reset",
			"the security processor is in a state in which it cannot be initialised (0x1)"), true
	case "0x3":
		return contract.Refuse(name, "boot the host by UEFI and enable SMEE and SEV-SNP in the BIOS",
			"the security processor finds the host's configuration invalid (0x3)"), true
	case "0x13":
		return contract.Refuse(name, "enable SNP Memory (RMP Table) Coverage in the BIOS; a board without it needs a BIOS update",
			"the security processor reports a platform error (0x13), as it does without memory for the RMP table"), true
	}
	return contract.Refuse(name, "update the BIOS, then power the host off and on", "the security processor could not be initialised (%s)", code), true
}
