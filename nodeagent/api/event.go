package api

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/firmware/contract"
)

// MaxEventBytes bounds a serialised event: evidence of 512 KiB and its frame
// fit a transport's message of 1 MiB.
const MaxEventBytes = 1<<20 - 4096

// Kinds of events: the last token of an event's subject.
const (
	KindCommandRefused = "command-refused"
	KindGuestState     = "guest-state"
	KindEvidence       = "evidence"
	KindResultUploaded = "result-uploaded"
	KindCapability     = "capability"
	KindHeartbeat      = "heartbeat"
	KindCommandDone    = "command-done"
	KindResultGivenUp  = "result-given-up"
	KindGrantWanted    = "upload-grant-wanted"
	KindUploadReady    = "upload-ready"
)

// EventBody is the body of an event: one of the Event_… wrappers.
type EventBody = isEvent_Body

// NewEvent makes an event with a fresh id. commandID is the command it is an
// outcome of, or empty. The outbox sets the sequence.
func NewEvent(hostID, commandID string, at time.Time, body EventBody) *Event {
	return &Event{
		EventId: NewID(), HostId: hostID, At: timestamppb.New(at), CommandId: commandID, Body: body,
	}
}

// NewID returns a new UUIDv7 in its canonical form, for commands and events.
func NewID() string { return uuid.Must(uuid.NewV7()).String() }

// NewGuestState makes the event that a guest changed.
func NewGuestState(hostID, commandID string, at time.Time, s *GuestState) *Event {
	return NewEvent(hostID, commandID, at, &Event_GuestState{GuestState: s})
}

// NewRefused makes the event that a command was refused. commandID is empty
// when the command could not be believed; envelope is the SHA-256 of the bytes
// as received, nil when they are no longer at hand.
func NewRefused(hostID, commandID string, at time.Time, r *contract.Refusal, envelope []byte) *Event {
	return NewEvent(hostID, commandID, at, &Event_CommandRefused{CommandRefused: &CommandRefused{
		Refusal: RefusalToWire(r), EnvelopeSha256: hex.EncodeToString(envelope),
	}})
}

// NewDone makes the event that a command without an event of its own took
// effect.
func NewDone(hostID, commandID string, at time.Time) *Event {
	return NewEvent(hostID, commandID, at, &Event_CommandDone{CommandDone: &CommandDone{}})
}

// NewEvidence makes the event that answers a challenge. evidence is relayed
// as the guest gave it.
func NewEvidence(hostID, commandID string, at time.Time, guestID string, evidence []byte) *Event {
	return NewEvent(hostID, commandID, at, &Event_Evidence{Evidence: &EvidenceReady{GuestId: guestID, Evidence: evidence}})
}

// NewResultGivenUp makes the event that one result will not leave the host.
func NewResultGivenUp(hostID, commandID string, at time.Time, r *ResultGivenUp) *Event {
	return NewEvent(hostID, commandID, at, &Event_ResultGivenUp{ResultGivenUp: r})
}

// NewResultUploaded makes the event that one result left the host.
func NewResultUploaded(hostID, commandID string, at time.Time, r *ResultUploaded) *Event {
	return NewEvent(hostID, commandID, at, &Event_ResultUploaded{ResultUploaded: r})
}

// NewGrantWanted makes the event that one result waits for URLs.
func NewGrantWanted(hostID, commandID string, at time.Time, w *UploadGrantWanted) *Event {
	return NewEvent(hostID, commandID, at, &Event_UploadGrantWanted{UploadGrantWanted: w})
}

// NewUploadReady makes the event that one result's parts can be completed.
func NewUploadReady(hostID, commandID string, at time.Time, r *UploadReady) *Event {
	return NewEvent(hostID, commandID, at, &Event_UploadReady{UploadReady: r})
}

// EventKind returns the kind of an event: its body's field name with dashes,
// "" when there is no body this build knows.
func EventKind(e *Event) string {
	m := e.ProtoReflect()
	body := m.WhichOneof(m.Descriptor().Oneofs().ByName("body"))
	if body == nil {
		return ""
	}
	return strings.ReplaceAll(string(body.Name()), "_", "-")
}

// MarshalEvent serialises an event for the wire.
func MarshalEvent(e *Event) ([]byte, error) {
	data, err := proto.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encoding event: %w", err)
	}
	if len(data) > MaxEventBytes {
		return nil, fmt.Errorf("encoding event: it has %d bytes, limit is %d", len(data), MaxEventBytes)
	}
	return data, nil
}

// ParseEvent decodes an event. Fields and bodies it does not know are
// ignored; an event id and a host id must be there.
func ParseEvent(data []byte) (*Event, error) {
	if len(data) > MaxEventBytes {
		return nil, fmt.Errorf("parsing event: it has %d bytes, limit is %d", len(data), MaxEventBytes)
	}
	e := &Event{}
	if err := (proto.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: maxDepth}).Unmarshal(data, e); err != nil {
		return nil, fmt.Errorf("parsing event: %w", err)
	}
	if !validUUID(e.GetEventId(), 0) || !ValidHostID(e.GetHostId()) {
		return nil, errors.New("parsing event: event_id or host_id is malformed")
	}
	return e, nil
}

// Word is the status as people say it: the wire's name without its prefix, in
// lower case.
func (x GuestStatus) Word() string {
	return strings.ToLower(strings.TrimPrefix(x.String(), "GUEST_STATUS_"))
}

// CommandSubject is where a host's commands travel.
func CommandSubject(hostID string) string { return "cmd." + hostID }

// EventSubject is where a host's events of one kind travel.
func EventSubject(hostID, kind string) string { return "evt." + hostID + "." + kind }
