package snp

import "github.com/confidential-node/agent/firmware/contract"

type (
	// Status is a contract.Status.
	Status = contract.Status
	// Check is a contract.Check: a report's findings are as any evidence's.
	Check = contract.Check
	// Warning is a contract.Warning.
	Warning = contract.Warning
)

// Outcomes of a check.
const (
	Pass = contract.Pass
	Fail = contract.Fail
	Skip = contract.Skip
)

// Signer is the processor that signed, as the signature and the chain prove.
type Signer struct {
	// Product is AMD's name of the line: "Milan", "Genoa" or "Turin".
	Product string `json:"product"`
	// Processor and Generation are as in Processor; empty in reports before
	// version 3, which do not tell.
	Processor  string `json:"processor,omitempty"`
	Generation string `json:"generation,omitempty"`
	// Key is "VCEK" or "VLEK".
	Key string `json:"key"`
	// ChipID in hex; empty with a VLEK, which CSP holds instead.
	ChipID string `json:"chip_id,omitempty"`
	CSP    string `json:"csp,omitempty"`
	// TCB is the reported one, which the key is derived from.
	TCB contract.TCB `json:"tcb"`
	// Firmware is the current version of the SNP firmware.
	Firmware string `json:"firmware"`
	// Emulated means that no silicon stands behind the signature.
	Emulated bool `json:"emulated"`
}

// Result is every check that was made, and what else the report tells.
type Result struct {
	contract.Checks
	// Signer is nil unless chain and signature hold.
	Signer *Signer
	// GPUs are those a bundle has evidence of, set by whoever judged it; empty
	// unless their certificates and signatures hold.
	GPUs     []contract.AttestedGPU
	Warnings []Warning
}

func (res *Result) warn(name, why string) {
	res.Warnings = append(res.Warnings, Warning{Name: name, Why: why})
}
