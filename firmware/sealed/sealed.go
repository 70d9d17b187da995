// Package sealed is what tenant, guest and node share about sealed files: the
// one format (age v1), how a key becomes an age identity, and how to tell a
// sealed file from any other without being able to open it. Pure; it keeps no
// key and logs nothing.
package sealed

import (
	"bufio"
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
)

// RawKeySize is the size of a key that is no age identity.
const RawKeySize = 32

// identityLabel separates this use of a raw key from every other.
const identityLabel = "nodeagent age identity v1"

// maxHeader bounds an age header: 16 hybrid stanzas are about 28 KiB.
const maxHeader = 64 << 10

// maxStanzas bounds the recipients of one file.
const maxStanzas = 32

// ErrNotSealed means that bytes are no age file this version accepts.
var ErrNotSealed = errors.New("not sealed with age for X25519 or hybrid recipients")

// IdentityFromKey turns what a broker releases into an age identity: the text
// of an age identity (X25519 or hybrid, comments allowed), or 32 raw bytes,
// from which an X25519 identity is derived by HKDF-SHA256. Errors never carry
// the key.
func IdentityFromKey(key []byte) (age.Identity, error) {
	if len(key) == RawKeySize {
		scalar, err := hkdf.Key(sha256.New, key, nil, identityLabel, RawKeySize)
		if err != nil {
			return nil, fmt.Errorf("deriving identity: %w", err)
		}
		return age.ParseX25519Identity(strings.ToUpper(bech32("age-secret-key-", scalar)))
	}
	identities, err := age.ParseIdentities(bytes.NewReader(key))
	if err != nil || len(identities) != 1 {
		return nil, fmt.Errorf("key of %d bytes is neither one age identity nor %d raw bytes", len(key), RawKeySize)
	}
	return identities[0], nil
}

// CheckHeader reads an age header and refuses anything else: another format,
// armour, passphrases, plugins, more than 32 recipients.
func CheckHeader(r io.Reader) error {
	header := bufio.NewReader(io.LimitReader(r, maxHeader))
	line := func() (string, error) {
		text, err := header.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("%w: header ends early", ErrNotSealed)
		}
		return strings.TrimSuffix(text, "\n"), nil
	}
	first, err := line()
	if err != nil {
		return err
	}
	if first != "age-encryption.org/v1" {
		return fmt.Errorf("%w: another format", ErrNotSealed)
	}
	stanzas := 0
	for {
		text, err := line()
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(text, "--- "):
			if stanzas == 0 {
				return fmt.Errorf("%w: no recipients", ErrNotSealed)
			}
			return nil
		case strings.HasPrefix(text, "-> "):
			kind, _, _ := strings.Cut(text[3:], " ")
			if stanzas++; stanzas > maxStanzas {
				return fmt.Errorf("%w: more than %d recipients", ErrNotSealed, maxStanzas)
			}
			// "grease" stanzas are part of the format and end in that word.
			if kind != "X25519" && kind != "mlkem768x25519" && !strings.HasSuffix(kind, "-grease") {
				return fmt.Errorf("%w: recipient of another kind", ErrNotSealed)
			}
		case stanzas == 0:
			return fmt.Errorf("%w: malformed header", ErrNotSealed)
		}
	}
}

// bech32 encodes data as BIP 173 does. age has an encoder, but exports only
// the parser of what it makes.
func bech32(hrp string, data []byte) string {
	const charset = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
	var words []byte
	acc, bits := uint32(0), 0
	for _, b := range data {
		acc, bits = acc<<8|uint32(b), bits+8
		for bits >= 5 {
			bits -= 5
			words = append(words, byte(acc>>bits)&31)
		}
	}
	if bits > 0 {
		words = append(words, byte(acc<<(5-bits))&31)
	}
	var expanded []byte
	for _, c := range []byte(hrp) {
		expanded = append(expanded, c>>5)
	}
	expanded = append(expanded, 0)
	for _, c := range []byte(hrp) {
		expanded = append(expanded, c&31)
	}
	check := polymod(append(append(expanded, words...), 0, 0, 0, 0, 0, 0)) ^ 1
	for i := range 6 {
		words = append(words, byte(check>>(5*(5-i)))&31)
	}
	out := []byte(hrp + "1")
	for _, w := range words {
		out = append(out, charset[w])
	}
	return string(out)
}

func polymod(values []byte) uint32 {
	generator := [5]uint32{0x3b6a57b2, 0x26508e6d, 0x1ea119fa, 0x3d4233dd, 0x2a1462b3}
	check := uint32(1)
	for _, v := range values {
		top := check >> 25
		check = check&0x1ffffff<<5 ^ uint32(v)
		for i, g := range generator {
			if top>>i&1 == 1 {
				check ^= g
			}
		}
	}
	return check
}
