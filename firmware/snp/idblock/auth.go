package idblock

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
)

// AuthSize is the size of ID auth: one page.
const AuthSize = 0x1000

// Layout of ID_AUTH_INFO.
const (
	offIDKeyAlgorithm     = 0x000
	offAuthorKeyAlgorithm = 0x004
	offReserved1          = 0x008
	offBlockSignature     = 0x040
	offIDKey              = 0x240
	offReserved2          = 0x644
	offIDKeySignature     = 0x680
	offAuthorKey          = 0x880
	offReserved3          = 0xC84

	// algorithmP384 is ECDSA P-384 with SHA-384; algorithmNone stands where
	// there is no author key.
	algorithmP384 = 1
	algorithmNone = 0
)

// ErrSignature means that a signature of ID auth does not hold; the firmware
// would answer "bad signature" to SNP_LAUNCH_FINISH.
var ErrSignature = errors.New("signature of the ID block does not hold")

// Signed is a pair that holds together.
type Signed struct {
	Block Block
	// RawBlock and RawAuth are what libvirt takes, base64 encoded, as idBlock
	// and idAuth.
	RawBlock, RawAuth []byte
	// IDKeyDigest is ID_KEY_DIGEST of the guest's reports.
	IDKeyDigest [DigestSize]byte
	// HasAuthorKey says that an author key signed the ID key. Then
	// AuthorKeyDigest is AUTHOR_KEY_DIGEST of the reports.
	HasAuthorKey    bool
	AuthorKeyDigest [DigestSize]byte
}

// Sign makes the pair. The ID key signs the block; the author key, where
// there is one, signs the ID key, so that a publisher can have an ID key for
// every image below one author key that verifiers pin.
//
// Signatures are deterministic (RFC 6979): the same inputs give the same
// bytes, and a poor source of randomness gives no key away.
func Sign(b Block, id, author *ecdsa.PrivateKey) (*Signed, error) {
	if id == nil {
		return nil, errors.New("signing ID block: there is no ID key")
	}
	auth := make([]byte, AuthSize)
	block := b.Marshal()
	binary.LittleEndian.PutUint32(auth[offIDKeyAlgorithm:], algorithmP384)
	idKey, err := encodeKey(&id.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("signing ID block: ID key: %w", err)
	}
	copy(auth[offIDKey:], idKey)
	signature, err := sign(id, block)
	if err != nil {
		return nil, fmt.Errorf("signing ID block: %w", err)
	}
	copy(auth[offBlockSignature:], signature)
	if author != nil {
		binary.LittleEndian.PutUint32(auth[offAuthorKeyAlgorithm:], algorithmP384)
		authorKey, err := encodeKey(&author.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("signing ID block: author key: %w", err)
		}
		copy(auth[offAuthorKey:], authorKey)
		if signature, err = sign(author, idKey); err != nil {
			return nil, fmt.Errorf("signing ID key: %w", err)
		}
		copy(auth[offIDKeySignature:], signature)
	}
	return Verify(block, auth)
}

// Verify checks a pair as the firmware does, and that nothing is where the
// layout has nothing. It does not say whose keys they are: compare their
// digests. That digest and policy are those of the launch is for the caller to
// compare, too.
func Verify(block, auth []byte) (*Signed, error) {
	b, err := ParseBlock(block)
	if err != nil {
		return nil, err
	}
	if len(auth) != AuthSize {
		return nil, fmt.Errorf("%w: ID auth has %d bytes, want %d", ErrMalformed, len(auth), AuthSize)
	}
	for _, gap := range [][2]int{{offReserved1, offBlockSignature}, {offReserved2, offIDKeySignature}, {offReserved3, AuthSize}} {
		if !zero(auth[gap[0]:gap[1]]) {
			return nil, fmt.Errorf("%w: reserved bytes %#x to %#x of ID auth are not zero", ErrMalformed, gap[0], gap[1])
		}
	}
	if a := binary.LittleEndian.Uint32(auth[offIDKeyAlgorithm:]); a != algorithmP384 {
		return nil, fmt.Errorf("%w: algorithm %d of the ID key is not supported, want %d", ErrMalformed, a, algorithmP384)
	}
	idKey, authorKey := auth[offIDKey:offReserved2], auth[offAuthorKey:offReserved3]
	overBlock, err := decodeSigned(idKey, auth[offBlockSignature:offIDKey], block)
	if err != nil {
		return nil, fmt.Errorf("ID key: %w", err)
	}
	s := &Signed{Block: b, RawBlock: bytes.Clone(block), RawAuth: bytes.Clone(auth), IDKeyDigest: sha512.Sum384(idKey)}
	signed := []signedData{overBlock}
	switch a := binary.LittleEndian.Uint32(auth[offAuthorKeyAlgorithm:]); a {
	case algorithmNone:
		if !zero(auth[offIDKeySignature:offReserved3]) {
			return nil, fmt.Errorf("%w: an author key without an algorithm", ErrMalformed)
		}
	case algorithmP384:
		overKey, err := decodeSigned(authorKey, auth[offIDKeySignature:offAuthorKey], idKey)
		if err != nil {
			return nil, fmt.Errorf("author key: %w", err)
		}
		s.HasAuthorKey, s.AuthorKeyDigest = true, sha512.Sum384(authorKey)
		signed = append(signed, overKey)
	default:
		return nil, fmt.Errorf("%w: algorithm %d of the author key is not supported, want %d", ErrMalformed, a, algorithmP384)
	}
	for i, d := range signed {
		if !d.holds() {
			return nil, fmt.Errorf("%w: %s", ErrSignature, [...]string{"the ID key's over the ID block", "the author key's over the ID key"}[i])
		}
	}
	return s, nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
