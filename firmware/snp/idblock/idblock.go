// Package idblock builds, signs and checks the ID block and its ID
// authentication information, with which the publisher of a guest image says
// what launch digest the image has. The firmware refuses a launch that
// measures otherwise, and puts family, image, SVN and the digests of the keys
// into every report of the guest, so that a verifier can pin the publisher's
// key in place of each digest.
//
// It signs with the keys it is given and reads none from disk. All functions
// are pure and safe for concurrent use. Blocks to be checked come from parties
// that are not trusted: whatever is not exactly the layout is refused.
//
// Specification: AMD 56860 rev. 1.58 (SEV-SNP firmware ABI), SNP_LAUNCH_FINISH:
// tables ID_BLOCK and ID_AUTH_INFO, chapter 10 for keys and signatures. All
// integers are little endian.
package idblock

import (
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
)

// DigestSize is the size of a launch digest and of a key digest: SHA-384.
const DigestSize = sha512.Size384

// BlockSize is the size of an ID block.
const BlockSize = 0x60

// Layout of ID_BLOCK.
const (
	offLaunchDigest = 0x00
	offFamilyID     = 0x30
	offImageID      = 0x40
	offVersion      = 0x50
	offGuestSVN     = 0x54
	offPolicy       = 0x58

	// blockVersion is the only one there is.
	blockVersion = 1
)

// ErrMalformed means that bytes are no ID block, ID auth or key this build
// understands.
var ErrMalformed = errors.New("malformed ID block")

// Block is an ID block, decoded.
type Block struct {
	// LaunchDigest is the only one the firmware starts under this block.
	LaunchDigest [DigestSize]byte
	// FamilyID and ImageID are the publisher's own names.
	FamilyID, ImageID [16]byte
	// GuestSVN is the image's security version.
	GuestSVN uint32
	// Policy must be the guest policy of the launch.
	Policy uint64
}

// Marshal encodes the block.
func (b Block) Marshal() []byte {
	data := make([]byte, BlockSize)
	copy(data[offLaunchDigest:], b.LaunchDigest[:])
	copy(data[offFamilyID:], b.FamilyID[:])
	copy(data[offImageID:], b.ImageID[:])
	binary.LittleEndian.PutUint32(data[offVersion:], blockVersion)
	binary.LittleEndian.PutUint32(data[offGuestSVN:], b.GuestSVN)
	binary.LittleEndian.PutUint64(data[offPolicy:], b.Policy)
	return data
}

// ParseBlock decodes a block. It has no reserved bytes: every one means
// something.
func ParseBlock(data []byte) (Block, error) {
	var b Block
	if len(data) != BlockSize {
		return b, fmt.Errorf("%w: %d bytes, want %d", ErrMalformed, len(data), BlockSize)
	}
	if v := binary.LittleEndian.Uint32(data[offVersion:]); v != blockVersion {
		return b, fmt.Errorf("%w: version %d is not supported, want %d", ErrMalformed, v, blockVersion)
	}
	copy(b.LaunchDigest[:], data[offLaunchDigest:])
	copy(b.FamilyID[:], data[offFamilyID:])
	copy(b.ImageID[:], data[offImageID:])
	b.GuestSVN = binary.LittleEndian.Uint32(data[offGuestSVN:])
	b.Policy = binary.LittleEndian.Uint64(data[offPolicy:])
	return b, nil
}
