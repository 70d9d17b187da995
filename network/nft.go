package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"sigs.k8s.io/knftables"

	"github.com/confidential-node/agent/firmware/contract"
)

const (
	// nftTimeout bounds one run of nft. It takes milliseconds; a host under
	// load, seconds.
	nftTimeout = 15 * time.Second
	// maxListing bounds what nft may print.
	maxListing = 32 << 20
)

// errTableMissing means our table is not in the kernel.
var errTableMissing = errors.New("table does not exist")

// nft runs the nft tool. Tables are written through knftables; listings, which
// it cannot give in full, are read here.
type nft struct {
	table, root string
	mu          sync.Mutex
	conn        knftables.Interface // opened at first use
}

func (n *nft) open() (knftables.Interface, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conn == nil {
		conn, err := knftables.New("", "") // both families in one transaction
		if err != nil {
			return nil, contract.Refuse("network.nft-unusable", "install nftables 1.0.6 or later and run as root",
				"the host's nftables cannot be used").Because(err)
		}
		n.conn = conn
	}
	return n.conn, nil
}

// write replaces the whole table.
func (n *nft) write(ctx context.Context, t table) error {
	conn, err := n.open()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	tx := conn.NewTransaction()
	t.fill(tx)
	if err := conn.Run(ctx, tx); err != nil {
		return fmt.Errorf("writing nft table %s: %w", n.table, err)
	}
	return nil
}

// erase removes the table; one that is gone is erased.
func (n *nft) erase(ctx context.Context) error {
	conn, err := n.open()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	tx := conn.NewTransaction()
	table{name: n.table}.clear(tx)
	if err := conn.Run(ctx, tx); err != nil {
		return fmt.Errorf("deleting nft table %s: %w", n.table, err)
	}
	return nil
}

// read returns the table's text without counters and other moving state.
func (n *nft) read(ctx context.Context) (string, error) {
	var text strings.Builder
	for _, family := range families() {
		out, err := run(ctx, "nft", "--stateless", "list", "table", string(family), n.table)
		if err != nil {
			return "", err
		}
		text.Write(out)
	}
	return withoutCounted(text.String()), nil
}

// withoutCounted takes out what the kernel itself adds to the sets that count
// connections. Braces never nest in them.
func withoutCounted(listing string) string {
	return regexp.MustCompile(`(\tset by_(?:source|port) \{[^}]*?)\t\telements = \{[^}]*\}\n`).ReplaceAllString(listing, "$1")
}

// ruleset returns everything in nftables as JSON.
func (n *nft) ruleset(ctx context.Context) ([]byte, error) {
	return run(ctx, "nft", "--json", "--stateless", "list", "ruleset")
}

// run is the one place that starts a tool. What it says on stderr stays in the
// local error.
func run(ctx context.Context, tool string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, tool, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	stdout, stderr := &bounded{limit: maxListing}, &bounded{limit: 4 << 10}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := cmd.Run(); err != nil {
		return nil, classify(tool, args, stderr.String(), err)
	}
	if stdout.cut {
		return nil, fmt.Errorf("running %s: more than %d bytes of output", tool, maxListing)
	}
	return stdout.Bytes(), nil
}

// classify turns nft's stderr into an error. "No such file or directory" is
// strerror(ENOENT) for an object that is not there (nftables 1.0.6,
// src/libnftables.c, netlink_io_error).
func classify(tool string, args []string, stderr string, err error) error {
	if strings.Contains(stderr, "No such file or directory") {
		return errTableMissing
	}
	line, _, _ := strings.Cut(strings.TrimSpace(stderr), "\n")
	return fmt.Errorf("running %s %s: %w: %s", tool, strings.Join(args, " "), err, line)
}

// bounded keeps the first limit bytes.
type bounded struct {
	bytes.Buffer
	limit int
	cut   bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.limit - b.Len(); len(p) > room {
		b.cut = true
		b.Buffer.Write(p[:max(room, 0)])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}

// foreignChain is a base chain of somebody else's that ends in a drop.
type foreignChain struct{ family, table, name, hook, how string }

func (c foreignChain) String() string { return c.family + " " + c.table + " " + c.name }

// parseForeign finds, in `nft --json list ruleset`, base chains outside our
// table that drop or reject at their end what guests need: forwarded IPv4, or
// IPv6 to the host.
func parseForeign(ruleset []byte, own string) ([]foreignChain, error) {
	var doc struct {
		Nftables []struct {
			Chain *struct{ Family, Table, Name, Type, Hook, Policy string }
			Rule  *struct {
				Family, Table, Chain string
				Expr                 []map[string]json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(ruleset, &doc); err != nil {
		return nil, fmt.Errorf("reading nft's ruleset: %w", err)
	}
	type key struct{ family, table, chain string }
	found := map[key]*foreignChain{}
	var order []key
	for _, o := range doc.Nftables {
		c := o.Chain
		if c == nil || c.Type != "filter" || (c.Family == "inet" && c.Table == own) {
			continue
		}
		forward := c.Hook == "forward" && slices.Contains([]string{"ip", "inet"}, c.Family)
		input := c.Hook == "input" && slices.Contains([]string{"ip6", "inet"}, c.Family)
		if forward || input {
			k := key{c.Family, c.Table, c.Name}
			found[k] = &foreignChain{family: c.Family, table: c.Table, name: c.Name, hook: c.Hook}
			order = append(order, k)
			if c.Policy == "drop" {
				found[k].how = "its policy is drop"
			}
		}
	}
	for _, o := range doc.Nftables {
		if o.Rule == nil {
			continue
		}
		if c := found[key{o.Rule.Family, o.Rule.Table, o.Rule.Chain}]; c != nil && unconditionalDrop(o.Rule.Expr) {
			c.how = "it ends in a drop or reject for everything"
		}
	}
	var out []foreignChain
	for _, k := range order {
		if found[k].how != "" {
			out = append(out, *found[k])
		}
	}
	return out, nil
}

// unconditionalDrop reports whether a rule drops whatever reaches it.
func unconditionalDrop(expr []map[string]json.RawMessage) bool {
	drops := false
	for _, e := range expr {
		for kind := range e {
			switch kind {
			case "drop", "reject":
				drops = true
			case "counter", "log":
			default:
				return false
			}
		}
	}
	return drops
}
