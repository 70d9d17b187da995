package diagnosis

import "fmt"

// Answers of the security processor that tell the cause (Linux
// include/uapi/linux/psp-sev.h).
const (
	pspPolicy         = 0x07
	pspBadSignature   = 0x0A
	pspBadMeasurement = 0x0B
	pspNotCalled      = -1
)

// pspText is an answer in words.
func pspText(code int) string {
	words := [...]string{
		0x00: "success", 0x01: "invalid platform state", 0x02: "invalid guest state", 0x03: "invalid configuration", 0x04: "invalid length",
		0x05: "already owned", 0x06: "invalid certificate", pspPolicy: "policy failure", 0x08: "inactive", 0x09: "invalid address",
		pspBadSignature: "bad signature", pspBadMeasurement: "bad measurement", 0x0C: "ASID owned", 0x0D: "invalid ASID",
		0x0E: "WBINVD required", 0x0F: "DF flush required", 0x10: "invalid guest", 0x11: "invalid command", 0x12: "active",
		0x13: "hardware or platform error", 0x14: "hardware unsafe", 0x15: "unsupported", 0x16: "invalid parameter", 0x17: "resource limit",
		0x18: "secure data invalid", 0x19: "invalid page size", 0x1A: "invalid page state", 0x1B: "invalid metadata entry",
		0x1C: "invalid page owner", 0x1D: "AEAD overflow", 0x1F: "exited ring buffer", 0x20: "RMP initialisation required", 0x21: "bad SVN",
		0x22: "bad version", 0x23: "shutdown required", 0x24: "update failed", 0x25: "restore required", 0x26: "RMP initialisation failed",
		0x27: "invalid key",
	}
	switch {
	case code == pspNotCalled:
		return "the kernel did not ask it"
	case code >= 0 && code < len(words) && words[code] != "":
		return fmt.Sprintf("%s (%#x)", words[code], code)
	}
	return fmt.Sprintf("unknown answer %#x", code)
}
