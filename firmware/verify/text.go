package verify

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/confidential-node/agent/firmware/snp"
)

// Text is a result for people: one line per check that says whether it holds
// and why, the compared values below one that does not, and the verdict last.
func Text(res *snp.Result) string {
	width, held, skipped := 0, 0, 0
	for _, c := range res.Checks {
		width = max(width, utf8.RuneCountInString(c.Name))
	}
	var b strings.Builder
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
			fmt.Fprintf(&b, "  %-*s  expected %s\n  %-*s  found    %s\n", width, "", c.Want, width, "", c.Got)
		}
	}
	fmt.Fprintf(&b, "%d of %d checks hold", held, len(res.Checks))
	if skipped > 0 {
		fmt.Fprintf(&b, ", %d not made as you allowed", skipped)
	}
	if res.OK() {
		b.WriteString(": the evidence holds\n")
	} else {
		b.WriteString(": the evidence does NOT hold\n")
	}
	return b.String()
}
