package contract

import (
	"fmt"
	"strconv"
	"strings"
)

// TCB is a platform's security version, component by component; compare each
// on its own, never as one integer (AMD 56860 rev. 1.58, TCB_VERSION). Zero
// means "no floor for this component".
type TCB struct {
	FMC        uint8 `json:"fmc,omitempty"` // Turin and later only
	BootLoader uint8 `json:"boot_loader,omitempty"`
	TEE        uint8 `json:"tee,omitempty"`
	SNP        uint8 `json:"snp,omitempty"`
	Microcode  uint8 `json:"microcode,omitempty"`
}

// String is the form that ParseTCB reads.
func (t TCB) String() string {
	return fmt.Sprintf("fmc=%d boot-loader=%d tee=%d snp=%d microcode=%d", t.FMC, t.BootLoader, t.TEE, t.SNP, t.Microcode)
}

// Max is the higher of two, component by component.
func (t TCB) Max(o TCB) TCB {
	return TCB{max(t.FMC, o.FMC), max(t.BootLoader, o.BootLoader), max(t.TEE, o.TEE), max(t.SNP, o.SNP), max(t.Microcode, o.Microcode)}
}

// ParseTCB decodes components separated by commas or spaces, for instance
// "snp=27,microcode=86". Those left out are zero; at least one is needed, and
// none twice.
func ParseTCB(text string) (TCB, error) {
	var t TCB
	fields := map[string]*uint8{
		"fmc": &t.FMC, "boot-loader": &t.BootLoader, "tee": &t.TEE, "snp": &t.SNP, "microcode": &t.Microcode,
	}
	parts := strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
	if len(parts) == 0 {
		return TCB{}, fmt.Errorf("TCB %q names no component", text)
	}
	for _, part := range parts {
		name, value, _ := strings.Cut(part, "=")
		field := fields[name]
		v, err := strconv.ParseUint(value, 0, 8)
		if field == nil || err != nil {
			return TCB{}, fmt.Errorf("TCB component %q is not fmc, boot-loader, tee, snp or microcode = 0..255, or is given twice", part)
		}
		*field = uint8(v)
		delete(fields, name)
	}
	return t, nil
}
