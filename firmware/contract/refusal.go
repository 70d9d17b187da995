package contract

import (
	"errors"
	"fmt"
)

// Refusal is the typed "no" of every party: node, guest, key broker, tenant
// tool. It travels to the other side, so Message and Remedy never carry
// secrets or wrapped local errors; those stay in Cause, which is not encoded.
type Refusal struct {
	// Code is stable and machine readable: lower-case words joined by dots,
	// for instance "command.expired". Peers branch on it.
	Code string `json:"code"`
	// Message says what was refused and why, in one sentence.
	Message string `json:"message"`
	// Remedy says what the reader does next. Never empty.
	Remedy string `json:"remedy"`
	// Cause is the local error behind the refusal, for the local log only.
	Cause error `json:"-"`
}

// Refuse builds a refusal. The message is formatted with args.
func Refuse(code, remedy, format string, args ...any) *Refusal {
	return &Refusal{Code: code, Message: fmt.Sprintf(format, args...), Remedy: remedy}
}

// Because returns a copy of r that carries the local cause.
func (r *Refusal) Because(cause error) *Refusal {
	c := *r
	c.Cause = cause
	return &c
}

func (r *Refusal) Error() string {
	if r.Cause != nil {
		return fmt.Sprintf("%s (%s): %v", r.Message, r.Code, r.Cause)
	}
	return fmt.Sprintf("%s (%s)", r.Message, r.Code)
}

func (r *Refusal) Unwrap() error { return r.Cause }

// AsRefusal returns the refusal inside err, or one with code "internal" that
// hides the details of an untyped error from the peer.
func AsRefusal(err error) *Refusal {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r
	}
	return Refuse("internal", "look at the local log of the party that answered; if it repeats, report it with that log",
		"an internal error").Because(err)
}
