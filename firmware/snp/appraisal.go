package snp

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// AppraisalPolicy is what a relying party demands of platform and launch,
// whatever it needs the evidence for. The zero value of a field is strict, or
// demands nothing where strict would need a value to compare with.
type AppraisalPolicy struct {
	// Measurements are the acceptable launch digests; none fails.
	Measurements [][]byte
	// MinTCB is compared component by component with the reported, committed,
	// current and launch TCB: a guest started below the floor, or a platform
	// that can go back below it, is as bad as one that is below it now.
	MinTCB contract.TCB
	// Floors are further floors by kind of processor. When there are some, a
	// processor that none is for needs a MinTCB, or fails.
	Floors []Floor
	// Exclude are product lines to refuse beside DefaultExclusions;
	// AllowProducts lifts the default for a line, never what Exclude says.
	Exclude, AllowProducts []Product
	// AllowVLEK accepts reports signed by a cloud provider's VLEK.
	AllowVLEK bool
	// AllowProvisional accepts firmware that can still be rolled back.
	AllowProvisional bool
	// ForbidSMT refuses guests and platforms with SMT.
	ForbidSMT bool
	// Platform are facts that the platform must state.
	Platform PlatformInfo
	// ChipIDs limits the processors, 64 bytes each; empty means any.
	ChipIDs [][]byte
	// IDKeys and AuthorKeys are acceptable digests of the keys that signed the
	// ID block, 48 bytes each; empty means any or none.
	IDKeys, AuthorKeys [][]byte
	// MinGuestSVN, FamilyID and ImageID (16 bytes, nil means any) are compared
	// with those of the ID block.
	MinGuestSVN       uint32
	FamilyID, ImageID []byte
	// CRL is the relying party's own revocation list, DER; nil takes the one
	// among the endorsements. RequireCRL fails when there is neither.
	CRL        []byte
	RequireCRL bool
	// EmulatedRoots are accepted beside AMD's when their subject says EMULATED.
	EmulatedRoots []*x509.Certificate
	// Now is when certificates and revocation list must be valid. Required.
	Now time.Time
}

// Expect is an AppraisalPolicy with what this one report must carry. Nil
// ReportData or HostData fails.
type Expect struct {
	ReportData []byte
	HostData   []byte
	AppraisalPolicy
}

// Floor is the least that one kind of processor must have. It goes by CPUID,
// not by product line: Bergamo and Siena are Genoa to AMD's key service, but
// number their microcode on their own.
type Floor struct {
	// Family and models, combined as CPUID gives them; the last is included.
	Family, FirstModel, LastModel uint8
	TCB                           contract.TCB
	// Mitigations must be set in the mitigation vector at launch and in the
	// current one. Reports before version 4 have none and fail.
	Mitigations uint64
}

// ParseFloor decodes FAMILY/MODEL[-MODEL]:COMPONENTS, for instance
// "19/10-1f:snp=27,microcode=0x56,mitigations=0x7". Family and models are hex.
func ParseFloor(text string) (Floor, error) {
	processor, components, _ := strings.Cut(text, ":")
	family, models, _ := strings.Cut(processor, "/")
	first, last, isRange := strings.Cut(models, "-")
	if !isRange {
		last = first
	}
	var f Floor
	for _, field := range []struct {
		text string
		to   *uint8
	}{{family, &f.Family}, {first, &f.FirstModel}, {last, &f.LastModel}} {
		v, err := strconv.ParseUint(field.text, 16, 8)
		if err != nil {
			return Floor{}, fmt.Errorf("floor %q does not start with a family and model in hex, as 19/11:snp=27 does", text)
		}
		*field.to = uint8(v)
	}
	if f.FirstModel > f.LastModel {
		return Floor{}, fmt.Errorf("floor %q is for no model: the range ends before it starts", text)
	}
	var rest []string
	for part := range strings.SplitSeq(components, ",") {
		value, isVector := strings.CutPrefix(part, "mitigations=")
		if !isVector {
			rest = append(rest, part)
			continue
		}
		v, err := strconv.ParseUint(value, 0, 64)
		if err != nil || v == 0 || f.Mitigations != 0 {
			return Floor{}, fmt.Errorf("floor %q: %q is no vector of mitigations, or is given twice", text, part)
		}
		f.Mitigations = v
	}
	if len(rest) == 0 {
		return f, nil
	}
	var err error
	if f.TCB, err = contract.ParseTCB(strings.Join(rest, ",")); err != nil {
		return Floor{}, fmt.Errorf("floor %q: %w", text, err)
	}
	return f, nil
}

// String is the form ParseFloor reads.
func (f Floor) String() string {
	text := fmt.Sprintf("%x/%x-%x:%s", f.Family, f.FirstModel, f.LastModel, strings.ReplaceAll(f.TCB.String(), " ", ","))
	if f.Mitigations != 0 {
		text += fmt.Sprintf(",mitigations=%#x", f.Mitigations)
	}
	return text
}

// floor is what a processor has to reach. It fails when floors are stated, but
// none for this one.
func (a *AppraisalPolicy) floor(r *Report) (tcb contract.TCB, mitigations uint64, err error) {
	tcb = a.MinTCB
	stated := len(a.Floors) == 0 || tcb != contract.TCB{}
	for _, f := range a.Floors {
		if r.Version >= version3 && f.Family == r.Family && f.FirstModel <= r.Model && r.Model <= f.LastModel {
			tcb, mitigations, stated = tcb.Max(f.TCB), mitigations|f.Mitigations, true
		}
	}
	if !stated {
		return tcb, 0, errors.New("no floor is stated for this processor")
	}
	return tcb, mitigations, nil
}

// Exclusion is a product line that is refused, and why.
type Exclusion struct {
	Product string
	Why     string
}

// DefaultExclusions are the lines that no relying party should trust unless it
// has a reason of its own.
func DefaultExclusions() []Exclusion {
	return []Exclusion{{ProductMilan, "EPYC 7003 (Milan) is excluded: its attestation root can be extracted in software, so whoever did that can forge its reports"}}
}

// excluded says why a line is refused, "" when it is not.
func (a *AppraisalPolicy) excluded(p Product) string {
	if slices.Contains(a.Exclude, p) {
		return p.Name + " is excluded by your own list"
	}
	if slices.Contains(a.AllowProducts, p) {
		return ""
	}
	return defaultExclusion(p)
}

func defaultExclusion(p Product) string {
	for _, e := range DefaultExclusions() {
		if e.Product == p.Name {
			return e.Why
		}
	}
	return ""
}

func oneOf(values [][]byte, got []byte) bool {
	return slices.ContainsFunc(values, func(v []byte) bool { return bytes.Equal(v, got) })
}
