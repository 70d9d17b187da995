package inbox

import (
	"errors"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
)

// Epoch is the issuer epoch a store is in.
type Epoch struct {
	// Number is 0 until the first BeginEpoch of this store.
	Number uint64
	// Floor is the highest sequence whose id may have been forgotten. At or
	// below it a command cannot be told from a replay.
	Floor uint64
	// StoreID is random per store.
	StoreID [16]byte
	// Since is when the issuer began the epoch, by its own clock. What it
	// issued earlier is not of this epoch, even if it counts epochs anew. Zero
	// in stores of agents that did not note it.
	Since time.Time
}

// Command is one accepted command.
type Command struct {
	ID              string
	Epoch, Sequence uint64
	// ExpiresAt bounds how long the id must be remembered.
	ExpiresAt  time.Time
	ReceivedAt clock.Instant
	// Verb is the name of the command's verb in the wire format.
	Verb string
	// Guest and Generation are those of a StopGuest or LaunchGuest.
	Guest      string
	Generation uint64
	// Payload is the serialised Command, without its envelope.
	Payload []byte
	// Begun commands may have taken effect.
	Begun bool
	// Deaths is how often the agent died while it executed the command, the
	// execution at hand included.
	Deaths int
	// Done commands are remembered for their ids, and stops as fences.
	Done bool
}

// IsStop is true of a StopGuest, which overtakes launches.
func (c Command) IsStop() bool { return c.Verb == verbStop }

// ErrUnreadable means that a stored command is damaged and stays so.
var ErrUnreadable = errors.New("stored command cannot be read")

// Journal is what the inbox needs of the store. A nil error means that the
// change survives a power failure.
type Journal interface {
	Epoch() (Epoch, error)
	// BeginEpoch moves to a higher epoch, with floor 0, begun at a time of the
	// issuer's clock.
	BeginEpoch(number uint64, since time.Time) error
	// KnownCommand reports whether the id was added and is still remembered.
	KnownCommand(id string) (bool, error)
	// AddCommand remembers a command; fresh is false when the id is known.
	AddCommand(c Command) (fresh bool, err error)
	// PendingCommands are those not done, in any order, without payloads: a
	// long queue must not be in memory at once.
	PendingCommands() ([]Command, error)
	// Stops are the remembered StopGuests, done or not, without payloads.
	Stops() ([]Command, error)
	// TakeCommand marks a command begun, counts a death in advance, and
	// returns it whole. Whatever ends well takes the death back.
	TakeCommand(id string) (Command, error)
	// ReleaseCommand takes the death back of a command that stays pending.
	ReleaseCommand(id string) error
	// FinishCommand marks a command done and appends its outcome to the
	// outbox, both or neither.
	FinishCommand(id string, events ...*api.Event) error
	// AppendEvents appends events of no command to the outbox.
	AppendEvents(events ...*api.Event) error
	// OutboxLen is the number of events not yet dropped.
	OutboxLen() (int, error)
}
