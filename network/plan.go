package network

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/knftables"
)

const (
	// metadataAddr is the host's end of every tap; contract.MetadataAddr.
	metadataAddr = "fe80::1"
	metadataPort = 80
	// maxConnections is how many connections one guest may have open through
	// the host. The host's table of connections is shared by all: its default
	// size is 65536 to 262144 entries (nf_conntrack_max), and a guest that
	// fills it would cut everybody off.
	maxConnections = 8192
	// neighbourRate and neighbourBurst bound what one guest can make the
	// host's neighbour discovery do, and its ARP.
	neighbourRate, neighbourBurst = 50, 50
	// burstShare of a second's packets may come at once: a tenth.
	burstShare = 10
	// maxCounted bounds the clients whose connections are counted.
	maxCounted = 16384
	// spoofPriority runs before connection tracking (-200) and after
	// reassembly (-400); linux/netfilter_ipv4.h, enum nf_ip_hook_priorities.
	spoofPriority = -310
	// ownPriority runs before chains at the usual filter priority, 0.
	ownPriority = -10
	// ingressPriority has no neighbours of note.
	ingressPriority = -500
)

// member is a guest that has a link.
type member struct {
	guest Guest
	link  Link
}

// denied4 is what guests do not reach by IPv4 unless the operator allows it:
// this network, private (RFC 1918), CGNAT (RFC 6598), loopback, link-local
// (cloud metadata services live there), multicast, reserved.
func denied4() []netip.Prefix {
	return prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
		"172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4", "240.0.0.0/4")
}

// table is everything of ours in nftables: the table of that name in the inet
// family and, for the chains that have a device, the one in the netdev family.
type table struct {
	name   string
	sets   []set
	chains []chain
}

type set struct {
	name, typ string
	// value is the type of a map's values; "" makes it a set.
	value    string
	interval bool
	// size bounds a set that rules add to; 0 is one that they do not.
	size     uint64
	elements [][2][]string // key, value
}

type chain struct {
	name string
	// typ "" is a regular chain.
	typ, hook, device string
	priority          int
	drop              bool
	rules             []rule
}

type rule struct{ text, why string }

// plan decides the whole table. Taps that are ours by name and alias but
// belong to no known guest are strays: nothing passes them.
func plan(cfg Config, guests map[string]member, strays []string) table {
	members := make([]member, 0, len(guests))
	for _, m := range guests {
		members = append(members, m)
	}
	slices.SortFunc(members, func(a, b member) int { return cmp.Compare(a.guest.Index, b.guest.Index) })
	t := table{name: cfg.table(), sets: planSets(cfg, members, strays)}
	for _, m := range members {
		t.chains = append(t.chains, frameChains(cfg, m)...)
	}
	t.chains = append(t.chains, spoofChains()...)
	t.chains = append(t.chains, toHostChain(), transitChain(), toGuestChain(cfg), fromGuestChain(cfg, members),
		chain{
			name: "publish", typ: "nat", hook: "prerouting", priority: -100,
			rules: []rule{{"iifname != @taps fib daddr type local dnat ip to tcp dport map @published", "published ports"}},
		},
		chain{
			name: "egress", typ: "nat", hook: "postrouting", priority: 100,
			rules: []rule{{"ip saddr " + cfg.GuestCIDR.String() + " oifname != @taps masquerade", "guests leave with the host's address"}},
		})
	return t
}

