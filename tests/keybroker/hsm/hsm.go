// Package hsm wraps secrets with an AES key that lives in a PKCS#11 token and
// cannot leave it (CKM_AES_GCM, PKCS#11 3.0 section 6.13).
//
// It owns one session of one token, and nothing on disk. Wrapping keys are
// called LABEL-1, LABEL-2 and so on; what is wrapped names its key, and new
// secrets are wrapped by the newest. A key that could be read out of the token
// is refused, not used with a warning.
//
// It must not retry a PIN that was refused: tokens lock after a few. The PIN
// is read from its file for each login and never kept; PINs and secrets are in
// no error. A token that goes away is looked for at the next call.
//
// A Token is safe for concurrent use; calls go one after another. PKCS#11
// state belongs to the process: a library serves one Token at a time.
package hsm

import (
	"crypto/rand"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// callTimeout bounds the wait for a turn and for the token's answer. A call
// into the library cannot be ended: one that hangs keeps its thread and the
// turn, and every later call ends with CodeBusy, without a thread of its own.
const callTimeout = 10 * time.Second

// Sizes of AES-GCM (NIST SP 800-38D): the nonce's is the one that needs no
// hashing, and random ones are good for 2^32 secrets per key.
const (
	nonceBytes = 12
	tagBits    = 128
	keyBytes   = 32
)

// MaxSecretBytes bounds one secret.
const MaxSecretBytes = 64 << 10

// Config of a Token. All fields are required.
type Config struct {
	// Library is the token's PKCS#11 module.
	Library string
	// Label names the token.
	Label string
	// PINFile holds the user PIN; nobody but its owner may have access.
	PINFile string
	// Key is the label of the wrapping keys, without the generation.
	Key string
}

// Wrapped is a secret that only the token can open.
type Wrapped struct {
	// Key is the label of the wrapping key.
	Key        string `json:"key"`
	Nonce      []byte `json:"nonce"`
	Ciphertext []byte `json:"ciphertext"`
}

// Token is an open token.
type Token struct {
	cfg     Config
	timeout time.Duration
	lib     *pkcs11.Ctx
	closed  atomic.Bool

	// turn is held by the call that uses what follows.
	turn chan struct{}
	link *link
	// refused is a login that must not be repeated.
	refused error
}

// Open loads the library and logs in.
func Open(cfg Config) (*Token, error) {
	if !validLabel(cfg.Key) || cfg.Library == "" || cfg.Label == "" || cfg.PINFile == "" {
		return nil, errors.New("opening token: library, token label, PIN file and the key's label (letters, digits, dot, dash, underscore) are required")
	}
	lib := pkcs11.New(cfg.Library)
	if lib == nil {
		return nil, refuseLibrary(cfg.Library)
	}
	t := &Token{cfg: cfg, timeout: callTimeout, lib: lib, turn: make(chan struct{}, 1)}
	if _, err := call(t, func() (struct{}, error) { return struct{}{}, nil }); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// Close logs out. A call that hangs keeps the library loaded.
func (t *Token) Close() error {
	if t.closed.Swap(true) {
		return nil
	}
	select {
	case t.turn <- struct{}{}: // for good
		t.drop()
		t.lib.Destroy()
		return nil
	case <-time.After(t.timeout):
		return refuseBusy()
	}
}

// Newest is the label of the key that new secrets are wrapped with.
func (t *Token) Newest() (string, error) {
	return call(t, func() (string, error) { return t.link.newest(t.cfg.Key) })
}

// Wrap encrypts a secret with the newest key and binds it to aad.
func (t *Token) Wrap(secret, aad []byte) (*Wrapped, error) {
	if len(secret) == 0 || len(secret) > MaxSecretBytes {
		return nil, fmt.Errorf("wrapping: %d bytes, need 1 to %d", len(secret), MaxSecretBytes)
	}
	return call(t, func() (*Wrapped, error) {
		label, err := t.link.newest(t.cfg.Key)
		if err != nil {
			return nil, err
		}
		w := &Wrapped{Key: label, Nonce: make([]byte, nonceBytes)}
		rand.Read(w.Nonce) // never fails: crypto/rand aborts the program instead
		params := pkcs11.NewGCMParams(w.Nonce, aad, tagBits)
		defer params.Free()
		mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}
		if err := t.lib.EncryptInit(t.link.session, mechanism, t.link.keys[label]); err != nil {
			return nil, err
		}
		w.Ciphertext, err = t.lib.Encrypt(t.link.session, secret)
		return w, err
	})
}

// Unwrap opens what Wrap made with the same aad. The caller wipes the secret.
func (t *Token) Unwrap(w *Wrapped, aad []byte) ([]byte, error) {
	if len(w.Nonce) != nonceBytes || len(w.Ciphertext) <= tagBits/8 || len(w.Ciphertext) > MaxSecretBytes+tagBits/8 {
		return nil, refuseDamaged(nil)
	}
	return call(t, func() ([]byte, error) {
		key, ok := t.link.keys[w.Key]
		if !ok {
			return nil, refuseKeyMissing(w.Key)
		}
		params := pkcs11.NewGCMParams(w.Nonce, aad, tagBits)
		defer params.Free()
		mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}
		if err := t.lib.DecryptInit(t.link.session, mechanism, key); err != nil {
			return nil, err
		}
		secret, err := t.lib.Decrypt(t.link.session, w.Ciphertext)
		if err != nil && !lost(err) {
			return nil, refuseDamaged(err)
		}
		return secret, err
	})
}

// call does one thing in the token, in its turn and within the time for it.
func call[T any](t *Token, do func() (T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	var none T
	timer := time.NewTimer(t.timeout)
	defer timer.Stop()
	select {
	case t.turn <- struct{}{}:
	case <-timer.C:
		return none, refuseBusy()
	}
	done := make(chan outcome, 1)
	go func() {
		defer func() { <-t.turn }()
		value, err := attempt(t, do)
		done <- outcome{value, err}
	}()
	select {
	case o := <-done:
		return o.value, o.err
	case <-timer.C:
		return none, refuseBusy()
	}
}

// attempt logs in where that is needed. A session that was lost is made anew
// once, and the call with it: wrapping and unwrapping change nothing.
func attempt[T any](t *Token, do func() (T, error)) (T, error) {
	var none T
	for again := true; ; again = false {
		if err := t.connect(); err != nil {
			return none, err
		}
		value, err := do()
		if err == nil {
			return value, nil
		}
		if !lost(err) {
			return none, explain(err)
		}
		t.drop()
		if !again {
			return none, explain(err)
		}
	}
}
