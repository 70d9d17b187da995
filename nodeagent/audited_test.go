package main

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

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
)

const auditGuest = "0b9c1a5e-7d33-4f53-8f0e-2f6f3c1f9a10"

// recorder takes entries, looks at the store as each comes, or fails.
type recorder struct {
	entries []audit.Entry
	look    func()
	fail    error
}

func (r *recorder) Append(e audit.Entry) error {
	if r.fail != nil {
		return r.fail
	}
	if r.look != nil {
		r.look()
	}
	r.entries = append(r.entries, e)
	return nil
}

func (r *recorder) kinds() (out []string) {
	for _, e := range r.entries {
		out = append(out, strings.TrimSpace(e.Kind+" "+e.Status+e.Code))
	}
	return out
}

func auditedStore(t *testing.T, log auditLog, now func() time.Time) *audited {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "state.db"), time.Now, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return newAudited(s, log, now)
}

func guestState(status api.GuestStatus) *api.Event {
	return api.NewGuestState("node-a", "launch", time.Now(), &api.GuestState{GuestId: auditGuest, Generation: 1, Status: status})
}

func TestWhatIsRememberedIsWrittenDownFirst(t *testing.T) {
	t.Parallel()
	log := &recorder{}
	a := auditedStore(t, log, time.Now)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	log.look = func() {
		known, err := a.KnownCommand("launch")
		n, errLen := a.OutboxLen()
		if err != nil || errLen != nil || known != (len(log.entries) > 0) || n != max(0, len(log.entries)-1) {
			t.Errorf("entry %d comes after its effect", len(log.entries))
		}
	}
	_, err := a.AddCommand(inbox.Command{ID: "launch", Verb: "launch_guest", Guest: auditGuest, Generation: 1, Payload: []byte("secret URL"), Sequence: 1})
	must(err)
	must(a.PutGuest(store.Guest{ID: auditGuest}, guestState(api.GuestStatus_GUEST_STATUS_ACCEPTED)))
	must(a.FinishCommand("launch", api.NewDone("node-a", "launch", time.Now())))
	must(a.PutGuest(store.Guest{ID: auditGuest}, guestState(api.GuestStatus_GUEST_STATUS_FINISHED)))
	must(a.AppendEvents(api.NewRefused("node-a", "other", time.Now(), contract.Refuse(api.CodeExpired, "do", "why"), []byte{1, 2})))
	want := []string{"command-accepted", "guest-state accepted", "command-done", "guest-state finished", "command-refused " + api.CodeExpired}
	if got := log.kinds(); !slices.Equal(got, want) {
		t.Errorf("entries %q, want %q", got, want)
	}
	first, refused := log.entries[0], log.entries[4]
	if first.GuestID != auditGuest || first.Verb != "launch_guest" || len(first.SHA256) != 64 || refused.SHA256 != "0102" {
		t.Errorf("%+v, %+v", first, refused)
	}
}

func TestWhatAnUploadWaitsForIsWrittenDownByName(t *testing.T) {
	t.Parallel()
	log := &recorder{}
	a := auditedStore(t, log, time.Now)
	wanted := api.NewGrantWanted("node-a", "launch", time.Now(), &api.UploadGrantWanted{
		GuestId: auditGuest, Name: "out", Refusal: api.RefusalToWire(contract.Refuse("blob.url-expired", "do", "why")),
	})
	ready := api.NewUploadReady("node-a", "launch", time.Now(), &api.UploadReady{GuestId: auditGuest, Name: "out", Sha256: []byte{1, 2}})
	if err := a.AppendEvents(wanted, ready); err != nil {
		t.Fatal(err)
	}
	w, r := log.entries[0], log.entries[1]
	if w.GuestID != auditGuest || w.Detail != "out" || w.Code != "blob.url-expired" || r.GuestID != auditGuest || r.Detail != "out" || r.SHA256 != "0102" {
		t.Errorf("%+v, %+v", w, r)
	}
}

