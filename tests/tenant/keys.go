package tenant

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/sealed"
)

// KeyKind is what Keygen makes.
type KeyKind int

// Kinds of keys.
const (
	KeyX25519 KeyKind = iota // age identity
	KeyHybrid                // age identity, ML-KEM-768 with X25519
	KeyRaw                   // 32 random bytes
)

// Keygen makes a data key.
func Keygen(kind KeyKind) ([]byte, error) {
	switch kind {
	case KeyX25519:
		id, err := age.GenerateX25519Identity()
		if err != nil {
			return nil, fmt.Errorf("making key: %w", err)
		}
		return []byte(id.String() + "\n"), nil
	case KeyHybrid:
		id, err := age.GenerateHybridIdentity()
		if err != nil {
			return nil, fmt.Errorf("making key: %w", err)
		}
		return []byte(id.String() + "\n"), nil
	case KeyRaw:
		key := make([]byte, 32)
		if _, err := rand.Read(key); err != nil {
			return nil, fmt.Errorf("making key: %w", err)
		}
		return key, nil
	}
	return nil, fmt.Errorf("making key: unknown kind %d", kind)
}

// WriteKey writes a key to a new file that only its owner can read. An
// existing file is never overwritten.
func WriteKey(path string, key []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return contract.Refuse("tenant.key-conflict", "choose another file name; a key is never overwritten", "file %s exists", path)
	}
	if err != nil {
		return fmt.Errorf("writing key: %w", err)
	}
	_, err = f.Write(key)
	return errors.Join(err, f.Sync(), f.Close())
}

// dataKey is a key as it is registered at the broker, and what it opens and
// seals with.
type dataKey struct {
	bytes     []byte
	identity  age.Identity
	recipient age.Recipient
}

// parseKey understands an age identity file with one identity, and 32 raw
// bytes. Errors never carry the key.
func parseKey(data []byte) (*dataKey, error) {
	key := data
	if len(data) != 32 {
		key = identityLine(data)
	}
	id, err := sealed.IdentityFromKey(key)
	if err != nil {
		return nil, contract.Refuse("tenant.key-unsupported", "make one with tenant keygen: an age identity, or 32 raw bytes",
			"the encryption key is neither an age identity nor 32 raw bytes")
	}
	recipient, err := recipientOf(id)
	if err != nil {
		return nil, err
	}
	return &dataKey{bytes: key, identity: id, recipient: recipient}, nil
}

// identityLine finds the only line of an identity file that is no comment.
func identityLine(data []byte) []byte {
	var found []byte
	for line := range bytes.Lines(data) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if found != nil {
			return nil
		}
		found = line
	}
	return found
}

func recipientOf(id age.Identity) (age.Recipient, error) {
	switch id := id.(type) {
	case *age.X25519Identity:
		return id.Recipient(), nil
	case *age.HybridIdentity:
		return id.Recipient(), nil
	}
	return nil, fmt.Errorf("finding recipient: identity of type %T is not supported", id)
}

// Recipient returns the public half of a data key.
func Recipient(key []byte) (string, error) {
	k, err := parseKey(key)
	if err != nil {
		return "", err
	}
	text, ok := k.recipient.(fmt.Stringer)
	if !ok {
		return "", errors.New("finding recipient: it has no text form")
	}
	return text.String(), nil
}

// readKeyURL reads a data key given as file://PATH.
func readKeyURL(url string) (*dataKey, error) {
	path, ok := strings.CutPrefix(url, "file://")
	if !ok || path == "" {
		return nil, Usage("--encryption-key %q is not file://PATH", url)
	}
	return readKeyFile(path)
}

func readKeyFile(path string) (*dataKey, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading encryption key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, contract.Refuse("tenant.key-exposed", "chmod 600 the file, and make a new key if others could have read it",
			"others may read the encryption key file %s", path)
	}
	data, err := readSmall(path)
	if err != nil {
		return nil, fmt.Errorf("reading encryption key: %w", err)
	}
	return parseKey(data)
}

// checkSealed refuses what is not an age file: gpg with "re-seal", anything
// else as plaintext. It returns a reader that starts over with what it read.
func checkSealed(what string, r io.Reader) (io.Reader, error) {
	head := make([]byte, 64<<10)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading %s: %w", what, err)
	}
	head = head[:n]
	if err := sealed.CheckHeader(bytes.NewReader(head)); err != nil {
		if isOpenPGP(what, head) {
			return nil, refuseGPG(what)
		}
		return nil, contract.Refuse(codeNotSealed, "seal it first: tenant seal FILE --encryption-key file://KEY",
			"%s is not an age file; plaintext never leaves this machine", what).Because(err)
	}
	return io.MultiReader(bytes.NewReader(head), r), nil
}

// checkPlain refuses an input to be sealed here that is sealed already: the
// guest would open one layer and find another. Arbitrary data may begin as a
// binary OpenPGP message does, so that is told by its name or its armour only.
func checkPlain(what string, r io.Reader) (io.Reader, error) {
	head := make([]byte, 64)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading %s: %w", what, err)
	}
	head = head[:n]
	if bytes.HasPrefix(head, []byte("age-encryption.org/")) || bytes.HasPrefix(head, []byte("-----BEGIN AGE ENCRYPTED FILE-----")) {
		return nil, contract.Refuse(codeAlreadySealed, "upload it as it is (tenant upload FILE), name it as encrypted://bucket/key, and give its key with --encryption-key",
			"%s is sealed with age already and would be sealed twice", what)
	}
	if bytes.HasPrefix(head, []byte("-----BEGIN PGP MESSAGE")) || strings.HasSuffix(what, ".gpg") || strings.HasSuffix(what, ".pgp") {
		return nil, refuseGPG(what)
	}
	return io.MultiReader(bytes.NewReader(head), r), nil
}

func refuseGPG(what string) error {
	return contract.Refuse(codeFormatGPG, "re-seal it: gpg --decrypt FILE | tenant seal - --encryption-key file://KEY --out FILE.age",
		"%s is sealed with OpenPGP, which guests do not open", what)
}

// isOpenPGP recognises ASCII armour and the first packet of a binary message
// (RFC 9580 section 4.2: bit 7 set; public-key or symmetric session key,
// encrypted data, literal or compressed data).
func isOpenPGP(name string, head []byte) bool {
	for _, suffix := range []string{".gpg", ".pgp", ".asc"} {
		if strings.HasSuffix(name, suffix) {
			return true
		}
	}
	if bytes.HasPrefix(head, []byte("-----BEGIN PGP ")) {
		return true
	}
	if len(head) < 2 || head[0]&0x80 == 0 {
		return false
	}
	tag := head[0] >> 2 & 0x0f
	if head[0]&0x40 != 0 {
		tag = head[0] & 0x3f
	}
	switch tag {
	case 1, 3: // session key packets have version 3 (or 4, 5, 6) after the length
		return len(head) > 12 && bytes.ContainsAny(head[2:5], "\x03\x04\x05\x06")
	case 9, 18, 20:
		return true
	}
	return false
}
