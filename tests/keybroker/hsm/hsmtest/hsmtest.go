// Package hsmtest makes PKCS#11 tokens for tests: real SoftHSM 2 in a folder of
// its own. It sets SOFTHSM2_CONF, so tests that use it cannot be parallel.
package hsmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/confidential-node/agent/tests/skip"
)

// PIN is every token's, and part of no other text.
const PIN = "canary-pin-8317"

// Token is a token in a folder.
type Token struct {
	Library, Label, PINFile string
	folder                  string
}

// New makes a token, or skips the test where SoftHSM is missing.
func New(t *testing.T) *Token {
	t.Helper()
	library := ""
	for _, path := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"} {
		if _, err := os.Stat(path); err == nil {
			library = path
		}
	}
	if _, err := exec.LookPath("softhsm2-util"); err != nil || library == "" {
		skip.Missing(t, "SoftHSM 2 (package softhsm2)")
	}
	dir := t.TempDir()
	s := &Token{Library: library, Label: "keys", PINFile: filepath.Join(dir, "pin"), folder: filepath.Join(dir, "tokens")}
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.Mkdir(s.folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+s.folder+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	s.WritePIN(t, PIN)
	s.AddToken(t, s.Label)
	return s
}

// AddToken initialises one more token.
func (s *Token) AddToken(t *testing.T, label string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", PIN, "--pin", PIN).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// WritePIN changes what is in the PIN file.
func (s *Token) WritePIN(t *testing.T, pin string) {
	t.Helper()
	if err := os.WriteFile(s.PINFile, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Remove takes the token away.
func (s *Token) Remove(t *testing.T) {
	t.Helper()
	s.move(t, s.folder, s.folder+".away")
}

// Return brings the token back.
func (s *Token) Return(t *testing.T) {
	t.Helper()
	s.move(t, s.folder+".away", s.folder)
}

func (s *Token) move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
	if to != s.folder {
		if err := os.Mkdir(s.folder, 0o700); err != nil { // the reader, without the card
			t.Fatal(err)
		}
	}
}
