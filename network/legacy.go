package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// legacyFamily is one family of the packet filter before nftables (x_tables).
// nft neither lists nor flushes it, and what it drops is dropped for all.
type legacyFamily struct {
	// names lists, under /proc, the tables in use.
	names string
	// chain is the one that guests' packets pass.
	chain      string
	save, tool string
}

func legacyFamilies() []legacyFamily {
	return []legacyFamily{
		{"thread-self/net/ip_tables_names", "FORWARD", "iptables-legacy-save", "iptables-legacy"},
		{"thread-self/net/ip6_tables_names", "INPUT", "ip6tables-legacy-save", "ip6tables-legacy"},
	}
}

// legacyFindings looks at chains of iptables-legacy that drop at their end.
// Asking for a table would make it, so that only those in use are looked at.
func (n *nft) legacyFindings(ctx context.Context) ([]Finding, error) {
	var out []Finding
	for _, f := range legacyFamilies() {
		names, err := os.ReadFile(filepath.Join(n.root, "proc", f.names))
		if errors.Is(err, os.ErrNotExist) {
			continue // a kernel without
		}
		if err != nil {
			return out, fmt.Errorf("reading tables of %s: %w", f.tool, err)
		}
		if !slices.Contains(strings.Fields(string(names)), "filter") {
			continue
		}
		saved, err := run(ctx, f.save, "-t", "filter")
		if errors.Is(err, exec.ErrNotFound) {
			out = append(out, Finding{
				FindingLegacyUnread, f.tool + " filter", "the table is in use and can drop what guests send, but there is no " + f.save + " to look at it with",
				"install iptables, then look again; or remove the table by a reboot without the program that made it",
			})
			continue
		}
		if err != nil {
			return out, err
		}
		if how := parseLegacy(string(saved), f.chain); how != "" {
			out = append(out, f.finding(how))
		}
	}
	return out, nil
}

func (f legacyFamily) finding(how string) Finding {
	object := f.tool + " filter " + f.chain
	x := Finding{
		Code: FindingForwardDrop, Object: object,
		Message: fmt.Sprintf("chain %s can drop what guests send and receive: %s", object, how),
		Remedy: fmt.Sprintf("accept interfaces na+ there before the drop, for instance: %s -I FORWARD -i na+ -j ACCEPT; %s -I FORWARD -o na+ -j ACCEPT",
			f.tool, f.tool),
	}
	if f.chain == "INPUT" {
		x.Code = FindingInputDrop
		x.Message = fmt.Sprintf("chain %s can drop guests' requests to the metadata service: %s", object, how)
		x.Remedy = fmt.Sprintf("accept interfaces na+ there before the drop, for instance: %s -I INPUT -i na+ -j ACCEPT", f.tool)
	}
	return x
}

// parseLegacy says, of what iptables-save printed, how a chain drops whatever
// reaches its end; "" when it does not. Rules with conditions are not judged.
func parseLegacy(saved, chain string) (how string) {
	for line := range strings.Lines(saved) {
		f := strings.Fields(line)
		switch {
		case len(f) < 2:
		case f[0] == ":"+chain && f[1] == "DROP":
			how = "its policy is DROP"
		case f[0] == "-A" && f[1] == chain && len(f) >= 4 && f[2] == "-j" && (f[3] == "DROP" || f[3] == "REJECT"):
			how = "it ends in a drop or reject for everything"
		}
	}
	return how
}
