package diagnosis

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/skip"
)

// canary stands for whatever of the host is in a text and must not leave it.
const canary = "CANARY"

// inLibvirt is how libvirt hands on what QEMU wrote before it ended.
func inLibvirt(text string) string {
	return "internal error: QEMU unexpectedly closed the monitor (vm='" + canary + "'): 2026-11-25T18:00:00.000000Z qemu-system-x86_64: /srv/" + canary + ": " + text
}

func isPublic(t *testing.T, text string, r *contract.Refusal) {
	t.Helper()
	if r.Remedy == "" || r.Message == "" || !regexp.MustCompile(`^[a-z]+\.[a-z-]+$`).MatchString(r.Code) {
		t.Errorf("%q is explained by %+v", text, r)
	}
	if said := r.Code + r.Message + r.Remedy; strings.Contains(said, canary) || strings.Contains(said, "%!") || r.Cause != nil {
		t.Errorf("%q leaves the host: %+v", text, r)
	}
}

func TestWhatLibvirtAndQEMUSayIsExplained(t *testing.T) {
	t.Parallel()
	for text, code := range map[string]string{
		"sev_common_kvm_init: cbitpos check failed, host '47' requested '51'":                                                       "host.c-bit-mismatch",
		"sev_common_kvm_init: reduced_phys_bits check failed, it should be in the range of 1 to 63, requested '0'":                  "host.c-bit-mismatch",
		"sev_common_kvm_init: Failed to open /dev/sev 'No such file or directory'":                                                  "host.psp-missing",
		"internal error: child reported (status=125): unable to stat: /dev/sev: No such file or directory":                          "host.psp-missing",
		"sev_common_kvm_init: Failed to open /dev/sev 'Permission denied'":                                                          "host.psp-permission",
		"sev_common_kvm_init: failed to get platform status ret=-5 fw_error='1: Platform state is invalid'":                         "host.psp-not-initialised",
		"sev_common_kvm_init: SEV-ES guests require in-kernel irqchip support":                                                      "vm.irqchip",
		"sev_common_kvm_init: failed to initialize ret=-16 fw_error=0 ''":                                                           "host.asids-exhausted",
		"sev_common_kvm_init: failed to initialize ret=-22 fw_error=0 ''":                                                           "host.snp-unavailable",
		"sev_common_kvm_init: failed to initialize ret=-95 fw_error=0 ''":                                                           "host.snp-unavailable",
		"sev_common_kvm_init: failed to initialize ret=-5 fw_error=19 'Hardware platform error'":                                    "vm.psp-refused",
		"sev_common_kvm_init: host kernel does not support the requested SEV configuration.":                                        "host.snp-unavailable",
		"SEV: host kernel does not support requested KVM_X86_SNP_VM VM type.":                                                       "host.snp-unavailable",
		"-accel kvm: vm-type SEV-SNP not supported by KVM":                                                                          "host.snp-unavailable",
		"cannot set up private guest memory for sev-snp-guest: KVM required":                                                        "host.snp-unavailable",
		"sev_snp_launch_start: SNP_LAUNCH_START ret=-22 fw_error=0 ''\nsev_common_kvm_init: failed to create encryption context":    "vm.policy-refused",
		"sev_common_kvm_init: failed to create encryption context":                                                                  "vm.policy-refused",
		"sev_snp_launch_start: SNP_LAUNCH_START ret=-5 fw_error=7 'Policy is not allowed'\nfailed to create encryption context":     "vm.policy-not-allowed",
		"SNP_LAUNCH_UPDATE ret=-5 fw_error=26 'Page state is invalid'":                                                              "vm.page-refused",
		"SNP_LAUNCH_UPDATE ret=-5 fw_error=22 ''\nSEV-SNP: CPUID validation failed for function 0x1, index: 0x0, provided: eax:0x1": "vm.cpuid-refused",
		"SNP_LAUNCH_UPDATE ret=-5 fw_error=22 ''\nSEV-SNP: failed update CPUID page":                                                "vm.cpuid-refused",
		"SEV-SNP: CPUID entry count (65) exceeds max (64)":                                                                          "vm.cpuid-refused",
		"SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'":                                                                    "vm.id-block-digest",
		"SNP_LAUNCH_FINISH ret=-5 fw_error=10 'Bad signature'":                                                                      "vm.id-block-signature",
		"SNP_LAUNCH_FINISH ret=-5 fw_error=7 'Policy is not allowed'":                                                               "vm.psp-refused",
		"load_image: Failed to locate SEV metadata header":                                                                          "vm.firmware-not-sev",
		"SEV information block/Firmware GUID Table block not found in pflash rom":                                                   "vm.firmware-not-sev",
		"failed to locate and/or save reset vector":                                                                                 "vm.firmware-not-sev",
		"SEV-ES reset address is zero":                                                                                              "vm.firmware-not-sev",
		"SEV: kernel specified but guest firmware has no hashes table GUID":                                                         "vm.firmware-no-kernel-hashes",
		"SEV: guest firmware hashes table area is invalid (base=0x0 size=0x0)":                                                      "vm.firmware-no-kernel-hashes",
		"SEV: cannot map hashes table guest memory area":                                                                            "vm.firmware-no-kernel-hashes",
		"SEV-SNP does not support SMM.":                                                                                             "vm.smm",
		"pflash with kvm requires KVM readonly memory support":                                                                      "vm.pflash",
		"kvm_set_user_memory_region: KVM_SET_USER_MEMORY_REGION2 failed, slot=2, start=0xffc00000":                                  "vm.memory-slot",
		"KVM does not support guest_memfd":                                                                                          "host.no-guest-memfd",
		"cannot set up private guest memory: discard currently blocked\nAre you using assigned devices?":                            "host.qemu-no-devices",
		"vfio 0000:41:00.0: Cannot set discarding of RAM broken: Device or resource busy":                                           "host.qemu-no-devices",
		"cannot set up guest memory 'pc.ram': Cannot allocate memory":                                                               "host.memory-low",
		"locking memory failed": "host.memory-low",
		"Convert non guest_memfd backed memory region (0xfee00000 ,+ 0x1000) to shared":                                 "guest.bad-conversion",
		"parameter length of 3 not equal to 96":                                                                         "vm.launch-data",
		"parameter length:ID_AUTH 5000 exceeds max 4096":                                                                "vm.launch-data",
		"XML error: failed to get launch security policy":                                                               "vm.launch-data",
		"unsupported configuration: Unexpected length of 'idBlock', expected 96 got 3":                                  "vm.launch-data",
		"unsupported configuration: 'sev-snp' launch security is not supported with this QEMU binary":                   "host.snp-unavailable",
		"operation failed: QEMU does not support SEV guest":                                                             "host.snp-unavailable",
		"operation failed: Unable to find 'efi' firmware that is compatible with the current configuration":             "vm.firmware-not-sev",
		"unsupported configuration: Domain requires SEV-SNP firmware '/usr/share/OVMF/OVMF_CODE.fd' doesn't support it": "vm.firmware-not-sev",
		"unsupported configuration: That firmware name is reserved":                                                     "vm.fw-cfg-reserved",
	} {
		r, ok := Start(inLibvirt(text))
		if !ok || r.Code != code {
			t.Errorf("%q is explained by %+v, want %s", text, r, code)
			continue
		}
		isPublic(t, text, r)
	}
	for _, text := range []string{"", "No space left on device", "-object {...}: Parameter 'kernel-hashesx' is unexpected", strings.Repeat("x", maxText) + "SEV-SNP does not support SMM."} {
		if r, ok := Start(text); ok || r != nil {
			t.Errorf("%.80q is explained by %+v", text, r)
		}
	}
}

