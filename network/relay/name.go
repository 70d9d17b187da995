package relay

import (
	"net/netip"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// CheckName refuses what is no host name in lower case: labels of 1 to 63
// letters, digits and inner hyphens, at least two of them, 253 bytes in all
// (RFC 1123 section 2.1, RFC 6066 section 3). Addresses are no names.
// The error is network.name-malformed.
func CheckName(name string) error {
	labels := strings.Split(name, ".")
	sound := len(name) <= 253 && len(labels) >= 2
	for _, label := range labels {
		sound = sound && len(label) >= 1 && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-' &&
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
	}
	if _, err := netip.ParseAddr(name); !sound || err == nil {
		return contract.Refuse("network.name-malformed", "use a host name in lower case, such as job-1.guests.example.org", "%q is no name to route by", name)
	}
	return nil
}

// Under says whether the name is one label below the suffix.
func Under(name, suffix string) bool {
	label, ok := strings.CutSuffix(name, "."+suffix)
	return ok && label != "" && !strings.Contains(label, ".")
}
