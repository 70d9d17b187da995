package network

import (
	"flag"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/knftables"

	"github.com/confidential-node/agent/firmware/contract"
)

var update = flag.Bool("update", false, "rewrite golden files")

func testConfig() Config {
	return Config{GuestCIDR: netip.MustParsePrefix("10.213.0.0/16"), PublishedPorts: Range{20000, 29999}, MaxPortConnections: 1024, MaxSourceConnections: 128, MaxGuestPackets: 250000}
}

func testGuest(index uint32) Guest {
	return Guest{
		ID: "guest-" + string(rune('a'+index)), Index: index,
		MAC: net.HardwareAddr{0x52, 0x54, 0, 0, 1, byte(index)},
	}
}

func TestATapNamesItsSlot(t *testing.T) {
	t.Parallel()
	link, err := Describe(testConfig(), testGuest(5))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{link.Tap: true, link.Device: false, "nt": false, "ntxyz": false, "": false, "eth0": false} {
		slot, ok := Tap{Name: name}.Slot()
		if ok != want || (ok && slot != 5) {
			t.Errorf("%q: slot %d, %v", name, slot, ok)
		}
	}
}

func members(t *testing.T, cfg Config, guests ...Guest) map[string]member {
	t.Helper()
	out := map[string]member{}
	for _, g := range guests {
		l, err := Describe(cfg, g)
		if err != nil {
			t.Fatal(err)
		}
		out[g.ID] = member{g, l}
	}
	return out
}

func refusalCode(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}

func TestDescribeGivesEachSlotItsOwnThirty(t *testing.T) {
	t.Parallel()
	for index, want := range map[uint32]Link{
		0:     {"nt00000000", "na00000000", netip.MustParsePrefix("10.213.0.1/30"), netip.MustParsePrefix("10.213.0.2/30"), netip.MustParseAddr("fe80::5054:ff:fe00:107")},
		1:     {"nt00000001", "na00000001", netip.MustParsePrefix("10.213.0.5/30"), netip.MustParsePrefix("10.213.0.6/30"), netip.MustParseAddr("fe80::5054:ff:fe00:107")},
		64:    {"nt00000040", "na00000040", netip.MustParsePrefix("10.213.1.1/30"), netip.MustParsePrefix("10.213.1.2/30"), netip.MustParseAddr("fe80::5054:ff:fe00:107")},
		16383: {"nt00003fff", "na00003fff", netip.MustParsePrefix("10.213.255.253/30"), netip.MustParsePrefix("10.213.255.254/30"), netip.MustParseAddr("fe80::5054:ff:fe00:107")},
	} {
		got, err := Describe(testConfig(), Guest{ID: "g", Index: index, MAC: net.HardwareAddr{0x52, 0x54, 0, 0, 1, 7}})
		if err != nil || got != want {
			t.Errorf("slot %d is %+v, %v; want %+v", index, got, err, want)
		}
	}
	_, err := Describe(testConfig(), Guest{ID: "g", Index: 16384, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}})
	if refusalCode(err) != "network.pool-exhausted" {
		t.Errorf("slot beyond the pool: %v", err)
	}
}