func TestEveryAnswerOfTheSecurityProcessorHasWords(t *testing.T) {
	t.Parallel()
	for code := -1; code <= 0x27; code++ {
		if code == 0x1E {
			continue // not assigned
		}
		text := fmt.Sprintf("SNP_LAUNCH_UPDATE ret=-5 fw_error=%d '%s'", code, canary)
		r, ok := Start(text)
		if !ok || strings.Contains(r.Message, "unknown") {
			t.Errorf("%q is explained by %+v", text, r)
			continue
		}
		isPublic(t, text, r)
	}
	if r, ok := Start("SNP_LAUNCH_UPDATE ret=-5 fw_error=999"); !ok || !strings.Contains(r.Message, "unknown answer 0x3e7") {
		t.Errorf("an answer nobody knows: %+v", r)
	}
}

func TestLinesOfTheKernelLogAreExplained(t *testing.T) {
	t.Parallel()
	const fine = ""
	for line, code := range map[string]string{
		"SEV-SNP: RMP table physical range [0x0000000012300000 - 0x00000000523fffff]":                                    fine,
		"AMD-Vi: IOMMU SNP support enabled.":                                                                             fine,
		"ccp 0000:41:00.5: SEV-SNP API:1.58 build:3":                                                                     fine,
		"kvm_amd: SEV-SNP enabled (ASIDs 1 - 99)":                                                                        fine,
		"kvm_amd: SEV-ES unusable (ASIDs 1 - 99)":                                                                        fine,
		"AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode, SNP cannot be supported.":                        "host.iommu-passthrough",
		"AMD-Vi: IOMMU is configured with V2 page table mode, SNP cannot be supported.":                                  "host.iommu-page-tables",
		"AMD-Vi: IOMMU SNP feature not enabled, SNP cannot be supported.":                                                "host.iommu-no-snp",
		"SEV-SNP: Memory for the RMP table has not been reserved by BIOS":                                                "host.rmp-not-reserved",
		"SEV-SNP: Memory reserved for the RMP table does not cover full system RAM (expected 0x40000000 got 0x20000000)": "host.rmp-too-small",
		"ccp 0000:41:00.5: SEV-SNP support requires firmware version >= 1:51":                                            "host.firmware-too-old",
		"ccp 0000:41:00.5: SEV: failed to INIT error 0x1, rc -5":                                                         "host.psp-init",
		"ccp 0000:41:00.5: SEV: failed to INIT error 0x3, rc -5":                                                         "host.psp-init",
		"ccp 0000:41:00.5: SEV: failed to INIT error 0x13, rc -5":                                                        "host.psp-init",
		"ccp 0000:41:00.5: SEV-SNP: failed to INIT error 0x26, rc -5":                                                    "host.psp-init",
	} {
		r, ok := Kernel("[    5.123456] " + canary + " " + line)
		switch {
		case !ok || (r == nil) != (code == fine):
			t.Errorf("%q is explained by %+v (known: %t)", line, r, ok)
		case r != nil && r.Code != code:
			t.Errorf("%q is %s, want %s", line, r.Code, code)
		case r != nil:
			isPublic(t, line, r)
		}
	}
	seen := map[string]bool{}
	for _, code := range []string{"0x1", "0x3", "0x13"} {
		r, _ := Kernel("SEV: failed to INIT error " + code)
		seen[r.Remedy] = true
	}
	if len(seen) != 3 {
		t.Error("errors of initialisation share a remedy")
	}
	if r, ok := Kernel("usb 1-1: new device"); ok || r != nil {
		t.Errorf("an ordinary line is explained by %+v", r)
	}
}

