package snp

import (
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
)

// Status is the outcome of one check.
type Status string

// Outcomes. Skip never counts as held on its own behalf and never fails.
const (
	Pass Status = "pass"
	Fail Status = "fail"
	Skip Status = "skip"
)

// Check is one named finding. Names are stable.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Want and Got are the compared values, "" where there are none.
	Want string `json:"want,omitempty"`
	Got  string `json:"got,omitempty"`
	// Why is one sentence for people: what holds, or what to do.
	Why string `json:"why,omitempty"`
}

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

// Warning is what a relying party should know although no check fails.
type Warning struct {
	// Name is stable.
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Result is every check that was made, and what else the report tells.
type Result struct {
	Checks []Check
	// Signer is nil unless chain and signature hold.
	Signer   *Signer
	Warnings []Warning
}

// OK reports whether at least one check was made and none failed.
func (res *Result) OK() bool { return len(res.Checks) > 0 && res.Failed() == nil }

// Failed returns the first failed check, nil when there is none.
func (res *Result) Failed() *Check {
	i := slices.IndexFunc(res.Checks, func(c Check) bool { return c.Status == Fail })
	if i < 0 {
		return nil
	}
	return &res.Checks[i]
}

// Add appends a check: holds with its sentence, or not with the other one.
func (res *Result) Add(name string, holds bool, want, got, held, broken string) {
	c := Check{name, Pass, want, got, held}
	if !holds {
		c.Status, c.Why = Fail, broken
	}
	res.Checks = append(res.Checks, c)
}

// Skip appends a check that is not made.
func (res *Result) Skip(name, why string) {
	res.Checks = append(res.Checks, Check{Name: name, Status: Skip, Why: why})
}

func (res *Result) warn(name, why string) {
	res.Warnings = append(res.Warnings, Warning{name, why})
}