func planSets(cfg Config, members []member, strays []string) []set {
	taps := set{name: "taps", typ: "ifname"}
	stray := set{name: "strays", typ: "ifname"}
	v4 := set{name: "guests4", typ: "ifname . ether_addr . ipv4_addr"}
	v6 := set{name: "guests6", typ: "ifname . ether_addr . ipv6_addr"}
	published := set{name: "published", typ: "inet_service", value: "ipv4_addr . inet_service"}
	for _, m := range members {
		tap, mac := strconv.Quote(m.link.Device), m.guest.MAC.String()
		taps.add(tap)
		v4.add(tap, mac, m.link.GuestAddr.Addr().String())
		v6.add(tap, mac, m.link.GuestLinkLocal.String())
		for _, p := range m.guest.Ports {
			published.elements = append(published.elements, [2][]string{
				{strconv.Itoa(int(p.Host))},
				{m.link.GuestAddr.Addr().String(), strconv.Itoa(int(p.Guest))},
			})
		}
	}
	slices.Sort(strays)
	for _, tap := range strays {
		tap = devicePrefix + strings.TrimPrefix(tap, tapPrefix)
		taps.add(strconv.Quote(tap))
		stray.add(strconv.Quote(tap))
	}
	denied := set{name: "denied", typ: "ipv4_addr", interval: true}
	for _, p := range denied4() {
		denied.add(p.String())
	}
	allowed := set{name: "allowed", typ: "ipv4_addr", interval: true}
	for _, p := range outermost(cfg.AllowPrivateEgress) {
		allowed.add(p.String())
	}
	// When a set is full, further clients are not counted; those of one port
	// still are.
	counted := []set{{name: "by_source", typ: "ipv4_addr", size: maxCounted}, {name: "by_port", typ: "ipv4_addr . inet_service", size: maxCounted}}
	return append([]set{taps, stray, v4, v6, published, denied, allowed}, counted...)
}

func (s *set) add(key ...string) { s.elements = append(s.elements, [2][]string{key, nil}) }

// frameChains carry frames between a guest's tap and its device. The one looks
// at what the guest sends before anything else on the host does. They are in
// the netdev table: the inet family's ingress hook passes everything that is
// not IP unseen (linux net/netfilter/nft_chain_filter.c,
// nft_do_chain_inet_ingress). A tag is taken off a frame before the hook, and
// only "ether type" still shows it (net/core/dev.c, skb_vlan_untag).
func frameChains(cfg Config, m member) []chain {
	mac, carry := m.guest.MAC.String(), fmt.Sprintf(" fwd to %q", m.link.wire())
	frames := func(name, device string, rules ...rule) chain {
		return chain{name: name + device, typ: "filter", hook: "ingress", device: device, priority: ingressPriority, drop: true, rules: rules}
	}
	return []chain{
		frames("in_", m.link.Tap, slices.Concat(packetRules(cfg), []rule{
			{"ether saddr != " + mac + " drop", "only the guest's NIC"},
			{"ether type != { ip, ip6, arp } drop", "nothing but IP, no tags"},
			{fmt.Sprintf("ether type arp limit rate over %d/second burst %d packets drop", neighbourRate, neighbourBurst), "ARP is broadcast"},
			{"arp saddr ether " + mac + " arp saddr ip " + m.link.GuestAddr.Addr().String() + carry, "only the guest's own ARP"},
			{"ether type arp drop", "others' ARP"},
			{"ip saddr != " + m.link.GuestAddr.Addr().String() + " drop", "only the guest's IPv4 address"},
			{"meta protocol ip meta pkttype { broadcast, multicast } drop", "IPv4 is for one"},
			{"ip hdrlength > 5 drop", "IP options"},
			{"ip frag-off & 0x3fff != 0 drop", "fragments: all share the host's memory for them"},
			{"ip daddr { " + joined(unallowable()) + " } drop", "never forwarded"},
			{fmt.Sprintf("ip6 saddr != { %s, :: } drop", m.link.GuestLinkLocal), "only the guest's IPv6 address"},
			{"ip6 daddr != { " + metadataAddr + ", ff02::1, ff02::1:ff00:0/104 } drop", "metadata and neighbour discovery"},
			{"ip6 nexthdr != { tcp, ipv6-icmp } drop", "extension headers, what metadata does not speak"},
			{fmt.Sprintf("icmpv6 type nd-neighbor-advert @th,64,128 != 0x%x drop", m.link.GuestLinkLocal.AsSlice()), "advertises itself only"},
			{fmt.Sprintf("icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } limit rate over %d/second burst %d packets drop",
				neighbourRate, neighbourBurst), "neighbour discovery is for all"},
			{carry[1:], "to the host"},
		})...),
		frames("out_", m.link.wire(), rule{fmt.Sprintf("fwd to %q", m.link.Tap), "to the guest"}),
	}
}

