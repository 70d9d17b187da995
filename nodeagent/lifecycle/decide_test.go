package lifecycle // decisions are pure and have no other door

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vm"
)

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) //nolint:gochecknoglobals // a constant

const years = 3 * 365 * 24 * time.Hour

// Every stage meets every sight: a combination without an answer is a hole.
func TestTheDecisionTableIsWhole(t *testing.T) {
	t.Parallel()
	sights := []sight{sightUnknown, sightAbsent, sightOurs, sightOther}
	table := map[stage][4]action{ //          unknown  absent     ours       other
		stageNone:      {actNone, actNone, actReport, actReport},
		stageLaunching: {actWait, actUndo, actReport, actReport},
		stageStarting:  {actWait, actUndo, actAdopt, actReport},
		stageStarted:   {actWait, actFinish, actAdopt, actReport},
		stageUndoing:   {actWait, actFinish, actFinish, actReport},
		stageRevoking:  {actWait, actFinish, actReport, actReport},
		stageEnded:     {actWait, actNone, actReport, actReport},
	}
	for s, want := range table {
		for i, domain := range sights {
			if got := decide(s, domain); got != want[i] {
				t.Errorf("a guest that is %s, its domain %s: %s, want %s", s, domain, got, want[i])
			}
		}
	}
}

func TestARecordTellsItsStage(t *testing.T) {
	t.Parallel()
	begun := []store.Step{{Name: stepTap, BegunAt: noon, DoneAt: noon}, {Name: stepDomain, BegunAt: noon}}
	done := []store.Step{{Name: stepDomain, BegunAt: noon, DoneAt: noon}}
	if got := stageOf(store.Guest{ID: "g", Steps: begun, Phase: contract.PhaseBooted}); got != stageStarted {
		t.Errorf("a guest that spoke is %s", got)
	}
	for want, r := range map[stage]store.Guest{
		stageNone:      {},
		stageLaunching: {ID: "g", Steps: begun[:1]},
		stageStarting:  {ID: "g", Steps: begun},
		stageStarted:   {ID: "g", Steps: done},
		stageRevoking:  {ID: "g", Steps: begun[:1], Undoing: true},
		stageUndoing:   {ID: "g", Steps: begun, Undoing: true},
		stageEnded:     {ID: "g", Steps: done, Undoing: true, EndedAt: noon},
	} {
		if got := stageOf(r); got != want {
			t.Errorf("%+v is %s, want %s", r, got, want)
		}
	}
}

func TestHowAGuestEndsWhoseDomainIsGone(t *testing.T) {
	t.Parallel()
	done := map[contract.GuestPhase]clock.Instant{contract.PhaseDone: {Wall: noon}}
	refusal, stop := contract.Refuse("broker.no", "r", "m"), &store.Stop{}
	for name, c := range map[string]struct {
		rec   store.Guest
		want  api.GuestStatus
		code  string
		cause vm.Cause
	}{
		"done":             {store.Guest{BootID: "b", Phases: done}, api.GuestStatus_GUEST_STATUS_FINISHED, "", ""},
		"done and stopped": {store.Guest{BootID: "b", Phases: done, Stop: stop}, api.GuestStatus_GUEST_STATUS_FINISHED, "", ""},
		"stopped":          {store.Guest{BootID: "b", Stop: stop}, api.GuestStatus_GUEST_STATUS_STOPPED, "", ""},
		"its own refusal":  {store.Guest{BootID: "b", GuestRefusal: refusal}, api.GuestStatus_GUEST_STATUS_FAILED, "broker.no", ""},
		"another boot":     {store.Guest{BootID: "a"}, api.GuestStatus_GUEST_STATUS_FAILED, "host.rebooted", ""},
		"without a word":   {store.Guest{BootID: "b"}, api.GuestStatus_GUEST_STATUS_FAILED, "guest.ended-early", ""},
		"done and killed":  {store.Guest{BootID: "b", Phases: done}, api.GuestStatus_GUEST_STATUS_FINISHED, "", vm.CauseDied},
		"killed":           {store.Guest{BootID: "b"}, api.GuestStatus_GUEST_STATUS_FAILED, "guest.crashed", vm.CauseDied},
		"destroyed":        {store.Guest{BootID: "b"}, api.GuestStatus_GUEST_STATUS_FAILED, "guest.destroyed", vm.CauseDestroyed},
		"stopped, killed":  {store.Guest{BootID: "b", Stop: stop}, api.GuestStatus_GUEST_STATUS_STOPPED, "", vm.CauseDied},
	} {
		checkEnding(t, name, verdict(c.rec, "b", c.cause), c.want, c.code)
	}
	for name, c := range map[string]struct {
		rec   store.Guest
		fresh bool
		want  api.GuestStatus
		code  string
	}{
		"stopped":      {store.Guest{BootID: "b", Stop: stop}, true, api.GuestStatus_GUEST_STATUS_STOPPED, ""},
		"another boot": {store.Guest{BootID: "a"}, false, api.GuestStatus_GUEST_STATUS_FAILED, "host.rebooted"},
		"this agent":   {store.Guest{BootID: "b"}, true, api.GuestStatus_GUEST_STATUS_FAILED, "agent.launch-interrupted"},
		"an earlier":   {store.Guest{BootID: "b"}, false, api.GuestStatus_GUEST_STATUS_FAILED, "agent.restarted"},
	} {
		checkEnding(t, "cut short: "+name, cutShort(c.rec, "b", c.fresh), c.want, c.code)
	}
}