func TestWhatCannotBeWrittenDownIsNotDone(t *testing.T) {
	t.Parallel()
	log := &recorder{fail: errors.New("no space left on device")}
	a := auditedStore(t, log, time.Now)
	_, addErr := a.AddCommand(inbox.Command{ID: "a", Sequence: 1})
	event := guestState(api.GuestStatus_GUEST_STATUS_ACCEPTED)
	for what, err := range map[string]error{"command": addErr, "guest": a.PutGuest(store.Guest{ID: auditGuest}, event), "event": a.AppendEvents(event)} {
		if !errors.Is(err, log.fail) {
			t.Errorf("%s taken: %v", what, err)
		}
	}
	known, errKnown := a.KnownCommand("a")
	n, errLen := a.OutboxLen()
	if _, err := a.Guest(auditGuest); known || n != 0 || !errors.Is(err, store.ErrNoGuest) || errors.Join(errKnown, errLen) != nil {
		t.Errorf("done all the same: %v %d %v", known, n, err)
	}
	log.fail = nil // the disk has space again
	if fresh, err := a.AddCommand(inbox.Command{ID: "a", Sequence: 1}); !fresh || err != nil {
		t.Errorf("not taken: %v", err)
	}
}

// The inbox asks a store that fails again and again; the log must not grow
// with it.
func TestARetryIsWrittenDownOnce(t *testing.T) {
	t.Parallel()
	log := &recorder{}
	a := auditedStore(t, log, time.Now)
	event := api.NewDone("node-a", "never-taken", time.Now())
	for range 20 {
		if err := a.FinishCommand("never-taken", event); err == nil {
			t.Fatal("a command that is not there was finished")
		}
	}
	if len(log.entries) != 1 {
		t.Errorf("%d entries", len(log.entries))
	}
}

