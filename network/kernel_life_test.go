package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/tests/skip"
)

func TestKernelRestoresRulesUnderRunningConnections(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	runHost(t, w.host)
	var conn net.Conn
	m.do(t, func() (err error) { _, conn, err = reach(outsideAddr+service, ""); return err })
	echo := func(text string) {
		t.Helper()
		buf := make([]byte, 16)
		if _, err := conn.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(buf); err != nil || string(buf[:n]) != text {
			t.Fatalf("echo of %q is %q, %v", text, buf[:n], err)
		}
		// What the outside sends while nothing translates, the host takes for
		// its own and resets. It repeats what is not acknowledged.
		eventually(t, "the outside has heard that its answer arrived", func() bool { return w.acknowledged(t) })
	}
	echo("before")
	want := nftTool(t, "--stateless", "list", "ruleset")
	restored := func() bool { return nftTool(t, "--stateless", "list", "ruleset") == want }
	for _, change := range [][]string{
		{"flush", "ruleset"},
		{"delete", "chain", "inet", "nodeagent", "egress"},
		{"insert", "rule", "inet", "nodeagent", "from_guest", "accept"},
		{"flush", "chain", "netdev", "nodeagent", "in_nt00000001"},
		{"flush", "set", "inet", "nodeagent", "denied"},
		{"add", "element", "inet", "nodeagent", "allowed", "{ 10.0.0.0/8 }"},
	} {
		if change[0] == "delete" {
			nftTool(t, "flush", "chain", "inet", "nodeagent", "egress")
		}
		nftTool(t, change...)
		eventually(t, "the table is restored after "+strings.Join(change, " "), restored)
		m.do(t, func() error { return blockedDial("10.9.9.9" + service) })
		echo("after")
	}
	// Somebody else's table changes: nothing to do.
	nftTool(t, "add", "table", "inet", "somebody")
	nftTool(t, "delete", "table", "inet", "somebody")
	if !restored() {
		t.Error("table changed")
	}
}

// acknowledged says that no connection of the outside's service waits for an
// acknowledgement.
func (w *world) acknowledged(t *testing.T) bool {
	t.Helper()
	var table []byte
	w.outside.do(t, func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/tcp6")
		return err
	})
	for line := range strings.Lines(string(table)) {
		// Documentation/networking/proc_net_tcp.rst: local address, remote
		// address, state, queue to send.
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasSuffix(f[1], ":1B58") && f[3] == "01" && !strings.HasPrefix(f[4], "00000000:") {
			return false
		}
	}
	return true
}

func TestKernelForeignDropIsAFinding(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	if codes := findingCodes(t, w.host); len(codes) != 0 {
		t.Errorf("findings on a clean host: %q", codes)
	}
	nftTool(t, "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }")
	nftTool(t, "add table inet other; add chain inet other input { type filter hook input priority 0 ; }; add rule inet other input counter reject")
	m.do(t, func() error { return blockedDial(outsideAddr + service) })
	found, err := w.host.Findings(t.Context())
	if err != nil || len(found) != 2 || found[0].Code != FindingForwardDrop || found[1].Code != FindingInputDrop {
		t.Fatalf("findings are %+v, %v", found, err)
	}
	if found[0].Object != "ip filter FORWARD" {
		t.Errorf("found %q", found[0].Object)
	}
	// The remedy it prints works.
	_, commands, _ := strings.Cut(found[0].Remedy, "instance: ")
	for line := range strings.SplitSeq(commands, "; ") {
		nftTool(t, strings.TrimPrefix(line, "nft "))
	}
	m.do(t, func() error { _, _, err := reach(outsideAddr+service, ""); return err })
}

