package tenant

import (
	"bytes"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
)

func TestRotatedKeyOpensTheNewObjectsAndTheOldOneIsWithdrawn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.deploy()
	keyFile := filepath.Join(t.TempDir(), "new.key")
	r, err := w.tenant.RotateKey(t.Context(), "job", keyFile)
	if err != nil || len(r.Inputs) != 1 || r.Inputs[0].Key == d.Inputs[0].Key {
		t.Fatalf("%+v %v", r, err)
	}
	key, err := readKeyFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	sealed, _, err := w.tenant.store.Get(t.Context(), r.Inputs[0].Bucket, r.Inputs[0].Key)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := age.Decrypt(sealed, key.identity)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(plain); err != nil || string(got) != plaintext {
		t.Fatalf("%q %v", got, err)
	}
	s, err := w.tenant.Status(t.Context(), "job")
	if err != nil || slices.Contains(s.Broker.Resources, "job/age/data") {
		t.Fatalf("%+v %v", s, err)
	}
	if w.uploads.contains(plaintext) {
		t.Fatal("plaintext was uploaded")
	}
	if _, err := w.tenant.RotateKey(t.Context(), "job", keyFile); code(err) != "tenant.key-conflict" {
		t.Fatalf("a key file was overwritten: %v", err)
	}
	o := w.options(d.RequestedImage)
	o.Datasets, o.EncryptionKey, o.Replace = []string{"records.csv=encrypted://" + r.Inputs[0].Bucket + "/" + r.Inputs[0].Key}, "file://"+keyFile, true
	if _, err := w.tenant.Deploy(t.Context(), o); err != nil {
		t.Fatal(err)
	}
}

func TestRotatingAChangedObjectIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.deploy()
	key, err := readKeyFile(w.tenant.state.path("job", "data.key"))
	if err != nil {
		t.Fatal(err)
	}
	var other bytes.Buffer
	if _, err := Seal(&other, strings.NewReader("swapped"), key.recipient); err != nil {
		t.Fatal(err)
	}
	if err := w.tenant.store.Put(t.Context(), d.Inputs[0].Bucket, d.Inputs[0].Key, bytes.NewReader(other.Bytes()), int64(other.Len())); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tenant.RotateKey(t.Context(), "job", filepath.Join(t.TempDir(), "k")); code(err) != "tenant.object-changed" {
		t.Fatal(err)
	}
}

func TestSecretResourceIsReplacedWhereItIsRegistered(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy()
	names, err := w.tenant.RotateResource(t.Context(), "kbs:///job/env/TOKEN", []byte("new"))
	if err != nil || !slices.Equal(names, []string{"job"}) {
		t.Fatalf("%v %v", names, err)
	}
	for uri, want := range map[string]string{
		"kbs:///job/env/NONE": "tenant.resource-not-found", "kbs:///job/age/data": "tenant.data-key-rotation", "job/env/TOKEN": codeUsage,
	} {
		if _, err := w.tenant.RotateResource(t.Context(), uri, []byte("v")); code(err) != want {
			t.Errorf("%s: %v", uri, err)
		}
	}
}

func TestUploadRefusesWhatIsNotSealed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for file, want := range map[string]string{
		w.file("plain.csv", plaintext):                  codeNotSealed,
		w.file("empty", ""):                             codeNotSealed,
		w.file("x.gpg", "anything"):                     codeFormatGPG,
		w.file("y", "-----BEGIN PGP MESSAGE-----\nabc"): codeFormatGPG,
		w.file("truncated.age", "age-encryp"):           codeNotSealed,
	} {
		if _, err := w.tenant.Upload(t.Context(), file, ""); code(err) != want || contract.AsRefusal(err).Remedy == "" {
			t.Errorf("%s: %v", file, err)
		}
	}
	if w.uploads.contains(plaintext) {
		t.Fatal("plaintext was uploaded")
	}
}

func TestKeysAreNeverOverwrittenOrShared(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "key")
	for _, kind := range []KeyKind{KeyX25519, KeyHybrid, KeyRaw} {
		raw, err := Keygen(kind)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Recipient(raw); err != nil {
			t.Errorf("kind %d: %v", kind, err)
		}
	}
	if err := WriteKey(path, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := WriteKey(path, []byte("y")); ExitCode(err) != ExitConflict {
		t.Fatal(err)
	}
}
