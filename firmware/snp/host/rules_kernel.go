package host

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

func iommuOff(r *Report) *Finding {
	if !silicon(r) || r.Facts.IOMMU.Groups > 0 {
		return nil
	}
	return &Finding{
		Code:     "iommu.off",
		Message:  "the IOMMU is off, and SNP needs it",
		Observed: "there are no IOMMU groups",
		Remedy:   "in the BIOS set NBIO Common > IOMMU to Enabled, and remove iommu=off and amd_iommu=off from the kernel command line",
	}
}

// iommuPassthrough looks at what the kernel did, not at its command line,
// which is a trap of its own.
func iommuPassthrough(r *Report) *Finding {
	i := r.Facts.IOMMU
	if !silicon(r) || i.Groups == 0 || i.Types["identity"] < i.Groups {
		return nil
	}
	f := &Finding{
		Code:     "iommu.passthrough",
		Message:  "every IOMMU group is in passthrough mode, with which the kernel silently leaves SNP off",
		Observed: fmt.Sprintf("%d of %d IOMMU groups have type identity", i.Types["identity"], i.Groups),
		Remedy:   "remove iommu=pt and iommu.passthrough=1 from the kernel command line and reboot",
	}
	if r.Facts.Kernel.Config[configPassthrough] == "y" {
		f.Observed += ", kernel has " + configPassthrough + "=y"
		f.Remedy = "add iommu=nopt to the kernel command line and reboot: this kernel's default is passthrough"
	}
	return f
}

// iommuFeatureSNP is bit 63 of the extended features (AMD 48882, MMIO offset
// 30h, SNPSup).
const iommuFeatureSNP = 1 << 63

func iommuWithoutSNP(r *Report) *Finding {
	if !silicon(r) {
		return nil
	}
	for _, text := range r.Facts.IOMMU.Features {
		// Since Linux 6.0 there are two words, the extended features first.
		first, _, _ := strings.Cut(text, ":")
		features, err := strconv.ParseUint(first, 16, 64)
		if err == nil && features&iommuFeatureSNP == 0 {
			return &Finding{
				Code:     "iommu.no-snp",
				Message:  "an IOMMU does not support SNP",
				Observed: "amd-iommu features " + text + ", bit 63 is clear",
				Remedy:   "in the BIOS set NBIO Common > SEV-SNP Support to Enabled",
			}
		}
	}
	return nil
}

func traps(r *Report) []Finding {
	var out []Finding
	for _, t := range cmdlineTraps(r.Facts.Kernel.Parameters) {
		out = append(out, Finding{
			Code: "cmdline.trap", Message: fmt.Sprintf("the kernel was started with %s: %s", t.parameter, t.message),
			Remedy: t.remedy, Observed: "/" + cmdlineFile + " has " + t.parameter,
		})
	}
	return out
}

// The floor of the host's kernel: SNP hosting is upstream since then.
const kernelMajor, kernelMinor = 6, 11

func oldKernel(r *Report) *Finding {
	var major, minor int
	release := r.Facts.Kernel.Release
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil || major > kernelMajor || major == kernelMajor && minor >= kernelMinor {
		return nil
	}
	return &Finding{
		Code:     "kernel.too-old",
		Message:  "the kernel is older than 6.11, the first that hosts SNP guests",
		Observed: "kernel " + release,
		Remedy:   "install a kernel of 6.11 or later; with GPUs 6.17 or later",
	}
}

func kernelWithoutSEV(r *Report) *Finding {
	if r.Facts.Kernel.Config[configKVMSEV] != "n" {
		return nil
	}
	return &Finding{
		Code:     "kernel.without-sev",
		Message:  "the kernel was built without SEV hosting",
		Observed: configKVMSEV + " is not set",
		Remedy:   "install a kernel with " + configKVMSEV + "=y",
	}
}

func flagCleared(r *Report) *Finding {
	if !silicon(r) || slices.Contains(r.Facts.CPU.Flags, "sev_snp") {
		return nil
	}
	observed := "cpuinfo flags: " + strings.Join(r.Facts.CPU.Flags, " ")
	if e := r.Facts.Encryption; e != nil {
		observed += "; CPUID 0x8000001f " + e.Raw
	}
	return &Finding{
		Code:     "kernel.cleared-snp",
		Message:  "the kernel withdrew SNP while it booted, although the processor has it",
		Observed: observed,
		Remedy:   "follow the findings about the BIOS; the kernel log says why after \"SEV-SNP:\"",
	}
}

func notSwitchedOn(r *Report) *Finding {
	m := r.Facts.MSRs
	if !silicon(r) || m == nil || m.SYSCFG&syscfgSNP != 0 || m.SYSCFG&syscfgMemoryEncryption == 0 {
		return nil
	}
	return &Finding{
		Code: "kernel.snp-not-switched-on", Message: "the kernel did not switch SNP on", Observed: fmt.Sprintf("SYSCFG = %#x, bit 24 is clear", m.SYSCFG),
		Remedy: "follow the findings about BIOS, IOMMU and kernel command line; the kernel log says why after \"SNP:\" or \"SEV-SNP:\"",
	}
}

func moduleMissing(r *Report) *Finding {
	if !bare(r) || r.Facts.Modules.KVMAMD != nil {
		return nil
	}
	return &Finding{
		Code:     "module.kvm-amd-missing",
		Message:  "the module kvm_amd is not loaded",
		Observed: "there is no /" + kvmAMDParams,
		Remedy:   "run `modprobe kvm_amd`; if that fails, enable SVM Mode in the BIOS",
	}
}

// parametersOff does not look at sev_es, which patched firmware turns off, and
// at sev only where SNP is off too: a BIOS may give every ASID to SNP. Either
// way SNP stays.
func parametersOff(r *Report) []Finding {
	var out []Finding
	check := func(module, name string, values map[string]string) {
		if on, ok := parseBool(values[name]); ok && !on {
			out = append(out, Finding{
				Code: "module.parameter-off", Message: fmt.Sprintf("%s has %s off, and offers no SNP without it", module, name),
				Observed: fmt.Sprintf("%s.%s = %s", module, name, values[name]),
				Remedy:   fmt.Sprintf("remove options for %s.%s from /etc/modprobe.d and the kernel command line, or set it to 1; if nothing sets it, the other findings and the kernel log say why the kernel turned it off", module, name),
			})
		}
	}
	if !bare(r) {
		return nil
	}
	names := []string{"sev_snp", "npt", "nrips"}
	if on, _ := parseBool(r.Facts.Modules.KVMAMD["sev_snp"]); !on {
		names = append(names, "sev")
	}
	for _, name := range names {
		check("kvm_amd", name, r.Facts.Modules.KVMAMD)
	}
	check("kvm", "mmio_caching", r.Facts.Modules.KVM)
	return out
}
