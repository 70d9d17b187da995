package verify

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// Text is a result for people: who signed, which GPUs, one line per check that says
// whether it holds and why, the compared values below one that does not, then
// what to know nevertheless, and the verdict last. With explain, each check
// also says what it protects from.
func Text(res *snp.Result, explain bool) string {
	width, held, skipped := 0, 0, 0
	for _, c := range res.Checks {
		width = max(width, utf8.RuneCountInString(c.Name))
	}
	var b strings.Builder
	if res.Signer != nil {
		b.WriteString(signedBy(res.Signer))
	}
	for _, g := range res.GPUs {
		b.WriteString(attested(g))
	}
	below := func(what, value string) { fmt.Fprintf(&b, "  %-*s  %s %s\n", width, "", what, value) }
	for _, c := range res.Checks {
		mark := "✗"
		switch c.Status {
		case snp.Pass:
			mark = "✓"
			held++
		case snp.Skip:
			mark = "-"
			skipped++
		case snp.Fail:
		}
		fmt.Fprintf(&b, "%s %-*s  %s\n", mark, width, c.Name, c.Why)
		if c.Status == snp.Fail && c.Want != "" {
			below("expected", c.Want)
			below("found   ", c.Got)
		}
		if explain {
			below("against:", Explain(c.Name))
		}
	}
	for _, w := range res.Warnings {
		fmt.Fprintf(&b, "! %-*s  %s\n", width, w.Name, w.Why)
	}
	fmt.Fprintf(&b, "%d of %d checks hold", held, len(res.Checks))
	if skipped > 0 {
		fmt.Fprintf(&b, ", %d not made", skipped)
	}
	if res.OK() {
		b.WriteString(": the evidence holds\n")
	} else {
		b.WriteString(": the evidence does NOT hold\n")
	}
	return b.String()
}

func attested(g contract.AttestedGPU) string {
	name := g.Chip
	if g.Emulated {
		name = "EMULATED " + name
	}
	return fmt.Sprintf("GPU %s, PDI %s, board %s, mode %s\n  driver %s, VBIOS %s\n", name, g.PDI, g.Board, g.Mode, g.Driver, g.VBIOS)
}

func signedBy(s *snp.Signer) string {
	name, owner := s.Product, "chip "+s.ChipID
	if s.Processor != "" {
		name = fmt.Sprintf("%s (%s, product line %s)", s.Processor, s.Generation, s.Product)
	}
	if s.Emulated {
		name = "EMULATED " + name
	}
	if s.CSP != "" {
		owner = "provider " + s.CSP
	}
	return fmt.Sprintf("signed by %s, %s of %s\n  at TCB %s, firmware %s\n", name, s.Key, owner, s.TCB, s.Firmware)
}
