package inputs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/inputs"
)

const keyText = "a raw key has exactly 32 bytes.."

// sealed seals to the identity that the broker's key text gives.
func sealed(t *testing.T, id *age.X25519Identity, plain string) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := age.Encrypt(&out, id.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write([]byte(plain))
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func describe(name string, data []byte) contract.Input {
	sum := sha256.Sum256(data)
	return contract.Input{Name: name, SHA256: hex.EncodeToString(sum[:]), Size: int64(len(data)), Format: contract.FormatAge}
}

// machine is a guest's disks and memory.
type machine struct {
	t     *testing.T
	store inputs.Store
	list  []contract.Input
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, store: inputs.Store{Disks: inputs.Disks{Sys: t.TempDir(), Dev: t.TempDir()}, Private: t.TempDir(), Plain: t.TempDir()}}
	m.disk("vdz", "not ours", nil)
	return m
}

func (m *machine) disk(name, serial string, data []byte) {
	m.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Join(m.store.Disks.Sys, name), 0o755),
		os.WriteFile(filepath.Join(m.store.Disks.Sys, name, "serial"), []byte(serial+"\n"), 0o600),
		os.WriteFile(filepath.Join(m.store.Disks.Dev, name), data, 0o600)); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) add(name string, data, onDisk []byte) {
	m.t.Helper()
	in := describe(name, data)
	m.list = append(m.list, in)
	m.disk("vd"+name, in.SHA256[:20], onDisk)
}

func (m *machine) run(key string) error {
	if err := m.store.Verify(m.t.Context(), m.list); err != nil {
		return err
	}
	return m.store.Open(m.t.Context(), m.list, func(context.Context, contract.Input) ([]byte, error) { return []byte(key), nil })
}

func files(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func identity(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestInputsAreOpenedFromPaddedDisks(t *testing.T) {
	t.Parallel()
	m, id := newMachine(t), identity(t)
	for _, name := range []string{"a", "b"} {
		data := sealed(t, id, "plain "+name)
		m.add(name, data, append(bytes.Clone(data), make([]byte, 512)...))
	}
	if err := m.run(id.String()); err != nil {
		t.Fatal(err)
	}
	if got := files(t, m.store.Plain); got != "a b" {
		t.Errorf("opened %q", got)
	}
	text, err := os.ReadFile(filepath.Join(m.store.Plain, "b"))
	if err != nil || string(text) != "plain b" {
		t.Errorf("%q %v", text, err)
	}
	if got := files(t, m.store.Private); got != "" {
		t.Errorf("ciphertext is left: %q", got)
	}
}

func TestNothingIsOpenedUnlessEverythingHolds(t *testing.T) {
	t.Parallel()
	id := identity(t)
	good := sealed(t, id, "plain")
	bad := bytes.Clone(good)
	bad[len(bad)-1] ^= 1
	for name, c := range map[string]struct {
		data, disk []byte
		key, code  string
	}{
		"changed":          {good, bad, id.String(), "guest.input-digest-mismatch"},
		"sealed again":     {good, sealed(t, id, "plain"), id.String(), "guest.input-digest-mismatch"},
		"short":            {good, good[:len(good)-1], id.String(), "guest.input-digest-mismatch"},
		"missing":          {good, nil, id.String(), "guest.input-missing"},
		"damaged at birth": {bad, bad, id.String(), "guest.input-damaged"},
		"not sealed":       {[]byte("plaintext"), []byte("plaintext"), id.String(), "guest.input-format"},
		"no key":           {good, good, "what is this", "guest.input-key"},
		"another raw key":  {good, good, keyText, "guest.input-key"},
		"another identity": {good, good, identity(t).String(), "guest.input-key"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			first := sealed(t, id, "first")
			m.add("a", first, first)
			m.add("b", c.data, c.disk)
			if c.disk == nil {
				m.disk("vdb", "elsewhere", good)
			}
			err := m.run(c.key)
			refused, ok := errors.AsType[*contract.Refusal](err)
			if !ok || refused.Code != c.code {
				t.Fatalf("%v", err)
			}
			verifies := c.code != "guest.input-digest-mismatch" && c.code != "guest.input-missing"
			if got := files(t, m.store.Plain); !verifies && got != "" {
				t.Errorf("opened before all was verified: %q", got)
			}
		})
	}
}

func TestInputsLeaveTheWorkloadRoom(t *testing.T) {
	t.Parallel()
	list := []contract.Input{{Size: 100}, {Size: 200}}
	if err := inputs.Budget(list, 1000); err != nil {
		t.Error(err)
	}
	err := inputs.Budget(list, 900)
	if refused, ok := errors.AsType[*contract.Refusal](err); !ok || refused.Code != "guest.out-of-memory" {
		t.Errorf("%v", err)
	}
	if err := inputs.Budget([]contract.Input{{Size: contract.MaxInputBytes}, {Size: contract.MaxInputBytes}}, 1<<40); err == nil {
		t.Error("more than there is")
	}
}

func TestAnEndedContextEndsTheCopy(t *testing.T) {
	t.Parallel()
	m, id := newMachine(t), identity(t)
	data := sealed(t, id, "plain")
	m.add("a", data, data)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.store.Verify(ctx, m.list); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