// packetRules bound what a guest may send at all, before anything else looks at
// it. A packet counts once, however large the guest's offload made it.
func packetRules(cfg Config) []rule {
	if cfg.MaxGuestPackets <= 0 {
		return nil
	}
	return []rule{{fmt.Sprintf("limit rate over %d/second burst %d packets drop", cfg.MaxGuestPackets, max(cfg.MaxGuestPackets/burstShare, 1)), "packets of one guest"}}
}

func joined(list []netip.Prefix) string {
	text := make([]string, len(list))
	for i, p := range list {
		text[i] = p.String()
	}
	return strings.Join(text, ", ")
}

func spoofChains() []chain {
	meta := fmt.Sprintf("ip6 daddr %s tcp dport %d accept", metadataAddr, metadataPort)
	return []chain{
		{name: "sender", rules: []rule{
			{"iifname . ether saddr . ip saddr @guests4 accept", "the guest's IPv4 address"},
			{"iifname . ether saddr . ip6 saddr @guests6 " + meta, "metadata"},
			{"iifname . ether saddr . ip6 saddr @guests6 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept", "neighbour discovery"},
			{"ip6 saddr :: icmpv6 type nd-neighbor-solicit accept", "duplicate address detection"},
			{"drop", "any other sender, IPv6 to anywhere else"},
		}},
		{name: "spoof", typ: "filter", hook: "prerouting", priority: spoofPriority, rules: []rule{
			{"iifname @strays drop", "tap without a known guest"},
			{"iifname @taps jump sender", "guests send as themselves"},
		}},
	}
}

func toHostChain() chain {
	return chain{name: "to_host", typ: "filter", hook: "input", priority: ownPriority, rules: []rule{
		{"iifname != @taps accept", "not a guest"},
		{"ct state established,related accept", "answers to the host"},
		{fmt.Sprintf("ip6 daddr %s tcp dport %d accept", metadataAddr, metadataPort), "metadata"},
		{"icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept", "neighbour discovery"},
		{"drop", "the host's addresses are not for guests"},
	}}
}

func transitChain() chain {
	return chain{name: "transit", typ: "filter", hook: "forward", priority: ownPriority, rules: []rule{
		{"iifname @taps oifname @taps drop", "guest to guest"},
		{"oifname @taps goto to_guest", "to a guest"},
		{"iifname @taps goto from_guest", "from a guest"},
	}}
}

func toGuestChain(cfg Config) chain {
	const published = "ct state new ct status dnat"
	c := chain{name: "to_guest", rules: []rule{{"ct state established,related accept", "answers to the guest"}}}
	if n := cfg.MaxSourceConnections; n > 0 {
		c.rules = append(c.rules, rule{fmt.Sprintf("%s update @by_source { ip saddr ct count over %d } reject with tcp reset", published, n), "connections of one client"})
	}
	if n := cfg.MaxPortConnections; n > 0 {
		c.rules = append(c.rules, rule{fmt.Sprintf("%s update @by_port { ip daddr . tcp dport ct count over %d } reject with tcp reset", published, n), "connections to one port"})
	}
	c.rules = append(c.rules, rule{published + " accept", "published ports"}, rule{"drop", "nothing else reaches a guest"})
	return c
}

