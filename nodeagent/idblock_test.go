package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/tests/skip"
)

// signer holds what `measure --id-block` needs: a real firmware, and keys.
type signer struct {
	args            []string // of measure, without flags of the ID block
	idFile, auFile  string
	idKey, auKey    *ecdsa.PrivateKey
	digestID, digAu string
}

func newSigner(t *testing.T) *signer {
	t.Helper()
	firmware := filepath.Join("..", "..", "shared", "data", "firmware", "OVMF.amdsev.fd")
	if _, err := os.Stat(firmware); err != nil {
		skip.Missing(t, "a real AmdSev OVMF in ../shared/data")
	}
	s := &signer{args: []string{"measure", "--firmware", firmware, "--vcpus", "2"}}
	s.idFile, s.idKey, s.digestID = newKeyFile(t)
	s.auFile, s.auKey, s.digAu = newKeyFile(t)
	return s
}

func newKeyFile(t *testing.T) (file string, key *ecdsa.PrivateKey, digest string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	sum, err := idblock.KeyDigest(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return file, key, hex.EncodeToString(sum[:])
}

func TestMeasureSignsAnIDBlockForTheDigestItPrints(t *testing.T) {
	t.Parallel()
	s := newSigner(t)
	args := append(s.args, "--id-block", "--id-key", s.idFile, "--author-key", s.auFile,
		"--family-id", strings.Repeat("ab", 16), "--image-id", strings.Repeat("cd", 16), "--guest-svn", "7", "--policy", "0x20000")
	code, out, stderr := run(t, append(args, "-o", "json")...)
	if code != exitOK {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	matchesSchema(t, out)
	var doc launchDigest
	if err := json.Unmarshal([]byte(out), &doc); err != nil || doc.IDBlock == nil {
		t.Fatalf("%v in %s", err, out)
	}
	block, errBlock := base64.StdEncoding.DecodeString(doc.IDBlock.Block)
	auth, errAuth := base64.StdEncoding.DecodeString(doc.IDBlock.Auth)
	pair, err := idblock.Verify(block, auth)
	if errBlock != nil || errAuth != nil || err != nil {
		t.Fatalf("%v, %v, %v", errBlock, errAuth, err)
	}
	if b := pair.Block; hex.EncodeToString(b.LaunchDigest[:]) != doc.LaunchDigest || b.GuestSVN != 7 || b.Policy != 0x20000 ||
		!bytes.Equal(b.FamilyID[:], bytes.Repeat([]byte{0xab}, 16)) || !bytes.Equal(b.ImageID[:], bytes.Repeat([]byte{0xcd}, 16)) {
		t.Errorf("the block is %+v", b)
	}
	if doc.IDBlock.IDKeyDigest != s.digestID || doc.IDBlock.AuthorKeyDigest != s.digAu {
		t.Errorf("key digests are %s and %s", doc.IDBlock.IDKeyDigest, doc.IDBlock.AuthorKeyDigest)
	}
	_, table, _ := run(t, args...)
	want := doc.LaunchDigest + "\nid-block " + doc.IDBlock.Block + "\nid-auth " + doc.IDBlock.Auth + "\nid-key-digest " + s.digestID + "\nauthor-key-digest " + s.digAu + "\n"
	if table != want {
		t.Errorf("the table is\n%s\nwant\n%s", table, want)
	}
	_, alone, _ := run(t, append(s.args, "--id-block", "--id-key", s.idFile, "-o", "json")...)
	matchesSchema(t, alone)
	if strings.Contains(alone, "author_key_digest") || !strings.Contains(alone, `"policy": "0x30000"`) {
		t.Errorf("without author key and policy: %s", alone)
	}
}

func TestKeysOthersCanReadAreNotUsed(t *testing.T) {
	t.Parallel()
	s := newSigner(t)
	secret, err := os.ReadFile(s.idFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o644, 0o700, 0o660} {
		if err := os.Chmod(s.auFile, mode); err != nil {
			t.Fatal(err)
		}
		code, out, stderr := run(t, append(s.args, "--id-block", "--id-key", s.idFile, "--author-key", s.auFile)...)
		if code != exitPrecondition || out != "" || !strings.Contains(stderr, "chmod 0600") {
			t.Errorf("mode %o: exit %d, %q, %q", mode, code, out, stderr)
		}
	}
	broken := filepath.Join(t.TempDir(), "broken.pem")
	if err := os.WriteFile(broken, secret[:len(secret)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := run(t, append(s.args, "--id-block", "--id-key", broken)...)
	if code != exitFailed || !strings.Contains(stderr, "broken.pem") || strings.Contains(stderr, string(secret[40:60])) {
		t.Errorf("a torn key: exit %d, %q", code, stderr)
	}
	if code, _, _ := run(t, append(s.args, "--id-block", "--id-key", filepath.Dir(broken))...); code != exitPrecondition {
		t.Errorf("a folder as key: exit %d", code)
	}
	if code, _, _ := run(t, append(s.args, "--id-block", "--id-key", broken+"x")...); code != exitNotFound {
		t.Errorf("no key: exit %d", code)
	}
}

func TestMistakesInTheFlagsOfAnIDBlockAreNamed(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"needs --id-key":                          {"--id-block"},
		"--author-key means nothing":              {"--author-key", "x"},
		"--guest-svn means nothing":               {"--guest-svn", "1"},
		"--policy means nothing":                  {"--policy", "0x30000"},
		`--policy "x" is not a number`:            {"--id-block", "--id-key", "x", "--policy", "x"},
		"--policy 0x10000: no node takes it":      {"--id-block", "--id-key", "x", "--policy", "0x10000"},
		"--policy 0xb0000: no node takes it":      {"--id-block", "--id-key", "x", "--policy", "0xb0000"},
		`--family-id "abc" is not 32 hex digits`:  {"--id-block", "--id-key", "x", "--family-id", "abc"},
		`--image-id "abcd" is not 32 hex digits`:  {"--id-block", "--id-key", "x", "--image-id", "abcd"},
		`invalid argument "-1" for "--guest-svn"`: {"--id-block", "--id-key", "x", "--guest-svn", "-1"},
	} {
		code, _, stderr := run(t, append([]string{"measure", "--firmware", "none", "--vcpus", "1"}, args...)...)
		if code != exitUsage || !strings.Contains(stderr, want) {
			t.Errorf("%v: exit %d, %q, want %q", args, code, stderr, want)
		}
	}
}
