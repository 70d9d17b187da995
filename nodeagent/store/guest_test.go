package store

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.etcd.io/bbolt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

// oldStore is a store of layout 1: epoch 7, command "a", event "e1".
func oldStore(t *testing.T) []byte { t.Helper(); return saved(t, "state-v1.db.gz") }

func saved(t *testing.T, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // read only
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t *testing.T, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAnOlderLayoutIsMigrated(t *testing.T) {
	t.Parallel()
	path := write(t, oldStore(t))
	for range 2 { // the second opening finds it migrated
		s := reopen(t, path)
		e, err := s.Epoch()
		pending, pendingErr := s.PendingCommands()
		guests, guestsErr := s.Guests()
		if err := errors.Join(err, pendingErr, guestsErr); err != nil || e.Number != 7 || len(pending) != 1 || len(guests) != 0 {
			t.Errorf("epoch %+v, %d commands, %d guests, %v", e, len(pending), len(guests), err)
		}
		done(t, s.PutGuest(Guest{ID: "g"}))
		done(t, s.DeleteGuest("g"))
		done(t, s.Close())
	}
}

// The store of layout 2 has epoch 7, commands "a" (done) and "b", guests "g"
// (which is to stop) and "h", events 2 and 3, a cordon, and a record of
// forwarding that nobody reads any more.
func TestMomentsOfAnOlderLayoutKeepTheirWallTime(t *testing.T) {
	t.Parallel()
	path := write(t, saved(t, "state-v2.db.gz"))
	for range 2 {
		s := reopen(t, path)
		wall := func(d time.Duration) clock.Instant { return clock.Instant{Wall: noon().Add(d)} }
		g, err := s.Guest("g")
		want := map[contract.GuestPhase]clock.Instant{contract.PhaseBooted: wall(0), contract.PhaseRunning: wall(time.Minute)}
		if err != nil || g.AcceptedAt != wall(0) || g.Stop.Deadline != wall(time.Hour) || g.GiveUp.Deadline != wall(2*time.Hour) ||
			!reflect.DeepEqual(g.Phases, want) || g.Generation != 2 || g.Ports[0] != (Port{Guest: 8000, Host: 20000}) || string(g.Launch) != "launch" {
			t.Errorf("guest %+v, %v", g, err)
		}
		guests, guestsErr := s.Guests()
		pending, pendingErr := s.PendingCommands()
		events, eventsErr := s.NextEvents(9)
		reason, on, cordonErr := s.Cordon()
		e, epochErr := s.Epoch()
		if err := errors.Join(guestsErr, pendingErr, eventsErr, cordonErr, epochErr); err != nil {
			t.Fatal(err)
		}
		if len(guests) != 2 || len(pending) != 1 || pending[0].ReceivedAt != wall(time.Minute) || len(events) != 2 || events[1].GetSequence() != 3 ||
			reason != "disk change" || !on || e.Number != 7 || !e.Since.IsZero() {
			t.Errorf("%d guests, commands %+v, events %v, cordon %q, epoch %+v", len(guests), pending, events, reason, e)
		}
		done(t, s.Close())
	}
	s := reopen(t, path)
	done(t, s.AppendEvents(&api.Event{EventId: "e4"}))
	if events, err := s.NextEvents(9); err != nil || len(events) != 3 || events[2].GetSequence() != 4 {
		t.Errorf("the sequence begins anew: %v %v", events, err)
	}
	done(t, s.Close())
}

func TestANewerLayoutIsRefusedAndKept(t *testing.T) {
	t.Parallel()
	path := write(t, oldStore(t))
	s := reopen(t, path)
	done(t, s.update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("meta")).Put([]byte("schema"), seal(recordSchema, []byte("schema"), []byte{0, 0, 0, schemaVersion + 1}))
	}))
	done(t, s.Close())
	if _, err := Open(path, noon, hclog.NewNullLogger()); err == nil || contract.AsRefusal(err).Code != "store.newer" {
		t.Errorf("not refused: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error("the newer store is gone")
	}
}

