package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

func noon() time.Time { return time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC) }

func reopen(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path, noon, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func done(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestWhatIsAddedSurvivesAndHasOneEffect(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state", "state.db")
	s := reopen(t, path)
	first, err := s.Epoch()
	if err != nil || first.Number != 0 || first.StoreID == ([16]byte{}) {
		t.Fatalf("new store: %+v %v", first, err)
	}
	done(t, s.BeginEpoch(3, noon()))
	if err := s.BeginEpoch(3, noon()); err == nil {
		t.Error("an epoch begins twice")
	}
	for i, want := range []bool{true, false} {
		fresh, err := s.AddCommand(inbox.Command{ID: "a", Epoch: 3, Sequence: 1, ExpiresAt: noon(), Payload: []byte("p")})
		if err != nil || fresh != want {
			t.Errorf("adding %d: fresh %v, %v", i, fresh, err)
		}
	}
	done(t, s.Close())
	s = reopen(t, path)
	pending, err := s.PendingCommands()
	if err != nil || len(pending) != 1 || pending[0].Payload != nil || pending[0].Begun {
		t.Fatalf("pending %+v %v", pending, err)
	}
	for deaths := 1; deaths <= 2; deaths++ {
		if c, err := s.TakeCommand("a"); err != nil || string(c.Payload) != "p" || !c.Begun || c.Deaths != deaths {
			t.Errorf("taken: %+v %v", c, err)
		}
	}
	done(t, s.ReleaseCommand("a"))
	done(t, s.Close())
	s = reopen(t, path)
	if pending, err = s.PendingCommands(); err != nil || len(pending) != 1 || !pending[0].Begun || pending[0].Deaths != 1 {
		t.Errorf("after a restart: %+v %v", pending, err)
	}
	done(t, s.FinishCommand("a", &api.Event{EventId: "e1"}, &api.Event{EventId: "e2"}))
	if err := s.FinishCommand("nobody"); err == nil {
		t.Error("an unknown command is finished")
	}
	if pending, err = s.PendingCommands(); err != nil || len(pending) != 0 {
		t.Errorf("still pending: %+v %v", pending, err)
	}
	<-s.OutboxChanged()
	events, err := s.NextEvents(10)
	if err != nil || len(events) != 2 || events[0].GetSequence() != 1 || events[1].GetEventId() != "e2" {
		t.Errorf("outbox %v %v", events, err)
	}
	done(t, s.DropEvents(1))
	done(t, s.AppendEvents(&api.Event{EventId: "e3"}))
	if n, err := s.OutboxLen(); err != nil || n != 2 {
		t.Errorf("outbox holds %d, %v", n, err)
	}
	done(t, s.DropEvents(99))
	done(t, s.AppendEvents(&api.Event{EventId: "e4"}))
	if events, err = s.NextEvents(1); err != nil || len(events) != 1 || events[0].GetSequence() != 4 {
		t.Errorf("sequences are used again: %v %v", events, err)
	}
	done(t, s.Close())
}

func TestForgettingRaisesTheFloor(t *testing.T) {
	t.Parallel()
	s := reopen(t, filepath.Join(t.TempDir(), "state.db"))
	done(t, s.BeginEpoch(1, noon()))
	for i, id := range []string{"old", "pending", "young"} {
		expires := noon().Add(-time.Hour)
		if id == "young" {
			expires = noon().Add(time.Hour)
		}
		if _, err := s.AddCommand(inbox.Command{ID: id, Epoch: 1, Sequence: uint64(5 + i), ExpiresAt: expires}); err != nil {
			t.Fatal(err)
		}
	}
	done(t, s.FinishCommand("old"))
	done(t, s.FinishCommand("young"))
	n, err := s.PruneCommands(noon())
	e, epochErr := s.Epoch()
	known, knownErr := s.KnownCommand("young")
	if err := errors.Join(err, epochErr, knownErr); err != nil || n != 1 || e.Floor != 5 || !known {
		t.Errorf("forgot %d, floor %d, young known %v, %v", n, e.Floor, known, err)
	}
	done(t, s.Close())
}

func TestASecondAgentIsRefused(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	s := reopen(t, path)
	if _, err := Open(path, noon, hclog.NewNullLogger()); err == nil || contract.AsRefusal(err).Code != "store.in-use" ||
		!strings.Contains(contract.AsRefusal(err).Message, fmt.Sprintf("(process %d)", os.Getpid())) {
		t.Errorf("not refused, or without the holder's name: %v", err)
	}
	done(t, s.Close())
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v", info.Mode(), err)
	}
}

// A damaged store is set aside or refused, never served: the new one is in
// epoch 0, so that nothing can be carried out twice.
func TestADamagedStoreIsSetAside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "state.db")
	s := reopen(t, path)
	done(t, s.BeginEpoch(1, noon()))
	marker := strings.Repeat("payload", 20)
	if _, err := s.AddCommand(inbox.Command{ID: marker, Epoch: 1, Sequence: 1}); err != nil {
		t.Fatal(err)
	}
	done(t, s.Close())
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damage := map[string]func([]byte) []byte{
		"both headers gone": func(b []byte) []byte { clear(b[:8192]); return b },
		"cut to nothing":    func(b []byte) []byte { return b[:100] },
		"a record's byte": func(b []byte) []byte {
			i := strings.LastIndex(string(b), `"ID":"`)
			for j := range b[:i] { // every copy of the record, live or not
				if strings.HasPrefix(string(b[j:]), `"Sequence":1`) {
					b[j+11]++
				}
			}
			for j := i; j < len(b)-12; j++ {
				if string(b[j:j+12]) == `"Sequence":1` {
					b[j+11]++
				}
			}
			return b
		},
	}
	for name, change := range damage {
		if err := os.WriteFile(path, change(slices.Clone(good)), 0o600); err != nil {
			t.Fatal(err)
		}
		s := reopen(t, path)
		if e, err := s.Epoch(); err != nil || e.Number != 0 {
			t.Errorf("%s: served as %+v, %v", name, e, err)
		}
		done(t, s.Close())
		aside := SetAside(path)
		if len(aside) != 1 {
			t.Errorf("%s: set aside as %v", name, aside)
		}
		for _, a := range aside {
			done(t, os.Remove(a))
		}
	}
}

func FuzzUnseal(f *testing.F) {
	f.Add(seal(recordEvent, []byte("k"), []byte("x")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if payload, err := unseal(recordEvent, []byte("k"), raw); err == nil && string(seal(recordEvent, []byte("k"), payload)) != string(raw) {
			t.Error("a record has two encodings")
		}
	})
}
