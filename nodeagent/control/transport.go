package control

import (
	"context"
	"errors"
	"time"
)

// Transport makes connections to the control plane's message server.
type Transport interface {
	// Dial resolves, connects and authenticates anew. It ends with ctx.
	Dial(ctx context.Context) (Conn, error)
}

// Conn is one connection. Next is called by one goroutine; everything else may
// be called concurrently. A Conn never reconnects: when it is broken, Failed
// is closed and another is dialled.
type Conn interface {
	// Server names the other side, without credentials.
	Server() string
	// Next waits for a command. It returns ErrIdle when the server confirmed
	// within about idle that there is none; that is a round trip.
	Next(ctx context.Context, idle time.Duration) (Message, error)
	// Publish returns where the server stored the event: a number that grows
	// for as long as the server remembers. The same id is stored once within
	// the server's window of duplicates.
	Publish(ctx context.Context, o Outgoing) (at uint64, err error)
	// Failed is closed when the connection is broken; Err then says why.
	Failed() <-chan struct{}
	Err() error
	Close()
}

// Outgoing is one event on its way.
type Outgoing struct {
	Subject, ID string
	Data        []byte
	// After, unless 0, is where the last event of Subject has to be stored;
	// when it is not, nothing is, and the error is ErrOvertaken.
	After uint64
}

// Message is one delivery of a command. Without Ack it comes again.
type Message interface {
	Data() []byte
	// Attempt counts deliveries from 1.
	Attempt() uint64
	// Ack returns nil after the server confirmed that it is settled.
	Ack(ctx context.Context) error
	// Nak asks for another delivery after the delay.
	Nak(ctx context.Context, delay time.Duration) error
}

// Sentinels of Conn.
var (
	// ErrIdle means that there is no command, as confirmed by the server.
	ErrIdle = errors.New("no command waiting")
	// ErrTooLarge means that the event can never be published.
	ErrTooLarge = errors.New("event is larger than the server accepts")
	// ErrOvertaken means that an event of the subject was stored meanwhile.
	ErrOvertaken = errors.New("another event was stored before this one")
)

// State is what the link is doing, or why it cannot.
type State string

// States of the link.
const (
	StateConnecting         State = "connecting"          // nothing heard yet
	StateConnected          State = "connected"           // commands and events flow
	StateUnreachable        State = "unreachable"         // no server answers
	StateUntrusted          State = "untrusted"           // the server's certificate is not the pinned CA's
	StateCertificateExpired State = "certificate-expired" // the server's certificate is not valid yet, or not any more, at the agent's time
	StateCredentials        State = "credentials"         // CA or credentials file cannot be used
	StateAuthExpired        State = "auth-expired"        // the host's identity is past its end
	StateAuthRefused        State = "auth-refused"        // the server does not accept the identity
	StatePermission         State = "permission-denied"   // the identity may not use its own subjects
	StateConsumerMissing    State = "consumer-missing"    // no queue for this host
	StateStreamMissing      State = "stream-missing"      // nobody stores events
	StateSilent             State = "silent"              // connected, but nothing was confirmed for too long
)

// LinkError is why the link does not work, with what to do about it.
type LinkError struct {
	State  State
	Remedy string
	Err    error
}

func (e *LinkError) Error() string { return e.Err.Error() + "; " + e.Remedy }

func (e *LinkError) Unwrap() error { return e.Err }

// stateOf names an error; what no LinkError explains is the network's.
func stateOf(err error) State {
	if p, ok := errors.AsType[*LinkError](err); ok {
		return p.State
	}
	return StateUnreachable
}