func TestDescribeRefusesMalformedWishes(t *testing.T) {
	t.Parallel()
	good := testGuest(1)
	for name, bad := range map[string]func(*Config, *Guest){
		"IPv6 pool":             func(c *Config, _ *Guest) { c.GuestCIDR = netip.MustParsePrefix("fd00::/64") },
		"no pool":               func(c *Config, _ *Guest) { c.GuestCIDR = netip.Prefix{} },
		"host bits in pool":     func(c *Config, _ *Guest) { c.GuestCIDR = netip.MustParsePrefix("10.213.0.1/16") },
		"multicast pool":        func(c *Config, _ *Guest) { c.GuestCIDR = netip.MustParsePrefix("224.0.0.0/16") },
		"loopback allowed":      func(c *Config, _ *Guest) { c.AllowPrivateEgress = prefixes("127.0.0.0/8") },
		"everything allowed":    func(c *Config, _ *Guest) { c.AllowPrivateEgress = prefixes("0.0.0.0/0") },
		"guests allowed":        func(c *Config, _ *Guest) { c.AllowPrivateEgress = prefixes("10.0.0.0/8") },
		"IPv6 allowed":          func(c *Config, _ *Guest) { c.AllowPrivateEgress = prefixes("fc00::/7") },
		"table name with blank": func(c *Config, _ *Guest) { c.Table = "a b" },
		"upside-down ports":     func(c *Config, _ *Guest) { c.PublishedPorts = Range{2, 1} },
		"no id":                 func(_ *Config, g *Guest) { g.ID = "" },
		"id with newline":       func(_ *Config, g *Guest) { g.ID = "a\nb" },
		"no MAC":                func(_ *Config, g *Guest) { g.MAC = nil },
		"multicast MAC":         func(_ *Config, g *Guest) { g.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 1} },
		"port outside":          func(_ *Config, g *Guest) { g.Ports = []Publish{{22, 22}} },
		"port zero":             func(c *Config, g *Guest) { c.PublishedPorts = Range{}; g.Ports = []Publish{{0, 22}} },
		"port twice":            func(_ *Config, g *Guest) { g.Ports = []Publish{{20000, 1}, {20000, 2}} },
		"too many ports": func(_ *Config, g *Guest) {
			for i := range uint16(17) {
				g.Ports = append(g.Ports, Publish{20000 + i, 1})
			}
		},
	} {
		cfg, g := testConfig(), good
		bad(&cfg, &g)
		if l, err := Describe(cfg, g); err == nil {
			t.Errorf("%s: accepted as %+v", name, l)
		}
	}
}

func TestConflictsAreRefused(t *testing.T) {
	t.Parallel()
	first := testGuest(1)
	first.Ports = []Publish{{20000, 80}}
	others := members(t, testConfig(), first)
	for name, c := range map[string]struct {
		change func(*Guest)
		code   string
	}{
		"nothing shared": {func(*Guest) {}, ""},
		"same guest":     {func(g *Guest) { *g = first }, ""},
		"slot":           {func(g *Guest) { g.Index = 1 }, "network.slot-in-use"},
		"MAC":            {func(g *Guest) { g.MAC = first.MAC }, "network.mac-in-use"},
		"port":           {func(g *Guest) { g.Ports = []Publish{{20000, 81}} }, "network.port-in-use"},
		"guest's port":   {func(g *Guest) { g.Ports = []Publish{{20001, 80}} }, ""},
	} {
		g := testGuest(2)
		c.change(&g)
		if got := refusalCode(conflict(g, others)); got != c.code {
			t.Errorf("%s: refused as %q, want %q", name, got, c.code)
		}
	}
}