func TestAGuestSurvivesWithItsEvents(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	s := reopen(t, path)
	at := clock.Instant{Wall: noon(), BootID: "boot", Up: time.Minute}
	want := Guest{
		ID: "b", Generation: 2, CommandID: "c", Launch: []byte("launch"), Slot: 3, Ports: []Port{{Guest: 8000, Host: 20000}},
		Status: api.GuestStatus_GUEST_STATUS_STARTED, AcceptedAt: at,
		Steps:   []Step{{Name: "tap", BegunAt: noon(), DoneAt: noon().Add(time.Second)}},
		Phases:  map[contract.GuestPhase]clock.Instant{contract.PhaseBooted: at},
		Outcome: contract.Refuse("a.b", "do", "why"), Stop: &Stop{CommandID: "s", Deadline: at},
		Results: []Result{{Name: "r", Uploaded: true}},
	}
	done(t, s.PutGuest(want, &api.Event{EventId: "e1"}))
	done(t, s.PutGuest(Guest{ID: "a", AcceptedAt: at.Add(time.Hour)}))
	done(t, s.Close())
	s = reopen(t, path)
	got, err := s.Guest("b")
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read back %+v, %v", got, err)
	}
	guests, err := s.Guests()
	if err != nil || len(guests) != 2 || guests[0].ID != "b" {
		t.Errorf("not in the order of acceptance: %+v %v", guests, err)
	}
	if n, err := s.OutboxLen(); err != nil || n != 1 {
		t.Errorf("%d events, %v", n, err)
	}
	done(t, s.DeleteGuest("b"))
	done(t, s.DeleteGuest("b"))
	if _, err := s.Guest("b"); !errors.Is(err, ErrNoGuest) {
		t.Errorf("still there: %v", err)
	}
	done(t, s.Close())
}

func TestACloneCanBeChangedAlone(t *testing.T) {
	t.Parallel()
	a := Guest{Steps: []Step{{Name: "a"}}, Phases: map[contract.GuestPhase]clock.Instant{}, Results: []Result{{Name: "a"}}, Ports: []Port{{Guest: 1, Host: 2}}}
	b := a.Clone()
	b.Steps[0].Name, b.Results[0].Name, b.Ports[0].Guest = "b", "b", 9
	b.Phases[contract.PhaseDone] = clock.Instant{}
	if a.Steps[0].Name != "a" || a.Results[0].Name != "a" || a.Ports[0].Guest != 1 || len(a.Phases) != 0 {
		t.Errorf("changed with its clone: %+v", a)
	}
}

func TestTheCordonSurvives(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	s := reopen(t, path)
	if _, on, err := s.Cordon(); err != nil || on {
		t.Errorf("a new store is cordoned: %v", err)
	}
	done(t, s.SetCordon("disk change", true, &api.Event{EventId: "e"}))
	done(t, s.Close())
	s = reopen(t, path)
	if reason, on, err := s.Cordon(); err != nil || !on || reason != "disk change" {
		t.Errorf("cordon %v %q %v", on, reason, err)
	}
	done(t, s.SetCordon("", false))
	if _, on, err := s.Cordon(); err != nil || on {
		t.Errorf("still cordoned: %v", err)
	}
	done(t, s.Close())
}

// A full outbox takes on nothing new, but what was taken on can still end.
func TestAFullOutboxClosesAdmissionOnly(t *testing.T) {
	t.Parallel()
	s := reopen(t, filepath.Join(t.TempDir(), "state.db"))
	s.limit, s.reserve = 2, 2
	done(t, s.PutGuest(Guest{ID: "old"}, &api.Event{}))
	if _, err := s.AddCommand(inbox.Command{ID: "old", Sequence: 1}); err != nil {
		t.Fatal(err)
	}
	done(t, s.AppendEvents(&api.Event{}))
	_, addErr := s.AddCommand(inbox.Command{ID: "new", Sequence: 2})
	for what, err := range map[string]error{
		"command": addErr, "guest": s.PutGuest(Guest{ID: "new"}), "event": s.AppendEvents(&api.Event{}),
	} {
		if !errors.Is(err, ErrOutboxFull) {
			t.Errorf("%s taken: %v", what, err)
		}
	}
	if fresh, err := s.AddCommand(inbox.Command{ID: "stop", Sequence: 3, Verb: "stop_guest"}); err != nil || !fresh {
		t.Errorf("a stop is not taken: %v", err)
	}
	done(t, s.PutGuest(Guest{ID: "old", Slot: 1}, &api.Event{}))
	done(t, s.FinishCommand("old", &api.Event{}))
	if err := s.PutGuest(Guest{ID: "old", Slot: 2}, &api.Event{}); !errors.Is(err, ErrOutboxFull) {
		t.Errorf("no end to it: %v", err)
	}
	if g, err := s.Guest("old"); err != nil || g.Slot != 1 {
		t.Errorf("half a change: %+v %v", g, err)
	}
	done(t, s.Close())
}

