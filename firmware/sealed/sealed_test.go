package sealed_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"

	"github.com/confidential-node/agent/firmware/sealed"
)

func seal(tb testing.TB, recipients ...age.Recipient) []byte {
	tb.Helper()
	var out bytes.Buffer
	w, err := age.Encrypt(&out, recipients...)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write([]byte("plaintext")); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

func TestARawKeyAlwaysBecomesTheSameIdentity(t *testing.T) {
	t.Parallel()
	key := bytes.Repeat([]byte{7}, sealed.RawKeySize)
	a, err := sealed.IdentityFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	identity, ok := a.(*age.X25519Identity)
	if !ok {
		t.Fatalf("identity is a %T", a)
	}
	b, err := sealed.IdentityFromKey(bytes.Clone(key))
	if err != nil {
		t.Fatal(err)
	}
	r, err := age.Decrypt(bytes.NewReader(seal(t, identity.Recipient())), b)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(r); err != nil || string(text) != "plaintext" {
		t.Errorf("%q %v", text, err)
	}
	other, err := sealed.IdentityFromKey(bytes.Repeat([]byte{8}, sealed.RawKeySize))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := age.Decrypt(bytes.NewReader(seal(t, identity.Recipient())), other); err == nil {
		t.Error("another key opens the file")
	}
}

func TestAgeIdentitiesAreTakenAsTheyAre(t *testing.T) {
	t.Parallel()
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	hybrid, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{x.String() + "\n", "# made today\n" + x.String(), hybrid.String()} {
		if _, err := sealed.IdentityFromKey([]byte(text)); err != nil {
			t.Error(err)
		}
	}
	for _, text := range []string{"", "secret", x.String() + "\n" + x.String(), strings.Repeat("k", 31)} {
		_, err := sealed.IdentityFromKey([]byte(text))
		if err == nil || (text != "" && strings.Contains(err.Error(), text)) {
			t.Errorf("key of %d bytes: %v", len(text), err)
		}
	}
}

func TestOnlySealedFilesPass(t *testing.T) {
	t.Parallel()
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	hybrid, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	scrypt, err := age.NewScryptRecipient("passphrase")
	if err != nil {
		t.Fatal(err)
	}
	scrypt.SetWorkFactor(1)
	for _, file := range [][]byte{seal(t, x.Recipient()), seal(t, hybrid.Recipient()), seal(t, x.Recipient(), x.Recipient())} {
		if err := sealed.CheckHeader(bytes.NewReader(file)); err != nil {
			t.Error(err)
		}
	}
	var armoured bytes.Buffer
	w := armor.NewWriter(&armoured)
	_, writeErr := w.Write(seal(t, x.Recipient()))
	if err := errors.Join(writeErr, w.Close()); err != nil {
		t.Fatal(err)
	}
	file := seal(t, x.Recipient())
	for name, bad := range map[string][]byte{
		"plaintext": []byte("hello"), "nothing": nil, "passphrase": seal(t, scrypt), "armour": armoured.Bytes(),
		"cut short": file[:40], "gpg": {0x85, 1, 2, 3}, "no recipients": []byte("age-encryption.org/v1\n--- abc\n"),
		"endless": append([]byte("age-encryption.org/v1\n-> X25519 a\n"), bytes.Repeat([]byte("a\n"), 1<<16)...),
	} {
		if err := sealed.CheckHeader(bytes.NewReader(bad)); !errors.Is(err, sealed.ErrNotSealed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What passes here must be an age file to the guest as well: its parser may
// then fail to find an identity, or a byte that is damaged, and nothing else.
func FuzzCheckHeader(f *testing.F) {
	x, err := age.GenerateX25519Identity()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("age-encryption.org/v1\n-> X25519 abc\nabc\n--- mac\n"))
	f.Add(seal(f, x.Recipient()))
	f.Fuzz(func(t *testing.T, data []byte) {
		err := sealed.CheckHeader(bytes.NewReader(data))
		if err != nil && !errors.Is(err, sealed.ErrNotSealed) {
			t.Errorf("untyped: %v", err)
		}
		if _, decryptErr := age.Decrypt(bytes.NewReader(data), x); decryptErr == nil && err != nil {
			t.Errorf("age opens what is refused here: %v", err)
		}
	})
}

// A broker's answer is a key or it is refused, and no error repeats it.
func FuzzIdentityFromKey(f *testing.F) {
	x, err := age.GenerateX25519Identity()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("# comment\n" + x.String() + "\n"))
	f.Add(bytes.Repeat([]byte{7}, sealed.RawKeySize))
	f.Add([]byte("AGE-SECRET-KEY-PQ-1"))
	f.Fuzz(func(t *testing.T, key []byte) {
		id, err := sealed.IdentityFromKey(key)
		if (id == nil) == (err == nil) || (err != nil && len(key) > 8 && strings.Contains(err.Error(), string(key))) {
			t.Errorf("%v %v", id, err)
		}
		if len(key) == sealed.RawKeySize && err != nil {
			t.Errorf("a raw key is refused: %v", err)
		}
	})
}