// TestTableText compares the whole table with a file that people review.
func TestTableText(t *testing.T) {
	t.Parallel()
	one := testGuest(1)
	two := testGuest(2)
	two.Ports = []Publish{{20000, 8000}, {20001, 22}}
	open := testConfig()
	open.AllowPrivateEgress = prefixes("192.168.7.0/24", "192.168.0.0/16", "100.64.0.0/24")
	for name, p := range map[string]table{
		"empty":   plan(testConfig(), nil, nil),
		"guests":  plan(testConfig(), members(t, testConfig(), two, one), nil),
		"strays":  plan(testConfig(), members(t, testConfig(), one), []string{"na00000009", "na00000005"}),
		"allowed": plan(open, members(t, open, one), nil),
	} {
		fake := knftables.NewFake("", "")
		tx := fake.NewTransaction()
		p.fill(tx)
		if err := fake.Run(t.Context(), tx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		file := "testdata/" + name + ".nft"
		if *update {
			if err := os.WriteFile(file, []byte(tx.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := tx.String(); got != string(want) {
			t.Errorf("%s differs from %s (run with -update and review):\n%s", name, file, got)
		}
	}
}

func TestPlanDoesNotDependOnOrder(t *testing.T) {
	t.Parallel()
	text := func(strays []string) string {
		p := plan(testConfig(), members(t, testConfig(), testGuest(3), testGuest(1), testGuest(2)), strays)
		fake := knftables.NewFake("", "")
		tx := fake.NewTransaction()
		p.fill(tx)
		return tx.String()
	}
	first := text([]string{"na00000009", "na00000008"})
	for range 20 {
		if text([]string{"na00000008", "na00000009"}) != first {
			t.Fatal("two plans of the same guests differ")
		}
	}
}

func TestOutermostKeepsNoOverlap(t *testing.T) {
	t.Parallel()
	got := outermost(prefixes("10.1.0.0/16", "10.0.0.0/8", "192.168.1.0/24", "10.1.2.0/24", "192.168.1.0/24"))
	if want := prefixes("10.0.0.0/8", "192.168.1.0/24"); !slices.Equal(got, want) {
		t.Errorf("outermost is %v, want %v", got, want)
	}
}

const foreignRuleset = `{"nftables": [{"metainfo": {"json_schema_version": 1}},
{"chain": {"family": "inet", "table": "nodeagent", "name": "in_na00000001", "type": "filter", "hook": "forward", "prio": -500, "policy": "drop"}},
{"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
{"chain": {"family": "ip", "table": "filter", "name": "INPUT", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}},
{"chain": {"family": "ip6", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
{"chain": {"family": "inet", "table": "firewalld", "name": "filter_FORWARD", "type": "filter", "hook": "forward", "prio": 10, "policy": "accept"}},
{"chain": {"family": "inet", "table": "firewalld", "name": "filter_INPUT", "type": "filter", "hook": "input", "prio": 10, "policy": "accept"}},
{"chain": {"family": "inet", "table": "firewalld", "name": "helper"}},
{"rule": {"family": "inet", "table": "firewalld", "chain": "helper", "expr": [{"drop": null}]}},
{"rule": {"family": "inet", "table": "firewalld", "chain": "filter_FORWARD", "expr": [{"match": {"op": "in"}}, {"drop": null}]}},
{"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "expr": [{"counter": {"packets": 0}}, {"reject": {"type": "icmpx"}}]}}]}`

func TestForeignDropsAreFoundAndOthersAreNot(t *testing.T) {
	t.Parallel()
	found, err := parseForeign([]byte(foreignRuleset), "nodeagent")
	if err != nil {
		t.Fatal(err)
	}
	got := make([]string, 0, len(found))
	for _, c := range found {
		got = append(got, c.String()+" "+c.hook)
	}
	if want := []string{"ip filter FORWARD forward", "inet firewalld filter_INPUT input"}; !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
}

func FuzzParseForeign(f *testing.F) {
	f.Add([]byte(foreignRuleset))
	f.Add([]byte(`{"nftables":[{"rule":{}},{"chain":null}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		found, err := parseForeign(data, "nodeagent")
		for _, c := range found {
			if err != nil || c.how == "" {
				t.Errorf("found %v with error %v", c, err)
			}
		}
	})
}

func TestNFTErrorsAreClassified(t *testing.T) {
	t.Parallel()
	err := classify("nft", []string{"list"}, "Error: No such file or directory\nlist table inet nodeagent\n                ^^^^^^^^^\n", os.ErrInvalid)
	if err != errTableMissing { //nolint:errorlint // the sentinel itself is returned
		t.Errorf("missing table is %v", err)
	}
	err = classify("nft", []string{"list"}, "Error: syntax error, unexpected newline\nlist\n    ^\n", os.ErrInvalid)
	if text := err.Error(); strings.Contains(text, "\n") || !strings.Contains(text, "syntax error") {
		t.Errorf("error is %q", text)
	}
}