// The outbox is bounded in bytes too, also after a restart, and what leaves it
// makes room.
func TestLargeEventsFillTheOutbox(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	large := &api.Event{HostId: string(bytes.Repeat([]byte{'x'}, 1000))}
	s := reopen(t, path)
	s.limitBytes = 2500
	done(t, s.AppendEvents(large, large))
	done(t, s.Close())
	s = reopen(t, path)
	s.limitBytes = 2500
	if err := s.AppendEvents(large); !errors.Is(err, ErrOutboxFull) {
		t.Errorf("taken: %v", err)
	}
	done(t, s.DropEvents(1))
	done(t, s.AppendEvents(large))
	if events, err := s.NextEvents(10); err != nil || len(events) != 2 || events[1].GetSequence() != 3 {
		t.Errorf("%d events, %v", len(events), err)
	}
	done(t, s.Close())
}

func TestAForgottenSequenceIsAReplay(t *testing.T) {
	t.Parallel()
	s := reopen(t, filepath.Join(t.TempDir(), "state.db"))
	done(t, s.BeginEpoch(1, noon()))
	if _, err := s.AddCommand(inbox.Command{ID: "a", Epoch: 1, Sequence: 5, Done: true}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.PruneCommands(noon()); err != nil || n != 1 {
		t.Fatalf("forgot %d, %v", n, err)
	}
	_, err := s.AddCommand(inbox.Command{ID: "a", Epoch: 1, Sequence: 5})
	if err == nil || contract.AsRefusal(err).Code != api.CodeReplayed {
		t.Errorf("taken again: %v", err)
	}
	done(t, s.Close())
}

// Whatever bits flip, opening gives a store, or a refusal or error, and the
// process lives. Seeded, so that a failure can be looked at.
func TestFlippedBitsNeverEndTheProcess(t *testing.T) {
	t.Parallel()
	old := oldStore(t)
	random := rand.New(rand.NewPCG(1, 2))
	aside := 0
	for range 120 {
		data := bytes.Clone(old)
		for range 1 + random.IntN(8) {
			at := random.IntN(len(data))
			if random.IntN(2) == 0 {
				at = at&^4095 + at%64 // the head of a page
			}
			data[at] ^= 1 << random.IntN(8)
		}
		path := write(t, data)
		s, err := Open(path, noon, hclog.NewNullLogger())
		if err != nil {
			continue
		}
		found, err := filepath.Glob(path + ".corrupt-*")
		if err != nil {
			t.Fatal(err)
		}
		aside += len(found)
		if _, err := s.Epoch(); err != nil {
			t.Errorf("served although damaged: %v", err)
		}
		done(t, s.Close())
		done(t, os.RemoveAll(filepath.Dir(path)))
	}
	if aside < 15 {
		t.Error("little damage was found: the test flips the wrong bits")
	}
}

// Branch pages, overflow pages and free ones are what an intact store is made
// of: they must not be taken for damage.
func TestALargeStoreIsIntact(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	s := reopen(t, path)
	s.db.NoSync = true
	for i := range 400 {
		id := api.NewID()
		done(t, s.PutGuest(Guest{ID: id, Launch: bytes.Repeat([]byte{byte(i)}, i*50)}, &api.Event{EventId: id}))
		if i%3 == 0 {
			done(t, s.DeleteGuest(id))
		}
	}
	done(t, s.DropEvents(250))
	done(t, s.db.Sync())
	done(t, s.Close())
	s = reopen(t, path)
	guests, err := s.Guests()
	n, lenErr := s.OutboxLen()
	if err := errors.Join(err, lenErr); err != nil || len(guests) != 266 || n != 150 {
		t.Errorf("%d guests, %d events, %v", len(guests), n, err)
	}
	done(t, s.Close())
}

func FuzzCheckFile(f *testing.F) {
	z, err := os.Open("testdata/state-v1.db.gz")
	if err != nil {
		f.Fatal(err)
	}
	r, err := gzip.NewReader(z)
	if err != nil {
		f.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data, uint16(0), byte(0))
	f.Add(data[:9000], uint16(16), byte(1))
	f.Fuzz(func(_ *testing.T, data []byte, at uint16, with byte) {
		if int(at) < len(data) {
			data = bytes.Clone(data)
			data[at] ^= with
		}
		_ = checkFile(bytes.NewReader(data), int64(len(data)))
	})
}
