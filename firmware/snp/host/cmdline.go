package host

import (
	"slices"
	"strings"
)

// trap is a kernel parameter that keeps SNP off.
type trap struct{ parameter, message, remedy string }

// parseCmdline keeps the parameters that can matter to SNP, in their order.
// The others are nobody's business: facts leave the host.
func parseCmdline(cmdline string) []string {
	var kept []string
	for _, parameter := range splitCmdline(cmdline) {
		switch key := parameterKey(parameter); {
		case strings.HasPrefix(key, "kvm_amd."), strings.HasPrefix(key, "kvm."), key == "iommu", key == "iommu.passthrough", key == "amd_iommu",
			key == "sev", key == "clearcpuid", key == "modprobe.blacklist", key == "module_blacklist", key == "mem_encrypt":
			kept = append(kept, parameter)
		}
	}
	return kept
}

// parameterKey is a parameter's name; the kernel takes dashes and underscores
// for the same.
func parameterKey(parameter string) string {
	key, _, _ := strings.Cut(parameter, "=")
	return strings.ReplaceAll(key, "-", "_")
}

// cmdlineTraps finds parameters that switch SNP off. Where a later one undoes
// an earlier one, as "iommu=nopt" does with "iommu=pt", the last wins, as in
// the kernel.
func cmdlineTraps(parameters []string) []trap {
	var traps []trap
	var passthrough string
	add := func(parameter, message string) {
		traps = append(traps, trap{parameter, message, "remove " + parameter + " from the kernel command line and reboot"})
	}
	for _, parameter := range parameters {
		_, value, _ := strings.Cut(parameter, "=")
		switch key := parameterKey(parameter); key {
		case "iommu":
			for option := range strings.SplitSeq(value, ",") {
				switch option {
				case "pt":
					passthrough = parameter
				case "nopt":
					passthrough = ""
				case "off":
					add(parameter, "it switches the IOMMU off, and SNP needs the IOMMU")
				}
			}
		case "iommu.passthrough":
			passthrough = ""
			if on, ok := parseBool(value); ok && on {
				passthrough = parameter
			}
		case "amd_iommu":
			for option := range strings.SplitSeq(value, ",") {
				switch option {
				case "off":
					add(parameter, "it switches the IOMMU off, and SNP needs the IOMMU")
				case "pgtbl_v2":
					add(parameter, "it selects IOMMU page tables of version 2, and SNP needs version 1")
				}
			}
		case "sev":
			if hasWord(value, "nosnp") {
				add(parameter, "it forbids the kernel to switch SNP on")
			}
		case "clearcpuid":
			for _, feature := range []string{"sev", "sev_es", "sev_snp", "sme"} {
				if hasWord(value, feature) {
					add(parameter, "it hides "+feature+" from the kernel")
				}
			}
		case "kvm_amd.sev", "kvm_amd.sev_es", "kvm_amd.sev_snp", "kvm_amd.npt", "kvm_amd.nrips", "kvm.mmio_caching":
			if on, ok := parseBool(value); ok && !on {
				add(parameter, "KVM offers SNP only with "+key+" on")
			}
		case "modprobe.blacklist", "module_blacklist":
			for _, module := range []string{"ccp", "kvm", "kvm_amd"} {
				if hasWord(strings.ReplaceAll(value, "-", "_"), module) {
					add(parameter, "it keeps the module "+module+" from loading")
				}
			}
		}
	}
	if passthrough != "" {
		traps = append(traps, trap{
			passthrough, "it puts the IOMMU into passthrough mode, which silently disables SNP",
			"remove " + passthrough + " from the kernel command line, or add iommu=nopt behind it, and reboot",
		})
	}
	return traps
}

// splitCmdline splits at spaces outside of double quotes, as the kernel does,
// and stops at "--", behind which everything is init's.
func splitCmdline(cmdline string) []string {
	quoted := false
	words := strings.FieldsFunc(cmdline, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\n' || r == '\t')
	})
	for i, word := range words {
		if word == "--" {
			return words[:i]
		}
		words[i] = strings.ReplaceAll(word, `"`, "")
	}
	return words
}

func hasWord(list, word string) bool {
	return slices.Contains(strings.Split(list, ","), word)
}

// parseBool reads a boolean as the kernel does (kstrtobool): the first letter
// counts, of "on" and "off" the second.
func parseBool(s string) (value, ok bool) {
	if s == "" {
		return false, false
	}
	switch s[0] {
	case 'y', 'Y', 't', 'T', '1':
		return true, true
	case 'n', 'N', 'f', 'F', '0':
		return false, true
	case 'o', 'O':
		if len(s) > 1 && (s[1] == 'n' || s[1] == 'N') {
			return true, true
		}
		return false, len(s) > 1 && (s[1] == 'f' || s[1] == 'F')
	}
	return false, false
}
