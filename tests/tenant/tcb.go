package tenant

import (
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// ParseTCB decodes "snp=27,microcode=86"; components left out have no floor,
// and an empty text is no floor at all.
func ParseTCB(text string) (*contract.TCB, error) {
	if text == "" {
		return nil, nil //nolint:nilnil // no floor is an answer
	}
	var tcb contract.TCB
	fields := map[string]*uint8{
		"fmc": &tcb.FMC, "boot-loader": &tcb.BootLoader, "tee": &tcb.TEE, "snp": &tcb.SNP, "microcode": &tcb.Microcode,
	}
	for part := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(part, "=")
		field, known := fields[strings.TrimSpace(name)]
		v, err := strconv.ParseUint(strings.TrimSpace(value), 0, 8)
		if !known || err != nil {
			return nil, Usage("TCB floor %q is not one of fmc, boot-loader, tee, snp, microcode = 0..255", part)
		}
		*field = uint8(v)
	}
	return &tcb, nil
}
