package host

import (
	"fmt"

	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

func noSEVDevice(r *Report) *Finding {
	if !bare(r) || r.Facts.SEVDevice {
		return nil
	}
	return &Finding{
		Code:     "firmware.no-device",
		Message:  "the kernel has no way to the security processor",
		Observed: "there is no /" + psp.DevicePath,
		Remedy:   "run `modprobe ccp`; if the device stays away, enable SMEE in the BIOS and look for \"ccp\" in the kernel log",
	}
}

func notInitialized(r *Report) *Finding {
	s := r.Facts.SNPFirmware
	if s == nil || s.State == psp.Initialized && s.RMPInitialized {
		return nil
	}
	return &Finding{
		Code:     "firmware.not-initialized",
		Message:  "the SNP firmware is not initialized",
		Observed: fmt.Sprintf("SNP_PLATFORM_STATUS: %s, RMP initialized: %v", s.State, s.RMPInitialized),
		Remedy:   "look for \"failed to INIT\" in the kernel log: error 0x3 is legacy boot or a BIOS setting, 0x13 a BIOS without RMP coverage, 0x1 a failed firmware update (power-cycle)",
	}
}

// firmwareAPI is the API version, of whichever answer there is.
func firmwareAPI(r *Report) (api int, known bool) {
	switch {
	case r.Facts.SNPFirmware != nil:
		return int(r.Facts.SNPFirmware.APIMajor)<<8 | int(r.Facts.SNPFirmware.APIMinor), true
	case r.Facts.SEVFirmware != nil:
		return int(r.Facts.SEVFirmware.APIMajor)<<8 | int(r.Facts.SEVFirmware.APIMinor), true
	}
	return 0, false
}

// API versions: the kernel's floor, and the first with the alias check.
const (
	apiKernelFloor = 1<<8 | 51
	apiAliasCheck  = 1<<8 | 55
)

func firmwareBelow151(r *Report) *Finding {
	if api, known := firmwareAPI(r); !known || api >= apiKernelFloor {
		return nil
	}
	return &Finding{
		Code:     "firmware.too-old",
		Message:  "the SEV firmware is older than 1.51, and the kernel refuses it",
		Observed: "firmware " + r.Firmware.Version,
		Remedy:   "update the BIOS, which carries the SEV firmware",
	}
}

func firmwareBelow155(r *Report) *Finding {
	if api, known := firmwareAPI(r); !known || api >= apiAliasCheck || api < apiKernelFloor {
		return nil
	}
	return &Finding{
		Code:     "firmware.below-1.55",
		Message:  "the SEV firmware is older than 1.55 and cannot check for aliased memory",
		Observed: "firmware " + r.Firmware.Version,
		Remedy:   "update the BIOS, which carries the SEV firmware",
	}
}

func chipKeyMasked(r *Report) *Finding {
	if s := r.Facts.SNPFirmware; s == nil || !s.MaskChipKey {
		return nil
	}
	return &Finding{
		Code:     "firmware.chip-key-masked",
		Message:  "reports are not signed: MASK_CHIP_KEY is set",
		Observed: "SNP_PLATFORM_STATUS: MASK_CHIP_KEY",
		Remedy:   "run `nodeagent platform configure --mask-chip-key=false`, or reboot the host and remove what sets it",
	}
}

func chipIDMasked(r *Report) *Finding {
	if s := r.Facts.SNPFirmware; s == nil || !s.MaskChipID {
		return nil
	}
	return &Finding{
		Code:     "firmware.chip-id-masked",
		Message:  "reports carry no chip id, so nobody can find the chip's certificate: MASK_CHIP_ID is set",
		Observed: "SNP_PLATFORM_STATUS: MASK_CHIP_ID",
		Remedy:   "run `nodeagent platform configure --mask-chip-id=false`, or reboot the host and remove what sets it",
	}
}

func milan(r *Report) *Finding {
	if r.Processor == nil || r.Processor.Product != snp.ProductMilan {
		return nil
	}
	return &Finding{
		Code:     "processor.milan-excluded",
		Message:  "verifiers refuse EPYC 7003 (Milan) unless told otherwise: its attestation root can be extracted in software (2026)",
		Observed: r.Facts.CPU.Brand,
		Remedy:   "use a server with EPYC 9004, 8004 or 9005",
	}
}

func aliasCheck(r *Report) *Finding {
	if s := r.Facts.SNPFirmware; s == nil || s.AliasCheckComplete || s.State != psp.Initialized {
		return nil
	}
	return &Finding{
		Code:     "firmware.alias-check-incomplete",
		Message:  "the firmware did not check memory for aliases (BadRAM, AMD-SB-3015); verifiers may refuse this host",
		Observed: "SNP_PLATFORM_STATUS: ALIAS_CHECK_COMPLETE is clear",
		Remedy:   "update the BIOS and power-cycle",
	}
}

func exhausted(r *Report) *Finding {
	if r.ASIDs == nil || r.ASIDs.Total == 0 || r.ASIDs.Free == nil || *r.ASIDs.Free > 0 {
		return nil
	}
	return &Finding{
		Code:     "asids.exhausted",
		Message:  "no ASID is free for another SNP guest",
		Observed: fmt.Sprintf("%d of %d used, by the %s", *r.ASIDs.Used, r.ASIDs.Total, r.ASIDs.Source),
		Remedy:   "stop guests, or raise the SEV-ES ASID Space Limit in the BIOS",
	}
}

func unknownBits(r *Report) *Finding {
	if s := r.Facts.SNPFirmware; s == nil || s.UnknownFlags == 0 && s.UnknownConfig == 0 {
		return nil
	}
	s := r.Facts.SNPFirmware
	return &Finding{
		Code:     "firmware.unknown-bits",
		Message:  "the firmware reports bits that this agent does not know",
		Observed: fmt.Sprintf("SNP_PLATFORM_STATUS: flags %#x, config %#x", s.UnknownFlags, s.UnknownConfig),
		Remedy:   "update the agent",
	}
}

func esOff(r *Report) *Finding {
	value := r.Facts.Modules.KVMAMD["sev_es"]
	if on, ok := parseBool(value); !ok || on || r.Facts.KVM == nil || !r.Facts.KVM.SNP() {
		return nil
	}
	return &Finding{
		Code:     "sev-es.off",
		Message:  "SEV-ES is off, as patched firmware has it (AMD-SB-3023); SNP is not affected",
		Observed: "kvm_amd.sev_es = " + value,
	}
}

func heldBack(r *Report) *Finding {
	if r.CurrentTCB == nil || r.CurrentTCB.Raw == r.ReportedTCB.Raw {
		return nil
	}
	return &Finding{
		Code:     "tcb.held-back",
		Message:  "reports state an older TCB than the one that runs; floors are checked against the reported one",
		Observed: fmt.Sprintf("current %#x, reported %#x", r.CurrentTCB.Raw, r.ReportedTCB.Raw),
		Remedy:   "if nobody holds it back on purpose, reboot the host, or run `nodeagent platform configure --reported-tcb current`",
	}
}

func vlek(r *Report) *Finding {
	if r.VLEKLoaded == nil || !*r.VLEKLoaded {
		return nil
	}
	return &Finding{
		Code:     "vlek.loaded",
		Message:  "a VLEK is loaded; guests may ask for reports signed with it instead of the chip's own key",
		Observed: "SNP_PLATFORM_STATUS: VLEK_EN",
	}
}

func smt(r *Report) *Finding {
	if !r.Facts.CPU.SMT {
		return nil
	}
	return &Finding{
		Code:     "smt.on",
		Message:  "SMT is on; guests whose policy forbids it cannot start, and StackWarp (AMD-SB-3027) is fully answered only with SMT off",
		Observed: "/" + smtFile + " = 1",
	}
}
