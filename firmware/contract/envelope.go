package contract

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// Sentinels of OpenEnvelope.
var (
	// ErrEnvelope means the bytes are not one well-formed envelope.
	ErrEnvelope = errors.New("malformed envelope")
	// ErrUnsigned means no signature verifies under an accepted key.
	ErrUnsigned = errors.New("no valid signature by an accepted key")
)

type envelope struct {
	PayloadType string              `json:"payloadType"`
	Payload     string              `json:"payload"`
	Signatures  []envelopeSignature `json:"signatures"`
}

type envelopeSignature struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// KeyID names an Ed25519 public key: hex SHA-256 of its 32 bytes.
func KeyID(key ed25519.PublicKey) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:])
}

// preAuth is DSSE v1's pre-authentication encoding.
func preAuth(payloadType string, payload []byte) []byte {
	out := []byte("DSSEv1 " + strconv.Itoa(len(payloadType)) + " " + payloadType + " " + strconv.Itoa(len(payload)) + " ")
	return append(out, payload...)
}

// SealEnvelope signs payload as a DSSE v1 envelope with an Ed25519 key.
func SealEnvelope(payloadType string, payload []byte, key ed25519.PrivateKey) ([]byte, error) {
	if len(key) != ed25519.PrivateKeySize { // Public would panic
		return nil, errors.New("signing envelope: not an Ed25519 key")
	}
	pub, ok := key.Public().(ed25519.PublicKey)
	if !ok {
		return nil, errors.New("signing envelope: not an Ed25519 key")
	}
	return json.Marshal(envelope{payloadType, base64.StdEncoding.EncodeToString(payload), []envelopeSignature{
		{KeyID(pub), base64.StdEncoding.EncodeToString(ed25519.Sign(key, preAuth(payloadType, payload)))},
	}})
}

// OpenEnvelope verifies a DSSE envelope of at most limit bytes and returns
// the exact payload bytes that were signed. The payload is not looked at
// before one signature of an accepted key holds. Exactly one payload type is
// accepted, and 1 to 4 signatures.
func OpenEnvelope(data []byte, payloadType string, limit int, keys []ed25519.PublicKey) ([]byte, error) {
	var env envelope
	if err := UnmarshalStrict(data, limit, &env); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEnvelope, err)
	}
	if env.PayloadType != payloadType {
		return nil, fmt.Errorf("%w: payload type %q, want %q", ErrEnvelope, env.PayloadType, payloadType)
	}
	payload, err := base64.StdEncoding.Strict().DecodeString(env.Payload)
	if err != nil {
		return nil, fmt.Errorf("%w: payload: %w", ErrEnvelope, err)
	}
	if len(env.Signatures) < 1 || len(env.Signatures) > 4 {
		return nil, fmt.Errorf("%w: %d signatures, need 1 to 4", ErrEnvelope, len(env.Signatures))
	}
	signed := preAuth(payloadType, payload)
	for _, s := range env.Signatures {
		sig, err := base64.StdEncoding.Strict().DecodeString(s.Sig)
		if err != nil || len(sig) != ed25519.SignatureSize {
			return nil, fmt.Errorf("%w: signature is not 64 bytes of base64", ErrEnvelope)
		}
		for _, key := range keys {
			if len(key) == ed25519.PublicKeySize && s.KeyID == KeyID(key) && ed25519.Verify(key, signed, sig) {
				return payload, nil
			}
		}
	}
	return nil, ErrUnsigned
}