// Docker as it sets up a host with iptables-legacy.
func TestKernelLegacyDropIsAFinding(t *testing.T) {
	if _, err := exec.LookPath("iptables-legacy"); err != nil {
		skip.Missing(t, "iptables-legacy (package iptables)")
	}
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	legacy := func(command string) {
		t.Helper()
		f := strings.Fields(command)
		if out, err := exec.CommandContext(t.Context(), f[0], f[1:]...).CombinedOutput(); err != nil { //nolint:gosec // commands of this test and of remedies
			t.Fatalf("%s: %v: %s", command, err, out)
		}
	}
	legacy("iptables-legacy -A FORWARD -s 203.0.113.0/24 -j DROP") // a condition is not judged
	if codes := findingCodes(t, w.host); len(codes) != 0 {
		t.Errorf("findings on a host that drops nothing of ours: %q", codes)
	}
	legacy("iptables-legacy -P FORWARD DROP")
	legacy("ip6tables-legacy -A INPUT -j REJECT")
	if err := serve(t, ":80"); err != nil {
		t.Fatal(err)
	}
	m.do(t, func() error {
		return errors.Join(blockedDial(outsideAddr+service), blockedDial("[fe80::1%eth0]:80"))
	})
	found, err := w.host.Findings(t.Context())
	if err != nil || len(found) != 2 || found[0].Code != FindingForwardDrop || found[1].Code != FindingInputDrop {
		t.Fatalf("findings are %+v, %v", found, err)
	}
	for _, f := range found {
		_, commands, _ := strings.Cut(f.Remedy, "instance: ")
		for line := range strings.SplitSeq(commands, "; ") {
			legacy(line)
		}
	}
	m.do(t, func() error {
		_, _, out := reach(outsideAddr+service, "")
		_, _, meta := reach("[fe80::1%eth0]:80", "")
		return errors.Join(out, meta)
	})
	t.Setenv("PATH", t.TempDir()) // without the tool
	legacyOnly := &nft{root: "/"}
	if found, err := legacyOnly.legacyFindings(t.Context()); err != nil || len(found) != 2 || found[0].Code != FindingLegacyUnread {
		t.Errorf("without the tool: %+v, %v", found, err)
	}
}

func TestKernelRestartedAgentAdoptsAndSweeps(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	links := func() (names []string) {
		list, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range list {
			names = append(names, l.Attrs().Name)
		}
		return names
	}
	before := links()
	kept := w.boot(t, testGuest(1))
	if err := w.host.Add(t.Context(), testGuest(2)); err != nil {
		t.Fatal(err)
	}
	var conn net.Conn
	kept.do(t, func() (err error) { _, conn, err = reach(outsideAddr+service, ""); return err })
	again, err := New(w.host.cfg, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Add(t.Context(), kept.guest), again.Sweep(t.Context(), map[string]bool{kept.guest.ID: true})); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 8)
	if _, err := conn.Write([]byte("alive")); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(buf); err != nil || string(buf[:n]) != "alive" {
		t.Errorf("connection across the restart: %q, %v", buf[:n], err)
	}
	taps, err := again.Observe(t.Context())
	if err != nil || len(taps) != 1 || taps[0] != (Tap{"nt00000001", kept.guest.ID, true}) {
		t.Errorf("observed %v, %v", taps, err)
	}
	if err := errors.Join(again.Remove(t.Context(), kept.guest.ID), again.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	if after := links(); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("links before %q, after %q", before, after)
	}
	if rules := nftTool(t, "list", "ruleset"); rules != "" {
		t.Errorf("rules are left:\n%s", rules)
	}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if (connectionsOf{kept.link.GuestAddr.Addr().AsSlice()}).MatchConntrackFlow(f) {
			t.Errorf("connection is left: %v", f)
		}
	}
}

func TestKernelForeignLinkIsLeftAlone(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "na00000001"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	if code := refusalCode(w.host.Add(t.Context(), testGuest(1))); code != "network.tap-taken" {
		t.Errorf("refused as %q", code)
	}
	if err := errors.Join(w.host.Sweep(t.Context(), nil), w.host.Remove(t.Context(), "guest-b")); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName("na00000001"); err != nil {
		t.Errorf("foreign link: %v", err)
	}
	// Nor is a range used that the host lives in.
	if err := up("na00000001", "10.213.0.200/16"); err != nil {
		t.Fatal(err)
	}
	if code := refusalCode(w.host.Add(t.Context(), testGuest(2))); code != "network.range-overlap" {
		t.Errorf("refused as %q", code)
	}
	// Nor a port that something listens on.
	if err := serve(t, ":20000"); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("na00000001")
	if err = errors.Join(err, netlink.LinkDel(link)); err != nil {
		t.Fatal(err)
	}
	g := testGuest(3)
	g.Ports = []Publish{{20000, 80}}
	if code := refusalCode(w.host.Add(t.Context(), g)); code != "network.port-in-use" {
		t.Errorf("refused as %q", code)
	}
	if taps, err := w.host.Observe(t.Context()); err != nil || len(taps) != 0 {
		t.Errorf("taps left: %v, %v", taps, err)
	}
}

