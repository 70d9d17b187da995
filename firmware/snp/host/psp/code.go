package psp

import (
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
)

// Code is the firmware's status of a command (UAPI, sev_ret_code; 56860,
// table of status codes). QEMU prints the same numbers as fw_error.
type Code uint32

// Codes that callers branch on.
const (
	Success       Code = 0x00
	InvalidLength Code = 0x04
	// NoFirmwareCall is the kernel's: it gave up before asking the firmware.
	NoFirmwareCall Code = 0xFFFFFFFF
)

// Remedies that several codes share.
const (
	remedyReport  = "this is an error of the caller, not of the host: report it with the agent's log"
	remedyReboot  = "reboot the host; if it repeats, update the BIOS (it carries the SEV firmware) and report it to the board's vendor"
	remedyBIOS    = "update the BIOS of the host, which carries the SEV firmware, then power-cycle"
	remedyInit    = "look for \"ccp\" and \"SEV\" in the kernel log: SNP was not started; run `nodeagent capability` for the reason"
	remedyRMP     = "look for \"SEV-SNP: RMP\" in the kernel log; enable \"SNP Memory (RMP Table) Coverage\" in the BIOS and reboot"
	remedyMemory  = "update the host's kernel (6.11 or later with the RMP fix 88a921aa3c6b); if it repeats, report it with the kernel log"
	remedyGuestID = "compare ID block, ID key and image with what the tenant published; the host cannot repair a mismatch"
)

// meaning is one row of the table: a stable word, what it says, what to do.
type meaning struct{ word, text, remedy string }

// meanings of the codes up to 0x18, which SEV and SNP share.
func meanings() map[Code]meaning {
	return map[Code]meaning{
		0x01: {"invalid-platform-state", "the platform is in the wrong state for this command", remedyInit},
		0x02: {"invalid-guest-state", "the guest is in the wrong state for this command", remedyReport},
		0x03: {"invalid-config", "the platform's configuration does not allow it", "boot with UEFI, not legacy BIOS, and check SMEE and SEV-SNP Support in the BIOS"},
		0x04: {"invalid-length", "a buffer has the wrong length", remedyReport},
		0x05: {"already-owned", "the platform already has an owner", "nothing for SNP; reset SEV ownership only if plain SEV guests need it"},
		0x06: {"invalid-certificate", "a certificate was refused", remedyReport},
		0x07: {"policy-failure", "the guest's policy does not fit this host", "compare the policy with SMT, ABI version, sockets and ciphertext hiding of this host, and change one of them"},
		0x08: {"inactive", "the guest has no ASID", remedyReport},
		0x09: {"invalid-address", "an address is not valid", remedyReport},
		0x0A: {"bad-signature", "a signature does not verify", remedyGuestID},
		0x0B: {"bad-measurement", "a measurement does not match", remedyGuestID},
		0x0C: {"asid-owned", "the ASID belongs to another guest", remedyReboot},
		0x0D: {"invalid-asid", "the ASID is outside the SNP range", "raise the SEV-ES ASID Space Limit in the BIOS, and check kvm_amd's ciphertext_hiding_asids"},
		0x0E: {"wbinvd-required", "caches must be flushed first", remedyReboot},
		0x0F: {"df-flush-required", "the data fabric must be flushed first", remedyReboot},
		0x10: {"invalid-guest", "the guest is not known", remedyReport},
		0x11: {"invalid-command", "the firmware does not know this command", remedyBIOS},
		0x12: {"active", "a guest is still active", "stop every SEV and SNP guest first"},
		0x13: {"hardware-platform", "the platform's hardware failed or is not prepared", "enable \"SNP Memory (RMP Table) Coverage\" in the BIOS; a board without that item needs a BIOS update first"},
		0x14: {"hardware-unsafe", "the firmware calls the hardware unsafe", "take the host out of service and power-cycle it; if it repeats, have it repaired"},
		0x15: {"unsupported", "this firmware does not support it", remedyBIOS},
		0x16: {"invalid-parameter", "a parameter is not valid", "check the values given, for a TCB that none of its parts is above the current one"},
		0x17: {"resource-limit", "the firmware ran out of a resource", "stop guests, or reboot the host"},
		0x18: {"secure-data-invalid", "the chip's own data failed its integrity check", "take the host out of service and power-cycle it; if it repeats, have it repaired"},

		0x19: {"invalid-page-size", "a page has the wrong size in the RMP", remedyMemory},
		0x1A: {"invalid-page-state", "a page is in the wrong state in the RMP", remedyMemory},
		0x1B: {"invalid-metadata-entry", "a metadata entry is not valid", remedyReport},
		0x1C: {"invalid-page-owner", "a page belongs to someone else in the RMP", remedyMemory},
		0x1D: {"aead-overflow", "a message counter would overflow", "stop the guest and start a new one"},
		0x1F: {"exit-ring-buffer", "the command ring buffer was left", remedyReport},
		0x20: {"rmp-init-required", "the RMP is not initialised", remedyRMP},
		0x21: {"bad-svn", "the firmware's SVN is below the committed one", "use the newest BIOS; committed firmware cannot be rolled back"},
		0x22: {"bad-version", "the firmware's version is below the committed one", "use the newest BIOS; committed firmware cannot be rolled back"},
		0x23: {"shutdown-required", "SNP must be shut down first", "stop every SNP guest and reboot the host"},
		0x24: {"update-failed", "a firmware update failed", remedyReboot},
		0x25: {"restore-required", "an interrupted firmware update must be restored", remedyReboot},
		0x26: {"rmp-initialization-failed", "the RMP could not be initialised", remedyRMP},
		0x27: {"invalid-key", "a key is not valid", remedyReport},
		0x28: {"shutdown-incomplete", "a shutdown was not completed", "reboot the host"},

		NoFirmwareCall: {"not-called", "the kernel did not reach the firmware", remedyInit},
	}
}

func (c Code) meaning() meaning {
	if m, ok := meanings()[c]; ok {
		return m
	}
	return meaning{"unknown", "this agent does not know the code", "look the code up in AMD's document 56860 of this firmware's version, and report it"}
}

// FirmwareError is a command that the firmware refused. It unwraps to a
// contract.Refusal with a remedy and to the kernel's errno.
type FirmwareError struct {
	Command Command
	Code    Code
	// Errno is what the ioctl returned, if it failed.
	Errno error
}

func (e *FirmwareError) Error() string {
	m := e.Code.meaning()
	return fmt.Sprintf("%s: the SEV firmware answers %#x (%s): %s", e.Command, uint32(e.Code), m.word, m.text)
}

// Unwrap returns the refusal and the errno.
func (e *FirmwareError) Unwrap() []error {
	m := e.Code.meaning()
	errs := []error{contract.Refuse("psp."+m.word, m.remedy, "%s: the SEV firmware answers %#x: %s", e.Command, uint32(e.Code), m.text)}
	if e.Errno != nil {
		errs = append(errs, e.Errno)
	}
	return errs
}