func checkEnding(t *testing.T, name string, got ending, want api.GuestStatus, code string) {
	t.Helper()
	switch {
	case got.final != want, (got.why == nil) != (code == ""), got.why != nil && got.why.Code != code:
		t.Errorf("%s: ends as %s, %v; want %s, %q", name, got.final, got.why, want, code)
	case got.why != nil && (got.why.Remedy == "" || got.why.Message == ""):
		t.Errorf("%s: %+v says not what happened or what to do", name, got.why)
	}
}

func TestWhenAGuestsTimeIsUp(t *testing.T) {
	t.Parallel()
	c := Config{}.withDefaults()
	begun := clock.Instant{Wall: noon, BootID: "b", Up: time.Hour}
	at := func(p ...contract.GuestPhase) map[contract.GuestPhase]clock.Instant {
		m := map[contract.GuestPhase]clock.Instant{}
		for _, p := range p {
			m[p] = begun
		}
		return m
	}
	base := func(change func(*store.Guest)) store.Guest {
		r := store.Guest{
			ID: "g", AcceptedAt: begun, Limits: store.Limits{Start: 7 * time.Minute, Run: 11 * time.Hour},
			Steps: []store.Step{{Name: stepDomain, BegunAt: noon, DoneAt: noon}},
		}
		change(&r)
		return r
	}
	stop := func(d time.Duration) *store.Stop { return &store.Stop{Deadline: begun.Add(d)} }
	for name, c2 := range map[string]struct {
		rec   store.Guest
		after time.Duration
		want  api.GuestStatus
		code  string
		says  string
	}{
		"not ready": {base(func(r *store.Guest) { r.Steps = nil }), 7 * time.Minute, api.GuestStatus_GUEST_STATUS_FAILED, "guest.start-timeout", "not ready"},
		"silent":    {base(func(*store.Guest) {}), 7 * time.Minute, api.GuestStatus_GUEST_STATUS_FAILED, "guest.start-timeout", "OVMF"},
		"half-way": {
			base(func(r *store.Guest) { r.Phase, r.Phases = contract.PhaseInputs, at(contract.PhaseInputs) }), 7 * time.Minute,
			api.GuestStatus_GUEST_STATUS_FAILED, "guest.start-timeout", "last word was inputs",
		},
		"running": {base(func(r *store.Guest) { r.Phases = at(contract.PhaseRunning) }), 11 * time.Hour, api.GuestStatus_GUEST_STATUS_FAILED, "guest.run-timeout", ""},
		"collecting": {
			base(func(r *store.Guest) { r.Phases = at(contract.PhaseRunning, contract.PhaseCollecting) }), c.CollectTimeout,
			api.GuestStatus_GUEST_STATUS_FAILED, "guest.collect-timeout", "",
		},
		"done": {base(func(r *store.Guest) { r.Phases = at(contract.PhaseRunning, contract.PhaseDone) }), c.PowerOffGrace, api.GuestStatus_GUEST_STATUS_FINISHED, "", ""},
		"done, to stop soon": {
			base(func(r *store.Guest) { r.Phases, r.Stop = at(contract.PhaseDone), stop(time.Second) }), time.Second,
			api.GuestStatus_GUEST_STATUS_FINISHED, "", "",
		},
		"done, to stop late": {
			base(func(r *store.Guest) { r.Phases, r.Stop = at(contract.PhaseDone), stop(time.Hour) }), c.PowerOffGrace,
			api.GuestStatus_GUEST_STATUS_FINISHED, "", "",
		},
		"to stop": {base(func(r *store.Guest) { r.Phases, r.Stop = at(contract.PhaseRunning), stop(time.Hour) }), time.Hour, api.GuestStatus_GUEST_STATUS_STOPPED, "", ""},
		"refused": {base(func(r *store.Guest) {
			r.Phases, r.GuestRefusal = at(contract.PhaseBooted, contract.PhaseFailed), contract.Refuse("broker.no", "r", "m")
		}), c.PowerOffGrace, api.GuestStatus_GUEST_STATUS_FAILED, "broker.no", ""},
	} {
		for _, jump := range []time.Duration{0, years, -years} { // of the wall clock, of one boot
			now := begun.Add(c2.after - 1)
			now.Wall = now.Wall.Add(jump)
			if end, when := due(c2.rec, c, now); end != nil || when.Sub(now) != 1 {
				t.Errorf("%s, clock off by %v: over a moment early, or due at %v: %+v", name, jump, when, end)
			}
			now = now.Add(1)
			if end, _ := due(c2.rec, c, now); end == nil {
				t.Errorf("%s, clock off by %v: not over", name, jump)
			}
		}
		// Of another boot the wall clock is all there is.
		end, _ := due(c2.rec, c, clock.Instant{Wall: noon.Add(c2.after), BootID: "another"})
		if end == nil {
			t.Errorf("%s: not over", name)
			continue
		}
		checkEnding(t, name, *end, c2.want, c2.code)
		if end.why != nil && !strings.Contains(end.why.Message, c2.says) {
			t.Errorf("%s: %q does not say %q", name, end.why.Message, c2.says)
		}
	}
}

