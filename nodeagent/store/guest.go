package store

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
)

// ErrNoGuest means that no guest of that id is remembered.
var ErrNoGuest = errors.New("no such guest")

// Guest is everything the agent must remember of one guest, from acceptance
// until the id may be forgotten. What it means is lifecycle's to say.
type Guest struct {
	ID         string
	Generation uint64
	// CommandID is the launch's; LaunchID the manifest's.
	CommandID, LaunchID string
	// Launch is the serialised api.LaunchGuest. It holds credentials
	// (presigned URLs) and is cleared when the guest has ended.
	Launch []byte `json:",omitempty"`
	// BootID is the host's at acceptance: after a reboot nothing of the guest
	// can be there.
	BootID string
	// Slot decides tap and addresses.
	Slot      uint32
	VCPUs     int
	MemoryMiB uint64
	Ports     []Port `json:",omitempty"`
	Limits    Limits

	Status     api.GuestStatus
	AcceptedAt clock.Instant
	// Steps in the order they were begun. A step is written as begun before
	// its first effect, as done after its last.
	Steps []Step `json:",omitempty"`
	// Phases are when the guest first reported each of its phases, Phase the
	// last one, Guest its refusal and exit code: its own word.
	Phases       map[contract.GuestPhase]clock.Instant `json:",omitempty"`
	Phase        contract.GuestPhase                   `json:",omitempty"`
	GuestRefusal *contract.Refusal                     `json:",omitempty"`
	ExitCode     int                                   `json:",omitempty"`
	// Stop is the intent of a StopGuest.
	Stop *Stop `json:",omitempty"`
	// Results of the guest that were uploaded, or given up.
	Results []Result `json:",omitempty"`
	// Undoing says that everything is being taken down, Final which status
	// that will end in, and Outcome why it is not a success.
	Undoing bool              `json:",omitempty"`
	Final   api.GuestStatus   `json:",omitempty"`
	Outcome *contract.Refusal `json:",omitempty"`
	// DeliverBy is when results that still wait for their object store are
	// given up, unless their URLs say otherwise; set when the first is due.
	DeliverBy time.Time `json:",omitzero"`
	// Wish is what the delivery waits for, or waited for last.
	Wish *Wish `json:",omitempty"`
	// GiveUp is the intent of a StopGuest that came while results waited for
	// their object store.
	GiveUp *Stop `json:",omitempty"`
	// EndedAt is when the guest had ended and nothing of it was left; its id
	// is kept until KeepUntil.
	EndedAt, KeepUntil time.Time
}

// Port is one published TCP port, with a Name one on the shared TLS port.
type Port struct {
	Guest, Host uint16
	Name        string `json:",omitempty"`
}

// Limits of one guest, as admitted.
type Limits struct {
	Start, Run  time.Duration
	ResultBytes int64
}

// Step is one acquisition.
type Step struct {
	Name            string
	BegunAt, DoneAt time.Time
	// UndoAt is when its undo was begun, GoneAt when nothing of it was seen.
	UndoAt, GoneAt time.Time
}

// Stop is the intent to end a guest: it gets until Deadline to do so itself.
type Stop struct {
	CommandID string
	Deadline  clock.Instant
}

// Result is one sealed result that left the host, or why it did not.
type Result struct {
	Name     string
	Uploaded bool
	Failure  *contract.Refusal `json:",omitempty"`
}

// Wish is what a file's upload in parts wants of whoever holds the object
// store's keys: a grant, or that the upload is completed.
type Wish struct {
	Name, UploadID string
	// Parts that were there.
	Parts int
	// Complete says that all were.
	Complete bool `json:",omitempty"`
	// Granted says that a grant came since, Settled that the completion did.
	Granted, Settled bool `json:",omitempty"`
}

// PutGuest stores a guest and appends events to the outbox, both or neither.
// A guest that is not known yet is refused while the outbox is full.
func (s *Store) PutGuest(g Guest, events ...*api.Event) error {
	return s.append(events, s.reserve, func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("guests"))
		if b.Get([]byte(g.ID)) == nil {
			if err := s.room(tx, 0, 1, 0); err != nil {
				return err
			}
		}
		return putJSON(b, []byte(g.ID), recordGuest, g)
	})
}

// Guest returns one guest, or ErrNoGuest.
func (s *Store) Guest(id string) (g Guest, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		raw := tx.Bucket([]byte("guests")).Get([]byte(id))
		if raw == nil {
			return fmt.Errorf("%w: %s", ErrNoGuest, id)
		}
		return getJSON([]byte(id), raw, recordGuest, &g)
	})
	return g, err
}

// Guests returns all guests in the order of their acceptance.
func (s *Store) Guests() (guests []Guest, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("guests")).ForEach(func(id, raw []byte) error {
			var g Guest
			if err := getJSON(id, raw, recordGuest, &g); err != nil {
				return err
			}
			guests = append(guests, g)
			return nil
		})
	})
	slices.SortFunc(guests, func(a, b Guest) int {
		return cmp.Or(a.AcceptedAt.Wall.Compare(b.AcceptedAt.Wall), cmp.Compare(a.ID, b.ID))
	})
	return guests, err
}

// DeleteGuest forgets a guest. One that is not known is no error.
func (s *Store) DeleteGuest(id string) error {
	return s.update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("guests")).Delete([]byte(id)) })
}

type cordon struct {
	On     bool
	Reason string
}

// SetCordon closes or opens admission and appends events to the outbox, both
// or neither.
func (s *Store) SetCordon(reason string, on bool, events ...*api.Event) error {
	return s.append(events, s.reserve, func(tx *bbolt.Tx) error {
		return putJSON(tx.Bucket([]byte("meta")), []byte("cordon"), recordCordon, cordon{on, reason})
	})
}

// Cordon reports whether admission is closed, and why.
func (s *Store) Cordon() (reason string, on bool, err error) {
	var c cordon
	err = s.metaJSON("cordon", &c)
	return c.Reason, c.On, err
}

// Clone returns a copy that can be changed apart from the original. What is
// behind pointers is replaced, never changed.
func (g Guest) Clone() Guest {
	g.Ports, g.Steps, g.Results = slices.Clone(g.Ports), slices.Clone(g.Steps), slices.Clone(g.Results)
	g.Phases = maps.Clone(g.Phases)
	return g
}
