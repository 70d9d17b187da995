package inputs_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
	sealedformat "github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/vm/guest/inputs"
)

// A ciphertext comes from the tenant and is what its digest says; what it
// holds may still be anything, and so may the released key.
func FuzzOpen(f *testing.F) {
	identity, err := sealedformat.IdentityFromKey([]byte(keyText))
	if err != nil {
		f.Fatal(err)
	}
	x25519, ok := identity.(*age.X25519Identity)
	if !ok {
		f.Fatalf("identity is a %T", identity)
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, x25519.Recipient())
	if err != nil {
		f.Fatal(err)
	}
	if _, err := w.Write([]byte("plain")); err != nil {
		f.Fatal(err)
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(out.Bytes(), []byte(keyText))
	f.Add([]byte("age-encryption.org/v1\n-> X25519 AAAA\n"), []byte("AGE-SECRET-KEY-1"))
	f.Add([]byte("plain"), []byte{})
	f.Fuzz(func(t *testing.T, ciphertext, key []byte) {
		dir := t.TempDir()
		from, to := filepath.Join(dir, "sealed"), filepath.Join(dir, "plain")
		if err := os.WriteFile(from, ciphertext, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := inputs.Open(t.Context(), from, contract.Input{Name: "a"}, key, to); err != nil {
			return
		}
		if info, err := os.Stat(to); err != nil || info.Size() > int64(len(ciphertext)) {
			t.Errorf("opened more than was sealed: %v", err)
		}
	})
}
