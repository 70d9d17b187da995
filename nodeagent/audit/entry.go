package audit

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// maxEntry bounds a line; entries are made of ids, codes and digests.
const maxEntry = 4 << 10

// Kinds of entries that are no events; an event's is api.EventKind.
const (
	// KindBegun is the first entry of every log.
	KindBegun = "log-begun"
	// KindStarted says that an agent started.
	KindStarted = "agent-started"
	// KindAccepted is written before an accepted command is stored.
	KindAccepted = "command-accepted"
	// KindUnlisted counts refusals of bytes nobody signed that came too fast to
	// be listed each.
	KindUnlisted = "refusals-unlisted"
	// KindPlatform is a change of the SEV firmware by an operator: before it
	// with status "unknown", after it with its outcome.
	KindPlatform = "platform-change"
)

// Entry is one line of the log. Every field may be empty but the first three.
type Entry struct {
	// Index is the entry's place, from 0.
	Index int64 `json:"index"`
	// At is the host's clock.
	At   time.Time `json:"at"`
	Kind string    `json:"kind"`
	// CommandID is the command it is about or comes from, Verb what that asks.
	CommandID string `json:"command_id,omitempty"`
	Verb      string `json:"verb,omitempty"`
	GuestID   string `json:"guest_id,omitempty"`
	// Generation of the guest.
	Generation uint64 `json:"generation,omitempty"`
	// Status is the guest's, or how a change of the platform ended.
	Status string `json:"status,omitempty"`
	// Code is a refusal's.
	Code string `json:"code,omitempty"`
	// SHA256 (hex) is of what the entry stands for: the command's payload, the
	// refused envelope, the event as it is stored.
	SHA256 string `json:"sha256,omitempty"`
	// Detail says more: a version, a command to the firmware.
	Detail string `json:"detail,omitempty"`
	// UID is the operator's.
	UID *int `json:"uid,omitempty"`
	// Count is how many an entry stands for.
	Count int `json:"count,omitempty"`
}

// takesOn says that more entries will follow from this one.
func (e Entry) takesOn() bool { return e.Kind == KindAccepted && e.Verb != "stop_guest" }

// parseEntry reads a line without its end.
func parseEntry(line []byte, index int64) (e Entry, err error) {
	if err := contract.UnmarshalStrict(line, maxEntry, &e); err != nil {
		return e, fmt.Errorf("entry %d does not parse: %w", index, err)
	}
	if e.Index != index || e.Kind == "" || e.At.IsZero() {
		return e, fmt.Errorf("entry %d says it is %d of kind %q", index, e.Index, e.Kind)
	}
	return e, nil
}

func formatEntry(e Entry) ([]byte, error) {
	line, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encoding an entry: %w", err)
	}
	if len(line) >= maxEntry {
		return nil, fmt.Errorf("encoding an entry: it has %d bytes, limit is %d", len(line), maxEntry)
	}
	return line, nil
}
