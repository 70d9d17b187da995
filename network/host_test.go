package network

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/time/rate"
)

func newTestHost(k *kernel) *Host {
	return &Host{
		cfg: testConfig(), log: hclog.NewNullLogger(), links: k, filter: k, guests: map[string]member{},
		portFree: func(context.Context, uint16) error { return nil }, restores: rate.NewLimiter(rate.Every(time.Hour), 5),
	}
}

func expectEffects(t *testing.T, k *kernel, want ...string) {
	t.Helper()
	if got := k.take(); !slices.Equal(got, want) {
		t.Errorf("effects are\n  %q\nwant\n  %q", got, want)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(time.Minute) // of a machine that does much else
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("waiting until %s", what)
		case <-tick.C:
		}
	}
}

func TestRulesComeBeforeTheTapIsUpAndGoAfterIt(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	if err := h.Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	expectEffects(t, k, "make nt00000001", "forget 10.213.0.6", "write nt00000001", "up nt00000001")
	if err := h.Remove(t.Context(), "guest-b"); err != nil {
		t.Fatal(err)
	}
	expectEffects(t, k, "down nt00000001", "remove nt00000001", "write ", "forget 10.213.0.6")
	if err := h.Remove(t.Context(), "guest-b"); err != nil {
		t.Fatal(err)
	}
	expectEffects(t, k)
}

func TestAddingTwiceChangesNothing(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	for range 2 {
		if err := h.Add(t.Context(), testGuest(1)); err != nil {
			t.Fatal(err)
		}
	}
	expectEffects(t, k, "make nt00000001", "forget 10.213.0.6", "write nt00000001", "up nt00000001", "write nt00000001")
}

func TestFailedAddLeavesNothingAndSparesOthers(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"make", "forget", "up"} {
		k := newKernel()
		h := newTestHost(k)
		if err := h.Add(t.Context(), testGuest(1)); err != nil {
			t.Fatal(err)
		}
		before := k.table()
		k.setFail(verb, errors.New("injected"))
		if err := h.Add(t.Context(), testGuest(2)); err == nil {
			t.Errorf("%s failed and Add did not", verb)
		}
		if _, left := k.taps["nt00000002"]; left || !k.isUp() || k.table() != before {
			t.Errorf("after failing to %s: taps %v, table unchanged: %v", verb, k.taps, k.table() == before)
		}
		k.setFail(verb, nil)
		if err := h.Add(t.Context(), testGuest(2)); err != nil {
			t.Errorf("adding again after failing to %s: %v", verb, err)
		}
	}
}

func TestPortOfAHostProcessIsRefused(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	h.portFree = func(_ context.Context, port uint16) error {
		if port == 20000 {
			return errors.New("address already in use")
		}
		return nil
	}
	g := testGuest(1)
	g.Ports = []Publish{{20000, 80}}
	if code := refusalCode(h.Add(t.Context(), g)); code != "network.port-in-use" || len(k.taps) != 0 {
		t.Errorf("refused as %q, taps %v", code, k.taps)
	}
}

func TestPublishedPortsThatTheKernelGivesAwayAreFound(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	last := h.cfg.PublishedPorts.Last
	for from, want := range map[uint16]int{32768: 0, last + 1: 0, last: 1, 1024: 1} {
		k.ephemeralFrom = from
		found, err := h.Findings(t.Context())
		if err != nil || len(found) != want {
			t.Errorf("given away from %d: %+v, %v", from, found, err)
		}
		if want > 0 && (found[0].Code != FindingPortsEphemeral || !strings.Contains(found[0].Remedy, "ip_local_reserved_ports=")) {
			t.Errorf("found %+v", found[0])
		}
	}
}

