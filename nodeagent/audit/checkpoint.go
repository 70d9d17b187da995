package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/confidential-node/agent/nodeagent/durable"
)

// maxSmall bounds key and checkpoint files.
const maxSmall = 4 << 10

// tree is a signed tree head; the zero one is of the empty log and unsigned.
type tree struct {
	size int64
	root tlog.Hash
	text []byte
}

// signTree makes a checkpoint (C2SP tlog-checkpoint).
func signTree(signer note.Signer, size int64, root tlog.Hash) (tree, error) {
	text := fmt.Sprintf("%s\n%d\n%s\n", signer.Name(), size, root)
	signed, err := note.Sign(&note.Note{Text: text}, signer)
	if err != nil {
		return tree{}, fmt.Errorf("signing a checkpoint: %w", err)
	}
	return tree{size, root, signed}, nil
}

// openTree verifies a checkpoint. There is one way to write one: a bit that
// could be flipped unseen would let two checkpoints pass for one.
func openTree(text []byte, verifier note.Verifier) (tree, error) {
	bad := func(err error) (tree, error) { return tree{}, fmt.Errorf("reading a checkpoint: %w", err) }
	if len(text) > maxSmall {
		return bad(fmt.Errorf("it has %d bytes, limit is %d", len(text), maxSmall))
	}
	n, err := note.Open(text, note.VerifierList(verifier))
	if err != nil {
		return bad(err)
	}
	if len(n.Sigs) != 1 || len(n.UnverifiedSigs) != 0 {
		return bad(errors.New("it has signatures besides the log's"))
	}
	if _, err := base64.StdEncoding.Strict().DecodeString(n.Sigs[0].Base64); err != nil {
		return bad(err)
	}
	lines := strings.Split(n.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		return bad(errors.New("it is of another log"))
	}
	size, errSize := strconv.ParseInt(lines[1], 10, 64)
	root, errRoot := tlog.ParseHash(lines[2])
	if err := errors.Join(errSize, errRoot); err != nil {
		return bad(err)
	}
	if size < 1 || fmt.Sprintf("%s\n%d\n%s\n", lines[0], size, root) != n.Text {
		return bad(errors.New("it is not written as checkpoints are"))
	}
	return tree{size, root, bytes.Clone(text)}, nil
}

// loadTree reads a checkpoint file; the zero tree when there is none.
func loadTree(path string, verifier note.Verifier) (tree, error) {
	text, err := readSmall(path)
	if errors.Is(err, fs.ErrNotExist) {
		return tree{}, nil
	}
	if err != nil {
		return tree{}, err
	}
	t, err := openTree(text, verifier)
	if err != nil {
		return tree{}, damage("%s: %w", filepath.Base(path), err)
	}
	return t, nil
}

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	text, err := io.ReadAll(io.LimitReader(f, maxSmall+1))
	if err == nil && len(text) > maxSmall {
		err = damage("%s has more than %d bytes", filepath.Base(path), maxSmall)
	}
	return text, err
}

// newKey makes a log's key and with it its name: a log that was lost and begun
// again must not pass for the old one.
func newKey(hostID string) (skey string, err error) {
	id := make([]byte, 8)
	if _, err := rand.Read(id); err != nil {
		return "", err
	}
	skey, _, err = note.GenerateKey(rand.Reader, "nodeagent/"+hostID+"/"+hex.EncodeToString(id))
	return skey, err
}

// parseKey returns the signer and the verifier key of a key file.
func parseKey(text []byte) (note.Signer, string, error) {
	skey, ok := strings.CutSuffix(string(text), "\n")
	if !ok {
		return nil, "", errors.New("the key has no end")
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		return nil, "", errors.New("the key does not parse") // its error could quote it
	}
	parts := strings.SplitN(skey, "+", 5)
	if len(parts) != 5 {
		return nil, "", errors.New("the key does not parse")
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(parts[4])
	if err != nil || parts[3] != fmt.Sprintf("%08x", signer.KeyHash()) {
		return nil, "", errors.New("the key does not parse")
	}
	public, ok := ed25519.NewKeyFromSeed(raw[1:]).Public().(ed25519.PublicKey)
	if !ok {
		return nil, "", errors.New("the key does not parse")
	}
	vkey, err := note.NewEd25519VerifierKey(signer.Name(), public)
	return signer, vkey, err
}

// writeFile replaces a file, and is on disk when it returns.
func writeFile(path string, data []byte) error {
	if err := renameio.WriteFile(path, data, 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(path), err)
	}
	return durable.SyncDir(filepath.Dir(path))
}