// Somebody deletes a guest's device: it alone has no network, is named, and
// leaves nothing.
func TestKernelABrokenCableCutsItsGuestOnly(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	broken, other := w.boot(t, testGuest(1)), w.boot(t, testGuest(2))
	device, err := netlink.LinkByName(broken.link.Device)
	if err = errors.Join(err, netlink.LinkDel(device)); err != nil {
		t.Fatal(err)
	}
	third := w.boot(t, testGuest(3))
	for _, m := range []*machine{other, third} {
		m.do(t, func() error { _, _, err := reach(outsideAddr+service, ""); return err })
	}
	broken.do(t, func() error { return blockedDial(outsideAddr + service) })
	if codes := findingCodes(t, w.host); len(codes) != 1 || codes[0] != FindingTapMissing {
		t.Errorf("findings are %q", codes)
	}
	again, err := New(w.host.cfg, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Adopt(t.Context(), []Guest{other.guest, third.guest}), again.Sweep(t.Context(), map[string]bool{other.guest.ID: true, third.guest.ID: true})); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName(broken.link.Tap); err == nil {
		t.Error("its tap is left")
	}
	other.do(t, func() error { _, _, err := reach(outsideAddr+service, ""); return err })
}

const attachEnv = "NODEAGENT_NETWORK_ATTACH"

func TestKernelTapOpensForItsUserOnly(t *testing.T) {
	if tap := os.Getenv(attachEnv); tap != "" {
		f, err := openTap(tap)
		if err != nil {
			t.Fatal(err)
		}
		f.Close() //nolint:errcheck // opening was the point
		return
	}
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	g := testGuest(1)
	g.TapUser, g.TapGroup = 64055, 108
	if err := w.host.Add(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	// The test binary lies in a folder only its owner enters.
	binary := filepath.Join("/proc/self/fd", "3")
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	attach := func(uid, gid uint32) error {
		cmd := exec.CommandContext(t.Context(), binary, "-test.run=^"+t.Name()+"$")
		cmd.Dir, cmd.ExtraFiles = "/", []*os.File{self}
		cmd.Env = []string{attachEnv + "=nt00000001"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if err := attach(64055, 108); err != nil {
		t.Errorf("QEMU's user cannot open the tap: %v", err)
	}
	if err := attach(65534, 65534); err == nil || !strings.Contains(err.Error(), "operation not permitted") {
		t.Errorf("somebody else opening the tap: %v", err)
	}
}

func TestKernelTapIgnoresWhatGuestsTeach(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	if err := w.host.Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	for _, s := range settings() {
		raw, err := os.ReadFile(filepath.Join("/proc/sys/net", s.family, "conf/na00000001", s.name))
		if got := strings.TrimSpace(string(raw)); err != nil || got != s.value {
			t.Errorf("%s %s is %q, %v; want %s", s.family, s.name, got, err, s.value)
		}
	}
	l, err := netlink.LinkByName("na00000001")
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil || len(addrs) != 2 {
		t.Errorf("addresses are %v, %v", addrs, err)
	}
	if l.Attrs().Alias != aliasPrefix+"guest-b" {
		t.Errorf("alias is %q", l.Attrs().Alias)
	}
}

func TestKernelDownAndUpGivesTheMetadataAddressBack(t *testing.T) {
	if !inside(t) {
		return
	}
	w := newWorld(t, nil)
	m := w.boot(t, testGuest(1))
	if err := serve(t, ":80"); err != nil {
		t.Fatal(err)
	}
	w.host.mu.Lock()
	_ = w.host.loseLocked(errors.New("injected")) // it returns the cause
	err := w.host.regainLocked()
	w.host.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	m.do(t, func() error {
		_, _, meta := reach("[fe80::1%eth0]:80", "")
		_, _, out := reach(outsideAddr+service, "")
		return errors.Join(meta, out)
	})
}