func TestReservedPortsAreNotEphemeral(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	dir := filepath.Join(root, "proc/sys/net/ipv4")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	set := func(given, reserved string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(filepath.Join(dir, "ip_local_port_range"), []byte(given), 0o600),
			os.WriteFile(filepath.Join(dir, "ip_local_reserved_ports"), []byte(reserved), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	set("10000\t65535\n", "20000-20100,30000\n")
	given, err := kernelLinks{root}.ephemeral()
	if err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]bool{9999: false, 10000: true, 20000: false, 20100: false, 20101: true, 30000: false, 30001: true, 65535: true} {
		if given(port) != want {
			t.Errorf("port %d is given away: %v", port, !want)
		}
	}
	set("32768\t60999\n", "\n")
	if given, err = (kernelLinks{root}).ephemeral(); err != nil || given(20000) || !given(40000) {
		t.Errorf("nothing reserved: %v", err)
	}
	for _, bad := range []string{"x", "70000", "2-1", "1-2-3", "-"} {
		set("32768 60999", bad)
		if _, err := (kernelLinks{root}).ephemeral(); err == nil {
			t.Errorf("%q was taken for ports", bad)
		}
	}
}

func TestSlotOfAGuestDoesNotChange(t *testing.T) {
	t.Parallel()
	h := newTestHost(newKernel())
	g := testGuest(1)
	if err := h.Add(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	g.Index = 5
	if code := refusalCode(h.Add(t.Context(), g)); code != "network.slot-changed" {
		t.Errorf("refused as %q", code)
	}
}

func TestUnknownTapsAreCutOffAndAdoptedTapsAreNot(t *testing.T) {
	t.Parallel()
	k := newKernel()
	k.taps["nt00000001"] = Tap{Name: "nt00000001", GuestID: "guest-b", Up: true}
	k.taps["nt00000002"] = Tap{Name: "nt00000002", GuestID: "guest-c", Up: true}
	h := newTestHost(k)
	if err := h.Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	expectEffects(t, k, "write nt00000001")
	if !strings.Contains(k.table(), `strays { "na00000002" }`) {
		t.Errorf("stray is not cut off:\n%s", k.table())
	}
	if err := h.Adopt(t.Context(), []Guest{testGuest(1), testGuest(2)}); err != nil {
		t.Fatal(err)
	}
	expectEffects(t, k, "write nt00000001,nt00000002")
	if strings.Contains(k.table(), `strays {`+` "`) {
		t.Errorf("adopted guest is cut off:\n%s", k.table())
	}
}

func TestAGuestThatCannotBeAdoptedIsLeftOut(t *testing.T) {
	t.Parallel()
	k := newKernel()
	if err := newTestHost(k).Adopt(t.Context(), []Guest{testGuest(1), testGuest(2), testGuest(3)}); err != nil {
		t.Fatal(err)
	}
	malformed, sameSlot := testGuest(2), testGuest(3)
	malformed.MAC, sameSlot.ID = nil, "guest-x"
	h := newTestHost(k) // the agent starts again
	err := h.Adopt(t.Context(), []Guest{malformed, testGuest(1), testGuest(3), sameSlot})
	if err == nil || !strings.Contains(err.Error(), "guest-c") || refusalCode(err) != "network.slot-in-use" {
		t.Errorf("adopting says %v", err)
	}
	if _, ok := h.guests["guest-b"]; !ok || len(h.guests) != 2 {
		t.Errorf("adopted are %v", h.guests)
	}
	if text := k.table(); !strings.Contains(text, `strays { "na00000002" }`) || strings.Contains(text, `strays { "na00000001" }`) {
		t.Errorf("the table is\n%s", text)
	}
	k.setFail("up", errors.New("injected"))
	if err := h.Adopt(t.Context(), []Guest{testGuest(2), testGuest(4)}); err == nil {
		t.Error("a tap did not come up and Adopt did not say so")
	}
	if _, left := k.snapshot()["nt00000004"]; left || len(h.guests) != 3 {
		t.Errorf("taps %v, guests %v", k.snapshot(), h.guests)
	}
}

func TestSweepKeepsWhatItIsTold(t *testing.T) {
	t.Parallel()
	k := newKernel()
	k.taps["nt00000007"] = Tap{Name: "nt00000007"}                   // half-made
	k.taps["nt00000008"] = Tap{Name: "nt00000008", GuestID: "old"}   // of an earlier run
	k.taps["nt00000009"] = Tap{Name: "nt00000009", GuestID: "alive"} // of an earlier run, running
	h := newTestHost(k)
	if err := h.Adopt(t.Context(), []Guest{testGuest(1), testGuest(2)}); err != nil {
		t.Fatal(err)
	}
	if err := h.Sweep(t.Context(), map[string]bool{"alive": true, "guest-b": true}); err != nil {
		t.Fatal(err)
	}
	taps, err := h.Observe(t.Context())
	slices.SortFunc(taps, func(a, b Tap) int { return strings.Compare(a.Name, b.Name) })
	if want := []Tap{{"nt00000001", "guest-b", true}, {"nt00000009", "alive", false}}; err != nil || !slices.Equal(taps, want) {
		t.Errorf("left %v, %v; want %v", taps, err, want)
	}
}

func TestCloseLeavesTheRulesOfRunningGuests(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	if err := h.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectEffects(t, k)
	if err := errors.Join(h.Add(t.Context(), testGuest(1)), h.Close(t.Context())); err != nil || k.table() == "" {
		t.Errorf("closing with a guest: %v, table %q", err, k.table())
	}
	if err := errors.Join(h.Remove(t.Context(), "guest-b"), h.Close(t.Context())); err != nil || k.table() != "" {
		t.Errorf("closing without guests: %v, table %q", err, k.table())
	}
}

// The agent that gave a guest its network is dead; the next one undoes the
// launch without ever having added the guest.
func TestTheLastTapTakesADeadAgentsTableWithIt(t *testing.T) {
	t.Parallel()
	k := newKernel()
	if err := newTestHost(k).Adopt(t.Context(), []Guest{testGuest(1), testGuest(2)}); err != nil {
		t.Fatal(err)
	}
	next := newTestHost(k)
	before := k.table()
	if err := next.Remove(t.Context(), "guest-b"); err != nil || k.table() != before {
		t.Errorf("%v; the rules of a guest that runs were changed to\n%s", err, k.table())
	}
	if err := next.Remove(t.Context(), "guest-c"); err != nil || k.table() != "" {
		t.Errorf("%v; without guests the table is\n%s", err, k.table())
	}
}

// An agent was killed while nft wrote, and nft went on for longer than the next
// agent needed to find no table. The soak met it.
func TestATableThatAppearsWithoutGuestsIsErased(t *testing.T) {
	t.Parallel()
	k := newKernel()
	if err := newTestHost(k).Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	late := k.table()
	next := newTestHost(k)
	if err := next.Remove(t.Context(), testGuest(1).ID); err != nil || k.table() != "" {
		t.Fatalf("%v; the table is\n%s", err, k.table())
	}
	runHost(t, next)
	k.appears(late)
	eventually(t, "the table is gone", func() bool { return k.table() == "" })
	// While a guest of an earlier run has its tap, the table is that guest's.
	k.mu.Lock()
	k.taps["nt00000002"] = Tap{Name: "nt00000002", GuestID: "guest-c", Up: true}
	k.mu.Unlock()
	k.appears(late)
	if err := next.check(t.Context()); err != nil || k.table() != late {
		t.Errorf("%v; the rules of a guest that runs were changed to\n%s", err, k.table())
	}
}

// A tap that was cut off is no longer named once it is gone.
func TestARemovedStrayIsForgotten(t *testing.T) {
	t.Parallel()
	k := newKernel()
	k.taps["nt00000002"] = Tap{Name: "nt00000002", GuestID: "guest-c", Up: true}
	h := newTestHost(k)
	if err := errors.Join(h.Add(t.Context(), testGuest(1)), h.Remove(t.Context(), "guest-c")); err != nil || strings.Contains(k.table(), "00000002") {
		t.Errorf("%v; the table is\n%s", err, k.table())
	}
}

func runHost(t *testing.T, h *Host) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run ended with %v", err)
		}
	})
}

