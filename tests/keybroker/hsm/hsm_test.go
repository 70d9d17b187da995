package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/hsm/hsmtest"
)

// PKCS#11 state belongs to the process, so these tests run one by one.

func code(err error) string {
	if refused, ok := errors.AsType[*contract.Refusal](err); ok && refused.Remedy != "" {
		return refused.Code
	}
	return fmt.Sprint(err)
}

func config(t *testing.T) (Config, *hsmtest.Token) {
	t.Helper()
	soft := hsmtest.New(t)
	return Config{Library: soft.Library, Label: soft.Label, PINFile: soft.PINFile, Key: "broker"}, soft
}

func open(t *testing.T, cfg Config) *Token {
	t.Helper()
	token, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	})
	return token
}

// keyed is a token with its first wrapping key.
func keyed(t *testing.T) (*Token, *hsmtest.Token) {
	t.Helper()
	cfg, soft := config(t)
	token := open(t, cfg)
	if label, err := token.Generate(); err != nil || label != "broker-1" {
		t.Fatal(label, err)
	}
	return token, soft
}

func TestASecretOpensUnderItsNameOnly(t *testing.T) {
	token, _ := keyed(t)
	secret := []byte("AGE-SECRET-KEY-CANARY")
	w, err := token.Wrap(secret, []byte("a"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := token.Unwrap(w, []byte("a")); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%q %v", got, err)
	}
	if _, err := token.Unwrap(w, []byte("b")); code(err) != CodeDamaged {
		t.Errorf("another name: %v", err)
	}
	for i := range w.Ciphertext {
		other := *w
		other.Ciphertext = bytes.Clone(w.Ciphertext)
		other.Ciphertext[i] ^= 1
		if _, err := token.Unwrap(&other, []byte("a")); code(err) != CodeDamaged {
			t.Errorf("byte %d flipped: %v", i, err)
		}
	}
	if _, err := token.Unwrap(&Wrapped{Key: "broker-7", Nonce: w.Nonce, Ciphertext: w.Ciphertext}, nil); code(err) != CodeKeyMissing {
		t.Errorf("another key: %v", err)
	}
	again, err := token.Wrap(secret, []byte("a"))
	if err != nil || bytes.Equal(again.Nonce, w.Nonce) || bytes.Contains(again.Ciphertext, secret) {
		t.Errorf("%+v %v", again, err)
	}
}

func TestAnOldKeyOpensWhatItWrappedAfterANewOneIsMade(t *testing.T) {
	token, _ := keyed(t)
	old, err := token.Wrap([]byte("s"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if label, err := token.Generate(); err != nil || label != "broker-2" {
		t.Fatal(label, err)
	}
	w, err := token.Wrap([]byte("s"), nil)
	if err != nil || w.Key != "broker-2" || old.Key != "broker-1" {
		t.Fatalf("%+v %v", w, err)
	}
	if _, err := token.Unwrap(old, nil); err != nil {
		t.Error(err)
	}
}

func TestTheKeyCannotBeReadFromTheToken(t *testing.T) {
	token, _ := keyed(t)
	_, err := call(token, func() (struct{}, error) {
		got, err := token.lib.GetAttributeValue(token.link.session, token.link.keys["broker-1"], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
		if err == nil {
			t.Errorf("the token gives %d bytes of the key", len(got[0].Value))
		}
		return struct{}{}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestATokenThatCannotBeUsedIsRefusedWithItsReason(t *testing.T) {
	cfg, soft := config(t)
	other := func(change func(*Config)) Config {
		c := cfg
		change(&c)
		return c
	}
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), name)
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, c := range map[string]struct {
		cfg  Config
		code string
	}{
		"no library":        {other(func(c *Config) { c.Library = "/none.so" }), CodeLibrary},
		"no such token":     {other(func(c *Config) { c.Label = "other" }), CodeMissing},
		"a wrong PIN":       {other(func(c *Config) { c.PINFile = file("pin", "9999", 0o600) }), CodePIN},
		"PIN for the group": {other(func(c *Config) { c.PINFile = file("pin", hsmtest.PIN, 0o640) }), CodePINFile},
		"PIN for all":       {other(func(c *Config) { c.PINFile = file("pin", hsmtest.PIN, 0o604) }), CodePINFile},
		"empty PIN file":    {other(func(c *Config) { c.PINFile = file("pin", "\n", 0o600) }), CodePINFile},
		"long PIN file":     {other(func(c *Config) { c.PINFile = file("pin", string(make([]byte, 300)), 0o600) }), CodePINFile},
		"no PIN file":       {other(func(c *Config) { c.PINFile = "/none" }), CodePINFile},
		"a folder":          {other(func(c *Config) { c.PINFile = t.TempDir() }), CodePINFile},
	} {
		token, err := Open(c.cfg)
		if err == nil {
			err = token.Close()
		}
		if code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
		if bytes.Contains([]byte(fmt.Sprintf("%+v", err)), []byte(hsmtest.PIN)) {
			t.Errorf("%s: the PIN is in the error", name)
		}
	}
	soft.AddToken(t, soft.Label)
	if _, err := Open(cfg); code(err) != CodeAmbiguous {
		t.Errorf("two tokens: %v", err)
	}
}

func TestAWrongPINIsTriedOnce(t *testing.T) {
	token, soft := keyed(t)
	token.drop()
	soft.WritePIN(t, "9999")
	if _, err := token.Newest(); code(err) != CodePIN {
		t.Fatal(err)
	}
	soft.WritePIN(t, hsmtest.PIN) // it would be right now, but nobody may guess on
	if _, err := token.Newest(); code(err) != CodePIN {
		t.Errorf("tried again: %v", err)
	}
}

func TestKeysThatCouldLeaveTheTokenAreRefused(t *testing.T) {
	for name, change := range map[string]*pkcs11.Attribute{
		"extractable":   pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		"not sensitive": pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false),
		"short":         pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 16),
		"public":        pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		"imported":      pkcs11.NewAttribute(pkcs11.CKA_VALUE, bytes.Repeat([]byte{1}, keyBytes)),
	} {
		t.Run(name, func(t *testing.T) {
			cfg, _ := config(t)
			token := open(t, cfg)
			plant(t, token, "broker-1", change)
			token.drop()
			if _, err := token.Newest(); code(err) != CodeExtractable {
				t.Error(err)
			}
		})
	}
	cfg, _ := config(t)
	token := open(t, cfg)
	plant(t, token, "broker-01", pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)) // not a name of ours
	token.drop()
	if _, err := token.Newest(); code(err) != CodeKeyMissing {
		t.Error(err)
	}
}

// plant makes a good key but for one attribute.
func plant(t *testing.T, token *Token, label string, change *pkcs11.Attribute) {
	t.Helper()
	template := map[uint]*pkcs11.Attribute{}
	for _, a := range []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, keyBytes), change,
	} {
		template[a.Type] = a
	}
	imported := change.Type == pkcs11.CKA_VALUE
	if imported {
		delete(template, pkcs11.CKA_VALUE_LEN)
		template[pkcs11.CKA_CLASS] = pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)
		template[pkcs11.CKA_KEY_TYPE] = pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES)
	}
	var list []*pkcs11.Attribute
	for _, a := range template {
		list = append(list, a)
	}
	_, err := call(token, func() (pkcs11.ObjectHandle, error) {
		session, err := token.lib.OpenSession(token.link.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return 0, err
		}
		if imported {
			return token.lib.CreateObject(session, list)
		}
		return token.lib.GenerateKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, list)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestALostLoginIsMadeAnew(t *testing.T) {
	token, _ := keyed(t)
	for name, lose := range map[string]func() error{
		"session": func() error { return token.lib.CloseAllSessions(token.link.slot) },
		"login":   func() error { return token.lib.Logout(token.link.session) },
		"library": token.lib.Finalize,
	} {
		if err := lose(); err != nil {
			t.Fatal(name, err)
		}
		w, err := token.Wrap([]byte("s"), nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := token.Unwrap(w, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestATokenThatComesBackIsFoundAgain(t *testing.T) {
	token, soft := keyed(t)
	w, err := token.Wrap([]byte("s"), nil)
	if err != nil {
		t.Fatal(err)
	}
	soft.Remove(t)
	for range 3 {
		if _, err := token.Unwrap(w, nil); code(err) != CodeMissing {
			t.Fatalf("without the token: %v", err)
		}
	}
	soft.Return(t)
	if got, err := token.Unwrap(w, nil); err != nil || string(got) != "s" {
		t.Errorf("%q %v", got, err)
	}
}

func TestATokenThatHangsHoldsOneThread(t *testing.T) {
	token, _ := keyed(t)
	token.timeout = 10 * time.Millisecond
	hung := make(chan struct{})
	calls := 0
	for range 5 {
		if _, err := call(token, func() (int, error) {
			calls++
			<-hung
			return 0, nil
		}); code(err) != CodeBusy {
			t.Fatal(err)
		}
	}
	close(hung)
	token.timeout = callTimeout
	if _, err := token.Newest(); err != nil || calls != 1 {
		t.Errorf("%d calls: %v", calls, err)
	}
}

func TestWhatTokensSayOfTheirPINIsExplained(t *testing.T) {
	for said, want := range map[uint]string{
		pkcs11.CKR_PIN_INCORRECT: CodePIN, pkcs11.CKR_PIN_LOCKED: CodeLocked, pkcs11.CKR_PIN_LEN_RANGE: CodePIN, pkcs11.CKR_PIN_EXPIRED: CodePIN,
	} {
		if err := loginRefused(pkcs11.Error(said)); code(err) != want {
			t.Errorf("%v: %v", pkcs11.Error(said), err)
		}
	}
	if err := loginRefused(pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED)); err != nil {
		t.Errorf("a token that left is a refused PIN: %v", err)
	}
}