func fromGuestChain(cfg Config, members []member) chain {
	c := chain{name: "from_guest", rules: []rule{
		{"meta nfproto ipv6 drop", "guests have no IPv6 egress"},
		{"ct state established,related accept", "answers of the guest"},
		{"ct state != new drop", "neither new nor known"},
		{"ip daddr " + cfg.GuestCIDR.String() + " drop", "other guests' range"},
	}}
	for _, m := range members {
		c.rules = append(c.rules, rule{
			fmt.Sprintf("iifname %q ct count over %d drop", m.link.Device, maxConnections), "connections of one guest",
		})
	}
	c.rules = append(c.rules,
		rule{"ip daddr @allowed accept", "allowed by the operator"},
		rule{"ip daddr @denied drop", "private and special ranges"},
		rule{"accept", "the outside"})
	return c
}

// outermost drops prefixes that lie within another: an interval set refuses
// overlaps.
func outermost(in []netip.Prefix) []netip.Prefix {
	sorted := slices.Clone(in)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
	})
	var out []netip.Prefix
	for _, p := range sorted {
		if !slices.ContainsFunc(out, p.Overlaps) {
			out = append(out, p)
		}
	}
	return out
}

// rules counts the rules of the table.
func (t table) rules() (n int) {
	for _, c := range t.chains {
		n += len(c.rules)
	}
	return n
}

// fill writes the whole table into one transaction: what was there goes and
// what is planned comes, with no moment in between.
func (t table) fill(tx *knftables.Transaction) {
	t.clear(tx)
	for _, family := range families() {
		tx.Add(&knftables.Table{Family: family, Name: t.name})
	}
	const inet = knftables.InetFamily
	for _, s := range t.sets {
		var flags []knftables.SetFlag
		if s.interval {
			flags = []knftables.SetFlag{knftables.IntervalFlag}
		}
		var size *uint64
		if s.size > 0 {
			flags, size = []knftables.SetFlag{knftables.DynamicFlag}, &s.size
		}
		if s.value != "" {
			tx.Add(&knftables.Map{Family: inet, Table: t.name, Name: s.name, Type: s.typ + " : " + s.value, Flags: flags})
		} else {
			tx.Add(&knftables.Set{Family: inet, Table: t.name, Name: s.name, Type: s.typ, Flags: flags, Size: size})
		}
	}
	for _, c := range t.chains {
		tx.Add(c.object(t.name))
	}
	for _, s := range t.sets {
		for _, e := range s.elements {
			element := &knftables.Element{Family: inet, Table: t.name, Set: s.name, Key: e[0]}
			if s.value != "" {
				element.Set, element.Map, element.Value = "", s.name, e[1]
			}
			tx.Add(element)
		}
	}
	for _, c := range t.chains {
		for _, r := range c.rules {
			tx.Add(&knftables.Rule{Family: c.family(), Table: t.name, Chain: c.name, Rule: counted(r.text), Comment: &r.why})
		}
	}
}

// counted adds a counter to every rule that drops.
func counted(rule string) string {
	if match, drops := strings.CutSuffix(rule, "drop"); drops {
		return match + "counter drop"
	}
	return rule
}

// clear removes the table, whether it is there or not.
func (t table) clear(tx *knftables.Transaction) {
	for _, family := range families() {
		tx.Add(&knftables.Table{Family: family, Name: t.name})
		tx.Delete(&knftables.Table{Family: family, Name: t.name})
	}
}

func families() []knftables.Family {
	return []knftables.Family{knftables.InetFamily, knftables.NetDevFamily}
}

func (c chain) family() knftables.Family {
	if c.device != "" {
		return knftables.NetDevFamily
	}
	return knftables.InetFamily
}

func (c chain) object(table string) *knftables.Chain {
	out := &knftables.Chain{Family: c.family(), Table: table, Name: c.name}
	if c.typ == "" {
		return out
	}
	policy := knftables.AcceptPolicy
	if c.drop {
		policy = knftables.DropPolicy
	}
	out.Type = new(knftables.BaseChainType(c.typ))
	out.Hook = new(knftables.BaseChainHook(c.hook))
	out.Priority = new(knftables.BaseChainPriority(strconv.Itoa(c.priority)))
	out.Policy = &policy
	if c.device != "" {
		out.Device = &c.device
	}
	return out
}