// What is looked for must be what QEMU can say. Texts with a value inside
// cannot be found in the program, and libvirt's are not QEMU's.
func TestTheInstalledQEMUHasTheTexts(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("qemu-system-x86_64")
	if errors.Is(err, exec.ErrNotFound) {
		skip.Missing(t, "qemu-system-x86_64")
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Not in every version, or put together at run time.
	elsewhere := map[string]bool{
		"Failed to open /dev/sev": true, "unable to stat: /dev/sev": true, "vm-type SEV-SNP not supported by KVM": true, "launch security is not supported with this QEMU binary": true,
		"QEMU does not support SEV guest": true, "Domain requires SEV-SNP firmware": true, "firmware that is compatible with the current configuration": true,
		"failed to get launch security policy": true, "Unexpected length of 'idBlock'": true, "Unexpected length of 'idAuth'": true,
		"Unexpected length of 'hostData'": true, "That firmware name is reserved": true, "Permission denied": true,
	}
	for _, k := range startTexts() {
		for _, parts := range k.texts {
			for _, p := range parts {
				if !elsewhere[p] && !strings.Contains(string(program), p) {
					t.Errorf("%s: QEMU never says %q", k.code, p)
				}
			}
		}
	}
}

func FuzzStart(f *testing.F) {
	f.Add(inLibvirt("SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'"))
	f.Add("sev_common_kvm_init: failed to initialize ret=-999999999 fw_error='-999999999")
	f.Add("SEV: failed to INIT error 0xffffffff")
	f.Fuzz(func(t *testing.T, text string) {
		for _, explain := range []func(string) (*contract.Refusal, bool){Start, Kernel} {
			r, ok := explain(text)
			if r != nil && !ok {
				t.Errorf("%q is unknown and %+v", text, r)
			}
			if r != nil {
				isPublic(t, text, r)
			}
		}
	})
}
