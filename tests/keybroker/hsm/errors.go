package hsm

import (
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/confidential-node/agent/firmware/contract"
)

// Codes of the refusals. Those of the token pass when somebody mends it.
const (
	CodeLibrary     = "broker.token-library"
	CodeMissing     = "broker.token-missing"
	CodeAmbiguous   = "broker.token-ambiguous"
	CodePINFile     = "broker.token-pin-file"
	CodePIN         = "broker.token-pin"
	CodeLocked      = "broker.token-locked"
	CodeBusy        = "broker.token-busy"
	CodeFailed      = "broker.token-failed"
	CodeKeyMissing  = "broker.wrapping-key-missing"
	CodeExtractable = "broker.wrapping-key-extractable"
	CodeDamaged     = "broker.resource-damaged"
)

func refuseLibrary(path string) error {
	return contract.Refuse(CodeLibrary, "name the module that the token's maker ships, for SoftHSM libsofthsm2.so",
		"the PKCS#11 library cannot be loaded").Because(fmt.Errorf("loading %s", path))
}

func refuseMissing(label string) error {
	return contract.Refuse(CodeMissing, "connect and initialise the token, or correct its label; nothing needs to be restarted",
		"no token labelled %q with a user PIN is there", label)
}

func refuseAmbiguous(what, label string) error {
	return contract.Refuse(CodeAmbiguous, "give each a label of its own, or remove what does not belong there", "several %s are labelled %q", what, label)
}

func refusePINFile(cause error) error {
	return contract.Refuse(CodePINFile, "write the PIN into a file of 1 to 256 bytes with mode 0600, of the account that runs the broker",
		"the token's PIN file cannot be used").Because(cause)
}

func refuseLocked() error {
	return contract.Refuse(CodeLocked, "let the token's security officer set a new PIN, write it to the PIN file, and restart", "the token has locked its user PIN")
}

func refuseLastTry() error {
	return contract.Refuse(CodeLocked, "log in once by hand with the right PIN, which resets the count, and correct the PIN file",
		"one more wrong PIN would lock the token, so it is not tried")
}

func refuseBusy() error {
	return contract.Refuse(CodeBusy, "look at the token and its connection; restart the broker if it stays so", "the token does not answer")
}

func refuseKeyMissing(label string) error {
	return contract.Refuse(CodeKeyMissing, "restore the token from its backup, or make the first key with keybroker token init",
		"the token has no wrapping key %q", label)
}

func refuseExtractable(label string) error {
	return contract.Refuse(CodeExtractable, "make the key in the token with keybroker token init or rotate, never import it; remove this one or give another --token-key",
		"wrapping key %q is not a private AES-256 key that was made in the token and can never leave it", label)
}

func refuseDamaged(cause error) error {
	return contract.Refuse(CodeDamaged, "let the tenant register the resource again; restore the state folder from its backup if others are damaged too",
		"the wrapped resource does not open: it was changed, or is another's").Because(cause)
}

func refuseFailed(cause error) error {
	return contract.Refuse(CodeFailed, "look up the error in the token's manual and in the broker's log", "the token refused to work").Because(cause)
}

// loginRefused is the refusal of a PIN that must not be tried again.
func loginRefused(err error) error {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return nil
	}
	switch uint(code) {
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED:
		return contract.Refuse(CodePIN, "correct the PIN file and restart; the PIN is not tried again, because tokens lock", "the token refused the PIN").Because(err)
	case pkcs11.CKR_PIN_LOCKED:
		return refuseLocked()
	}
	return nil
}

// lost reports whether the session, and not the request, is at fault.
func lost(err error) bool {
	if _, ok := errors.AsType[*contract.Refusal](err); ok {
		return false
	}
	var code pkcs11.Error
	return errors.As(err, &code) && slices.Contains([]uint{
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_KEY_HANDLE_INVALID,
		pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SLOT_ID_INVALID,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_USER_NOT_LOGGED_IN,
	}, uint(code))
}

// explain makes a refusal of what the library says.
func explain(err error) error {
	if _, ok := errors.AsType[*contract.Refusal](err); ok {
		return err
	}
	var code pkcs11.Error
	if errors.As(err, &code) && slices.Contains([]uint{
		pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
	}, uint(code)) {
		return contract.Refuse(CodeMissing, "connect the token; nothing needs to be restarted", "the token was taken away").Because(err)
	}
	return refuseFailed(err)
}