func TestFlushedTableIsRestored(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	if err := h.Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	before := k.table()
	runHost(t, h)
	k.flush()
	eventually(t, "the table is back", func() bool { return k.table() == before })
	if !k.isUp() {
		t.Error("tap is down although the table could be restored")
	}
}

func TestTapsAreDownWhileTheTableCannotBeRestored(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	if err := h.Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	k.setFail("write", errors.New("injected"))
	runHost(t, h)
	k.flush()
	eventually(t, "the tap is down", func() bool { return !k.isUp() })
	if codes := findingCodes(t, h); !slices.Contains(codes, FindingRulesLost) {
		t.Errorf("findings are %q", codes)
	}
	k.setFail("write", nil)
	eventually(t, "the tap is up again", func() bool { return k.isUp() })
	if codes := findingCodes(t, h); slices.Contains(codes, FindingRulesLost) {
		t.Errorf("findings are %q", codes)
	}
}

func TestTapsOfAnEarlierRunAreDownWhileTheirTableIsGone(t *testing.T) {
	t.Parallel()
	k := newKernel()
	if err := newTestHost(k).Adopt(t.Context(), []Guest{testGuest(1), testGuest(2)}); err != nil {
		t.Fatal(err)
	}
	h := newTestHost(k) // the agent starts again
	k.setFail("write", errors.New("injected"))
	if err := h.Adopt(t.Context(), []Guest{testGuest(1)}); err == nil || !k.isUp() {
		t.Errorf("up %v, %v: the earlier table is still in force, so nobody need be cut off", k.isUp(), err)
	}
	k.mu.Lock()
	k.text = "" // nft flush ruleset while no agent ran
	k.mu.Unlock()
	if err := h.Adopt(t.Context(), []Guest{testGuest(1)}); err == nil {
		t.Fatal("adopted without a table")
	}
	for name, tap := range k.snapshot() {
		if tap.Up {
			t.Errorf("tap %s is up without rules", name)
		}
	}
	if codes := findingCodes(t, h); !slices.Contains(codes, FindingRulesLost) {
		t.Errorf("findings are %q", codes)
	}
	k.setFail("write", nil)
	if err := h.Adopt(t.Context(), []Guest{testGuest(1)}); err != nil || !k.isUp() {
		t.Errorf("up %v, %v", k.isUp(), err)
	}
	if codes := findingCodes(t, h); slices.Contains(codes, FindingRulesLost) {
		t.Errorf("findings are %q", codes)
	}
}