func TestAFloodOfForgeriesDoesNotFillTheAuditLog(t *testing.T) {
	t.Parallel()
	log, now := &recorder{}, time.Now()
	a := auditedStore(t, log, func() time.Time { return now })
	forged := func() {
		t.Helper()
		e := api.NewRefused("node-a", "", now, contract.Refuse(api.CodeForged, "do", "why"), nil)
		if err := a.change([]string{e.GetEventId()}, []audit.Entry{{Kind: api.KindCommandRefused, Code: api.CodeForged}}, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 * maxUnlisted {
		forged()
	}
	if len(log.entries) != maxUnlisted {
		t.Errorf("%d entries", len(log.entries))
	}
	now = now.Add(unlistedEvery)
	forged()
	if len(log.entries) != maxUnlisted+2 || log.entries[maxUnlisted].Count != 2*maxUnlisted {
		t.Errorf("%d entries, %+v", len(log.entries), log.entries[maxUnlisted])
	}
}

type executed struct{ n int }

func (e *executed) Execute(context.Context, *api.Command) ([]*api.Event, error) {
	e.n++
	return nil, nil
}

func TestAClosedHostLaunchesNothingAndStillStops(t *testing.T) {
	t.Parallel()
	next, refusal := &executed{}, contract.Refuse(codeCloned, "do", "why")
	g := gate{Executor: next, known: func(id string) bool { return id == "begun" }, closed: func() *contract.Refusal { return refusal }}
	launch := func(id string) *api.Command {
		return &api.Command{Verb: &api.Command_LaunchGuest{LaunchGuest: &api.LaunchGuest{GuestId: id}}}
	}
	if _, err := g.Execute(t.Context(), launch("new")); err == nil || contract.AsRefusal(err).Code != codeCloned || next.n != 0 {
		t.Errorf("launched: %v", err)
	}
	for _, cmd := range []*api.Command{launch("begun"), {Verb: &api.Command_StopGuest{}}} {
		if _, err := g.Execute(t.Context(), cmd); err != nil {
			t.Errorf("%v: %v", cmd, err)
		}
	}
	refusal = nil
	if _, err := g.Execute(t.Context(), launch("new")); err != nil || next.n != 3 {
		t.Errorf("still closed: %v", err)
	}
}

func TestADamagedAuditLogIsSetAsideAndClosesLaunches(t *testing.T) {
	t.Parallel()
	cfg := config.Default()
	cfg.StateDir, cfg.HostID = t.TempDir(), "node-a"
	open := func() {
		t.Helper()
		l, err := openAudit(cfg, time.Now, hclog.NewNullLogger())
		if err == nil {
			err = l.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	open()
	if aside := damagedAudit(cfg); aside != "" {
		t.Errorf("%s although nothing is wrong", aside)
	}
	path := filepath.Join(auditDir(cfg.StateDir), "entries")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[5] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	open()
	aside := damagedAudit(cfg)
	if kept, err := os.ReadFile(filepath.Join(aside, "entries")); err != nil || !slices.Equal(kept, data) {
		t.Errorf("not kept as it was: %v", err)
	}
	if err := os.RemoveAll(aside); err != nil {
		t.Fatal(err)
	}
	if damagedAudit(cfg) != "" {
		t.Error("closed for ever")
	}
}

func TestAFillingAuditLogIsToldBeforeItIsFull(t *testing.T) {
	t.Parallel()
	if r := auditFinding(audit.MaxBytes/2, "/x"); r != nil {
		t.Errorf("told at half: %v", r)
	}
	if r := auditFinding(audit.MaxBytes/100*85, "/x"); r == nil || r.Code != codeAuditNearlyFull || !strings.Contains(r.Remedy, "/x") {
		t.Errorf("not told: %v", r)
	}
}

type share struct {
	percent int
	err     error
}

func (s share) OutboxShare() (int, error) { return s.percent, s.err }

func TestAFillingOutboxIsToldBeforeItIsFull(t *testing.T) {
	t.Parallel()
	for percent, want := range map[int]string{0: "", 79: "", 80: codeOutboxNearlyFull, 99: codeOutboxNearlyFull, 100: codeOutboxFull, 110: codeOutboxFull} {
		got := ""
		if r := outboxFinding(share{percent: percent}); r != nil {
			if got = r.Code; r.Remedy == "" {
				t.Errorf("%d: no remedy", percent)
			}
		}
		if got != want {
			t.Errorf("%d percent: %q, want %q", percent, got, want)
		}
	}
	if outboxFinding(share{100, errors.New("bad page")}) != nil {
		t.Error("told of what could not be read")
	}
}

func TestTheAuditVerbs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l, err := audit.Open(auditDir(dir), "node-a", time.Now)
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if err := l.Append(audit.Entry{Kind: audit.KindAccepted, CommandID: "c", Verb: "cordon"}); err != nil {
			t.Fatal(err)
		}
	}
	verb := func(want int, args ...string) string {
		t.Helper()
		code, out, stderr := run(t, append([]string{"audit", "--state-dir", dir}, args...)...)
		if code != want || (want != exitOK) != (stderr != "") {
			t.Fatalf("%v: exit %d, stderr %q", args, code, stderr)
		}
		return out
	}
	verb(exitPrecondition, "export", filepath.Join(t.TempDir(), "early"))
	if _, err := l.Offer(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "export")
	for _, args := range [][]string{{"list"}, {"list", "--from", "2"}, {"verify"}, {"export", to}} {
		matchesSchema(t, verb(exitOK, append(args, "-o", "json")...))
	}
	verb(exitConflict, "export", to)
	verb(exitUsage, "list", "--last", "0")
	if out := verb(exitOK, "list", "--last", "2"); strings.Count(out, "command-accepted") != 2 || !strings.Contains(out, "cordon") {
		t.Errorf("listed:\n%s", out)
	}
	if out := verb(exitOK, "verify"); !strings.Contains(out, "5 intact, 5 signed for, 0 confirmed") {
		t.Errorf("verified:\n%s", out)
	}
	if err := os.Truncate(filepath.Join(auditDir(dir), "entries"), 9); err != nil {
		t.Fatal(err)
	}
	verb(exitPrecondition, "verify")
	verb(exitPrecondition, "list")
	if code, _, _ := run(t, "audit", "verify", "--state-dir", t.TempDir()); code != exitNotFound {
		t.Errorf("exit %d without a log", code)
	}
}