// Names of steps are in records of earlier agents, and the order of the steps
// is the order of their undo.
func TestTheStepsOfALaunch(t *testing.T) {
	t.Parallel()
	var names []string
	for _, s := range steps() {
		names = append(names, s.name)
		if s.do == nil || s.undo == nil {
			t.Errorf("step %s cannot be done or undone", s.name)
		}
	}
	if want := []string{"spool", "gpus", "blobs", "boot-copies", "measure", "tap", "metadata", "gpu-check", "domain"}; !slices.Equal(names, want) {
		t.Errorf("steps are %v, want %v", names, want)
	}
}

func TestAGuestsRefusalCannotBeTakenForTheNodes(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]string{"broker.digest": "broker.digest", "guest.pull": "guest.pull", "admit.cordoned": "guest.admit.cordoned"} {
		r := guestsOwn(&contract.Refusal{Code: code, Message: strings.Repeat("ä", 2000)})
		if r.Code != want || len(r.Message) > maxWord || r.Remedy == "" || strings.ToValidUTF8(r.Message, "?") != r.Message {
			t.Errorf("%s became %s, %d bytes, remedy %q", code, r.Code, len(r.Message), r.Remedy)
		}
	}
	if r := guestsOwn(nil); r.Code != "guest.failed" || r.Remedy == "" {
		t.Errorf("no reason became %+v", r)
	}
}
