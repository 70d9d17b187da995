package host

import (
	"fmt"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

// Level is how much a finding weighs.
type Level string

// Levels, the heaviest first.
const (
	// Blocking: no SNP guest can run here, or none that can be verified.
	Blocking Level = "blocking"
	// Warning: guests run, but verifiers may refuse them, or soon none fits.
	Warning Level = "warning"
	// Unknown: a source could not be read, so nothing is concluded from it.
	Unknown Level = "unknown"
	// Note: worth knowing, and as it should be.
	Note Level = "note"
)

// Finding is one conclusion, with the raw facts behind it.
type Finding struct {
	Code     string `json:"code"`
	Level    Level  `json:"level"`
	Message  string `json:"message"`
	Remedy   string `json:"remedy,omitempty"`
	Observed string `json:"observed,omitempty"`
}

// Processor is what the CPU is.
type Processor struct {
	Name       string `json:"name"`
	Generation string `json:"generation"`
	// Product is the product line of AMD's key service.
	Product string `json:"product"`
}

// Firmware is the SEV firmware's version and state.
type Firmware struct {
	// Version is API major, API minor and build, as AMD's bulletins name it.
	Version string `json:"version"`
	State   string `json:"state,omitempty"`
}

// TCB is a TCB_VERSION, raw and in parts.
type TCB struct {
	Raw   psp.Hex      `json:"raw"`
	Parts contract.TCB `json:"parts"`
}

// ASIDs counts what SNP guests need one of each. SEV-ES guests use the same.
type ASIDs struct {
	Total uint32 `json:"total"`
	// Used and Free are nil when nothing tells. Returning are those of Used
	// that no guest of the SNP firmware holds: guests that start or end, and
	// SEV-ES guests.
	Used      *uint32 `json:"used,omitempty"`
	Free      *uint32 `json:"free,omitempty"`
	Returning *uint32 `json:"returning,omitempty"`
	// Source of Used: "misc controller" or "firmware's guest count".
	Source string `json:"source,omitempty"`
}

// Report is what a capability report and doctor say of SNP.
type Report struct {
	// Enabled: SNP guests can be started and verified here.
	Enabled   bool       `json:"enabled"`
	Processor *Processor `json:"processor,omitempty"`
	Firmware  *Firmware  `json:"firmware,omitempty"`
	// CurrentTCB is what runs, ReportedTCB what reports state and VCEKs are
	// for.
	CurrentTCB  *TCB   `json:"current_tcb,omitempty"`
	ReportedTCB *TCB   `json:"reported_tcb,omitempty"`
	ASIDs       *ASIDs `json:"asids,omitempty"`
	RMP         *RMP   `json:"rmp,omitempty"`
	// VLEKLoaded is nil while the firmware cannot be asked.
	VLEKLoaded *bool     `json:"vlek_loaded,omitempty"`
	Findings   []Finding `json:"findings"`
	Facts      Facts     `json:"facts"`
}

// Judge concludes. It is pure: the same facts give the same report.
//
// KVM's own answer is the first rule; the others say why. Where KVM can start SNP
// guests although a rule found a cause against it, the rule is mistaken (or
// speaks of the next boot) and only warns.
func Judge(f Facts) Report {
	r := Report{Findings: []Finding{}, Facts: f}
	r.derive()
	works := f.KVM != nil && f.KVM.SNP()
	for _, rule := range rules() {
		for _, finding := range rule.find(&r) {
			finding.Level = rule.level
			if rule.level == cause {
				finding.Level = Blocking
				if works {
					finding.Level = Warning
					finding.Message += "; yet KVM offers SNP, so this may matter only after the next boot"
				}
			}
			r.Findings = append(r.Findings, finding)
		}
	}
	r.Enabled = r.Why() == ""
	return r
}

// derive fills what is computed from facts alone.
func (r *Report) derive() {
	f := &r.Facts
	processor, err := snp.ProcessorByCPUID(f.CPU.Family, f.CPU.Model)
	known := err == nil && f.CPU.Vendor == vendorAMD
	if known {
		r.Processor = &Processor{Name: processor.Name, Generation: processor.Generation, Product: processor.Product.Name}
	}
	switch {
	case f.SNPFirmware != nil:
		s := f.SNPFirmware
		r.Firmware = &Firmware{Version: fmt.Sprintf("%d.%d.%d", s.APIMajor, s.APIMinor, s.Build), State: s.State.String()}
		r.VLEKLoaded = &s.VLEKLoaded
		if known {
			r.CurrentTCB = &TCB{s.CurrentTCB, processor.Product.TCB(uint64(s.CurrentTCB))}
			r.ReportedTCB = &TCB{s.ReportedTCB, processor.Product.TCB(uint64(s.ReportedTCB))}
		}
	case f.SEVFirmware != nil:
		s := f.SEVFirmware
		r.Firmware = &Firmware{Version: fmt.Sprintf("%d.%d.%d", s.APIMajor, s.APIMinor, s.Build)}
	}
	if f.MSRs != nil {
		rmp := rmpOf(*f.MSRs, f.RMPSegments, f.MemoryEnd)
		r.RMP = &rmp
	}
	r.ASIDs = asidsOf(f)
}

const vendorAMD = "AuthenticAMD"

// asidsOf counts: SEV-ES and SNP guests get the ASIDs below the first one of
// plain SEV, and with ciphertext hiding SNP guests only the first part of
// those (Linux, kvm_amd.ciphertext_hiding_asids).
func asidsOf(f *Facts) *ASIDs {
	if f.Encryption == nil || !f.Encryption.SEVSNP || f.Encryption.MinSEVASID == 0 {
		return nil
	}
	a := &ASIDs{Total: f.Encryption.MinSEVASID - 1}
	if hiding := f.SNPFirmware; hiding != nil && hiding.CiphertextHidingEnabled {
		var share uint32
		if _, err := fmt.Sscan(f.Modules.KVMAMD["ciphertext_hiding_asids"], &share); err == nil && share > 0 {
			a.Total = min(a.Total, share)
		}
	}
	var used uint32
	switch {
	case f.ASIDUse != nil:
		used, a.Source = f.ASIDUse.Current, "misc controller"
		if f.SNPFirmware != nil {
			returning := used - min(used, f.SNPFirmware.Guests)
			a.Returning = &returning
		}
	case f.SNPFirmware != nil:
		used, a.Source = f.SNPFirmware.Guests, "firmware's guest count"
	default:
		return a
	}
	free := a.Total - min(a.Total, used)
	a.Used, a.Free = &used, &free
	return a
}

// Why is the blocking findings in one line, "" when there are none.
func (r *Report) Why() string {
	var codes []string
	for _, f := range r.Findings {
		if f.Level == Blocking {
			codes = append(codes, f.Code)
		}
	}
	return strings.Join(codes, ", ")
}