func TestContestedTableTakesTapsDown(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	if err := h.Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	for range 6 {
		k.mu.Lock()
		k.text = ""
		k.mu.Unlock()
		if err := h.check(t.Context()); err != nil {
			break
		}
	}
	if k.isUp() {
		t.Error("tap is up although the table keeps being removed")
	}
}

func findingCodes(t *testing.T, h *Host) []string {
	t.Helper()
	found, err := h.Findings(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	codes := make([]string, 0, len(found))
	for _, f := range found {
		codes = append(codes, f.Code)
		if f.Object == "" || f.Message == "" || f.Remedy == "" {
			t.Errorf("finding %+v lacks words", f)
		}
	}
	return codes
}

func TestFindingsNameWhatStandsInTheWay(t *testing.T) {
	t.Parallel()
	k := newKernel()
	h := newTestHost(k)
	if codes := findingCodes(t, h); len(codes) != 0 {
		t.Errorf("idle host has findings %q", codes)
	}
	if err := h.Add(t.Context(), testGuest(1)); err != nil {
		t.Fatal(err)
	}
	k.rules = foreignRuleset
	delete(k.taps, "nt00000001")
	want := []string{FindingForwardDrop, FindingInputDrop, FindingForwardingOff, FindingTapMissing}
	if codes := findingCodes(t, h); !slices.Equal(codes, want) {
		t.Errorf("findings are %q, want %q", codes, want)
	}
}

func TestForwardingIsGivenBackAsItWas(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	file := filepath.Join(root, "proc/sys/net/ipv4/ip_forward")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := testConfig()
	cfg.Root, cfg.RunDir = root, t.TempDir()
	life := func() *Host { // each call is another run of the agent, which remembers nothing
		h, err := New(cfg, hclog.NewNullLogger())
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	is := func(want string) {
		t.Helper()
		if raw, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(raw)) != want {
			t.Errorf("forwarding is %q, want %s, %v", raw, want, err)
		}
	}
	for _, was := range []string{"0", "1"} {
		if err := os.WriteFile(file, []byte(was+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := life().ReturnForwarding(); err != nil {
			t.Fatal(err)
		}
		is(was) // nothing was held
		for range 2 {
			if err := life().HoldForwarding(); err != nil {
				t.Fatal(err)
			}
			is("1")
		}
		for range 2 {
			if err := life().ReturnForwarding(); err != nil {
				t.Fatal(err)
			}
			is(was)
		}
	}
	cfg.RunDir += "/missing"
	if err := os.WriteFile(file, []byte("0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := life().HoldForwarding(); err == nil {
		t.Error("forwarding is on and nobody would know that it was off")
	}
	is("0")
}
