// Package diagnosis reads what libvirt, QEMU and the kernel say when a
// SEV-SNP guest does not start, and turns the texts it knows into refusals
// with a stable code and a remedy. Nothing of a text goes into a refusal: it
// may name the host's paths and other guests, and a refusal leaves the host.
// Numbers are taken over, names of firmware errors come from a table here.
//
// All functions are pure and safe for concurrent use. Texts are recognised by
// parts, never whole: versions differ in the rest.
//
// Texts: libvirt 11.3, QEMU 10.0 (target/i386/sev.c, accel/kvm, hw/vfio),
// Linux 6.11 and later (arch/x86/virt/svm, drivers/iommu/amd, drivers/crypto/ccp).
package diagnosis

import (
	"regexp"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// maxText bounds what is looked at: the errors that matter come first, and a
// text that is longer is not what is expected here.
const maxText = 64 << 10

// Start explains why a guest did not start, from libvirt's error, which holds
// the last lines QEMU wrote. False means that nothing in it is known.
func Start(text string) (*contract.Refusal, bool) {
	text = clip(text)
	if r := firmwareAnswer(text); r != nil {
		return r, true
	}
	return find(startTexts(), text)
}

// known is one condition with the texts that tell of it: any of them, and
// each is a list of parts that all must be there.
type known struct {
	code, message, remedy string
	texts                 [][]string
}

// find returns the first that fits.
func find(list []known, text string) (*contract.Refusal, bool) {
	for _, k := range list {
		for _, parts := range k.texts {
			if containsAll(text, parts) {
				return contract.Refuse(k.code, k.remedy, "%s", k.message), true
			}
		}
	}
	return nil, false
}

func containsAll(text string, parts []string) bool {
	for _, p := range parts {
		if !strings.Contains(text, p) {
			return false
		}
	}
	return true
}

func clip(text string) string { return text[:min(len(text), maxText)] }

// oneOf is any of these texts.
func oneOf(texts ...string) [][]string {
	out := make([][]string, len(texts))
	for i, t := range texts {
		out[i] = []string{t}
	}
	return out
}

const (
	remedyFirmware = "boot an image whose firmware is the AmdSev build of OVMF (nodeagent firmware inspect tells)"
	remedyHostSNP  = "enable SEV-SNP on the host: SMEE, SNP memory (RMP table) coverage and a limit of SEV-ES ASIDs in the BIOS, kernel 6.11 or later, " +
		"IOMMU not in passthrough (no iommu=pt), then restart libvirtd"
	remedyAgent = "report it with the agent's log: the agent should not have made such a domain"
)

// startTexts in the order they are tried: what names the cause before what
// only follows from it.
func startTexts() []known {
	return []known{
		{
			"host.psp-permission", "QEMU may not open the security processor's device /dev/sev",
			"add '/dev/sev rw,' to /etc/apparmor.d/local/abstractions/libvirt-qemu and reload the profiles",
			[][]string{{"Failed to open /dev/sev", "Permission denied"}},
		},
		{
			"host.psp-missing", "the host has no usable device of the security processor",
			"load the module ccp and look in the kernel log for why /dev/sev is missing",
			oneOf("Failed to open /dev/sev", "unable to stat: /dev/sev"),
		},
		{
			"host.psp-not-initialised", "the security processor does not answer to a query of its state",
			"look in the kernel log for 'SEV' and 'ccp', update the BIOS, and reboot the host",
			oneOf("failed to get platform status"),
		},
		{
			"host.c-bit-mismatch", "the C-bit or reduced address bits that libvirt remembers are not this processor's",
			"remove libvirt's cache of QEMU capabilities and restart libvirtd: it was made on another processor or BIOS setting",
			oneOf("cbitpos check failed", "reduced_phys_bits check failed"),
		},
		{
			"host.snp-unavailable", "the host cannot start SEV-SNP guests", remedyHostSNP,
			append(oneOf("vm-type SEV-SNP not supported by KVM", "launch security is not supported with this QEMU binary", "QEMU does not support SEV guest",
				"host kernel does not support the requested SEV configuration", "host kernel does not support requested"),
				[]string{"cannot set up private guest memory", "KVM required"}),
		},
		{
			"host.no-guest-memfd", "the host's kernel has no private memory for guests",
			"use kernel 6.11 or later with KVM_PRIVATE_MEM", oneOf("KVM does not support guest_memfd"),
		},
		{
			"host.qemu-no-devices", "the host's QEMU cannot combine SEV-SNP with passed-through devices",
			"upgrade QEMU to 10.1 or later", append(oneOf("Are you using assigned devices?", "Cannot set discarding of RAM broken"),
				[]string{"cannot set up private guest memory", "discard currently blocked"}),
		},
		{
			"vm.memory-slot", "KVM refused a piece of the guest's memory",
			"load the firmware as a ROM, and upgrade QEMU to 9.1 or later", oneOf("KVM_SET_USER_MEMORY_REGION2 failed"),
		},
		{
			"vm.cpuid-refused", "the security processor does not vouch for the CPU model's features on this host",
			"launch with CPU model EPYC-v4 and no features beside it",
			oneOf("CPUID validation failed", "failed update CPUID page", "CPUID entry count", "unable to query CPUID values", "failed to generate CPUID table"),
		},
		{
			"vm.firmware-no-kernel-hashes", "the image's firmware has no place for kernel hashes", remedyFirmware,
			oneOf("guest firmware has no hashes table GUID", "hashes table area is invalid", "cannot map hashes table guest memory area"),
		},
		{
			"vm.firmware-not-sev", "the image's firmware is not made for SEV-SNP", remedyFirmware,
			oneOf("Failed to locate SEV metadata header", "Firmware GUID Table block not found", "failed to locate and/or save reset vector",
				"SEV-ES reset address is zero", "Domain requires SEV-SNP firmware", "firmware that is compatible with the current configuration"),
		},
		{
			"vm.smm", "SEV-SNP guests have no SMM", "use firmware built without SMM; " + remedyAgent, oneOf("SEV-SNP does not support SMM"),
		},
		{
			"vm.pflash", "SEV-SNP guests have no flash", "load the firmware as a ROM; " + remedyAgent, oneOf("pflash with kvm requires KVM readonly memory support"),
		},
		{"vm.irqchip", "SEV-SNP guests need KVM's interrupt controller", remedyAgent, oneOf("SEV-ES guests require in-kernel irqchip")},
		{
			"vm.launch-data", "libvirt or QEMU refuses the form of policy, ID block, ID auth or HOST_DATA", remedyAgent,
			oneOf("failed to get launch security policy", "Unexpected length of 'idBlock'", "Unexpected length of 'idAuth'", "Unexpected length of 'hostData'",
				"parameter length of", "parameter length:ID_AUTH"),
		},
		{"vm.fw-cfg-reserved", "libvirt refuses a firmware setting", remedyAgent, oneOf("That firmware name is reserved")},
		{
			"guest.bad-conversion", "the guest's firmware or kernel asked to share memory that is none",
			"launch another image: this one does not run under SEV-SNP on this QEMU", oneOf("Convert non guest_memfd backed memory region"),
		},
		{
			"host.memory-low", "the host does not give QEMU the guest's memory",
			"launch a smaller guest, or free memory on the host; see whether a limit of libvirtd's unit (LimitAS, LimitMEMLOCK, MemoryMax) is in the way",
			oneOf("cannot set up guest memory", "locking memory failed"),
		},
		{"vm.policy-refused", policyMessage, policyRemedy, oneOf("failed to create encryption context")},
	}
}

const (
	policyMessage = "KVM refuses the guest policy"
	policyRemedy  = "set bit 17 of the guest policy and no bit this host's kernel does not know"
)

// answer is QEMU's report of a command to the security processor.
const answer = `(SNP_LAUNCH_START|SNP_LAUNCH_UPDATE|SNP_LAUNCH_FINISH|failed to initialize) ret=(-?[0-9]{1,9}) fw_error='?(-?[0-9]{1,9})`

// Errors of the kernel that tell the cause (Linux errno, as QEMU prints them).
const (
	retBusy, retInvalid, retUnsupported = -16, -22, -95
)

// firmwareAnswer explains a refused command to the security processor.
func firmwareAnswer(text string) *contract.Refusal {
	m := regexp.MustCompile(answer).FindStringSubmatch(text)
	// A CPUID page that is refused names the cause in lines of its own.
	if m == nil || strings.Contains(text, "CPUID validation failed") || strings.Contains(text, "failed update CPUID page") {
		return nil
	}
	ret, _ := strconv.Atoi(m[2]) // nine digits always fit
	code, _ := strconv.Atoi(m[3])
	switch command := m[1]; {
	case command == "failed to initialize" && ret == retBusy:
		return contract.Refuse("host.asids-exhausted", "wait until other guests have ended, or raise the limit of SEV-ES ASIDs in the BIOS",
			"the host has no address space identifier (ASID) left for another SEV-SNP guest")
	case command == "failed to initialize" && (ret == retInvalid || ret == retUnsupported):
		return contract.Refuse("host.snp-unavailable", remedyHostSNP, "the host cannot start SEV-SNP guests")
	case command == "SNP_LAUNCH_START" && code == 0 && ret == retInvalid:
		return contract.Refuse("vm.policy-refused", policyRemedy, "%s", policyMessage)
	case command == "SNP_LAUNCH_START" && code == pspPolicy:
		return contract.Refuse("vm.policy-not-allowed",
			"match the guest policy to the host: allow SMT (bit 16) where the host has it on, lower the firmware ABI it asks for, do not ask for a single socket or ciphertext hiding where the host has none",
			"the host's firmware does not allow the guest policy")
	case command == "SNP_LAUNCH_FINISH" && code == pspBadMeasurement:
		return contract.Refuse("vm.id-block-digest", "sign an ID block for the launch digest of this very guest (nodeagent measure --id-block)",
			"the guest does not measure as its ID block says")
	case command == "SNP_LAUNCH_FINISH" && code == pspBadSignature:
		return contract.Refuse("vm.id-block-signature", "sign ID block and ID auth again (nodeagent measure --id-block)",
			"a signature of the ID block does not hold")
	case command == "SNP_LAUNCH_UPDATE":
		return contract.Refuse("vm.page-refused", "launch an image whose firmware is the AmdSev build of OVMF; if others start, look in the host's kernel log for RMP errors",
			"the security processor refuses a page of the guest: %s", pspText(code))
	default:
		return contract.Refuse("vm.psp-refused", "look up the answer in the host's kernel log; if other guests fail alike, update the BIOS or reboot the host",
			"the security processor refuses to start the guest: %s", pspText(code))
	}
}
