package control

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// userCreds returns a credentials file and its seed.
func userCreds(t *testing.T, expires time.Time) (file, seed []byte) {
	t.Helper()
	account, err := nkeys.CreateAccount()
	if err != nil {
		t.Fatal(err)
	}
	user, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := user.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	if seed, err = user.Seed(); err != nil {
		t.Fatal(err)
	}
	claims := jwt.NewUserClaims(pub)
	if !expires.IsZero() {
		claims.Expires = expires.Unix()
	}
	token, err := claims.Encode(account)
	if err != nil {
		t.Fatal(err)
	}
	if file, err = jwt.FormatUserConfig(token, seed); err != nil {
		t.Fatal(err)
	}
	return file, seed
}

func write(t *testing.T, data []byte, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "node.creds")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCredentialsOthersMayReadAreRefused(t *testing.T) {
	t.Parallel()
	good, _ := userCreds(t, time.Time{})
	for _, mode := range []os.FileMode{0o600, 0o400} {
		if _, err := readCreds(write(t, good, mode)); err != nil {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
	for _, mode := range []os.FileMode{0o644, 0o640, 0o604, 0o660, 0o601} {
		path := write(t, good, mode)
		_, err := readCreds(path)
		p, ok := errors.AsType[*LinkError](err)
		if !ok || p.State != StateCredentials || !strings.Contains(err.Error(), path) || !strings.Contains(p.Remedy, "chmod 0600") {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
}

func TestCredentialsThatCannotBeUsedAreNamedWithoutTheirSeed(t *testing.T) {
	t.Parallel()
	good, seed := userCreds(t, time.Time{})
	_, otherSeed := userCreds(t, time.Time{})
	for name, data := range map[string][]byte{
		"empty":        nil,
		"no JWT":       []byte(string(good)[strings.Index(string(good), "-----BEGIN USER NKEY"):]),
		"no seed":      good[:strings.Index(string(good), "-----BEGIN USER NKEY")],
		"broken JWT":   []byte(strings.Replace(string(good), "eyJ", "eyK", 1)),
		"broken seed":  []byte(strings.Replace(string(good), string(seed), string(seed[:30])+"AAAA"+string(seed[34:]), 1)),
		"another seed": []byte(strings.Replace(string(good), string(seed), string(otherSeed), 1)),
	} {
		path := write(t, data, 0o600)
		_, err := readCreds(path)
		if err == nil || stateOf(err) != StateCredentials || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if strings.Contains(err.Error(), string(seed[2:20])) || strings.Contains(err.Error(), string(otherSeed[2:20])) {
			t.Errorf("%s: the seed is in %v", name, err)
		}
	}
	for name, path := range map[string]string{"a folder": t.TempDir(), "nothing": filepath.Join(t.TempDir(), "x")} {
		if _, err := readCreds(path); stateOf(err) != StateCredentials {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTheEndOfAnIdentityIsKnown(t *testing.T) {
	t.Parallel()
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	file, _ := userCreds(t, end)
	c, err := readCreds(write(t, file, 0o600))
	if err != nil || !c.expires.Equal(end) {
		t.Errorf("%v, %v, want %v", c, err, end)
	}
}

func TestACAFileWithoutCertificateIsNamed(t *testing.T) {
	t.Parallel()
	for _, path := range []string{write(t, []byte("hello"), 0o644), filepath.Join(t.TempDir(), "x"), write(t, make([]byte, maxCredsBytes+1), 0o644)} {
		_, err := readCA(path)
		if stateOf(err) != StateCredentials || !strings.Contains(err.Error(), path) {
			t.Errorf("%v", err)
		}
	}
}
