package keybroker

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/hsm"
	"github.com/confidential-node/agent/tests/keybroker/hsm/hsmtest"
)

// PKCS#11 state belongs to the process: these tests are not parallel.

// withToken opens a fresh token with its first wrapping key.
func withToken(t *testing.T) (*hsm.Token, *hsmtest.Token) {
	t.Helper()
	soft := hsmtest.New(t)
	token, err := hsm.Open(hsm.Config{Library: soft.Library, Label: soft.Label, PINFile: soft.PINFile, Key: "broker"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := token.Generate(); err != nil {
		t.Fatal(err)
	}
	return token, soft
}

// onDisk reports whether any file of the state folder holds the text.
func (w *world) onDisk(text string) bool {
	w.t.Helper()
	found := false
	err := filepath.WalkDir(w.cfg.StateDir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		found = found || bytes.Contains(data, []byte(text))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return found
}

func secretOnDisk() string {
	text, err := json.Marshal([]byte(secret))
	if err != nil {
		panic(err)
	}
	return strings.Trim(string(text), `"`)
}

// fetch attests a new guest and asks for the secret.
func (w *world) fetch() (string, string) {
	w.t.Helper()
	g := w.guest()
	_, status, refused := g.attest(g.attestBody(g.auth()))
	if status != http.StatusOK {
		return "", refused.Code
	}
	value, _, refused := g.resource(secretName, "")
	return value, refused.Code
}

func TestResourcesAreWrappedOnDiskAndOpenForAnAttestedGuest(t *testing.T) {
	token, _ := withToken(t)
	w := newWorld(t, func(c *Config) { c.Token = token })
	if w.onDisk(secretOnDisk()) {
		t.Error("a resource is readable in the state folder")
	}
	w.start()
	if value, code := w.fetch(); value != secret {
		t.Errorf("%q %s", value, code)
	}
	s, err := w.admin.Launch(t.Context(), launchID)
	if err != nil || len(s.Resources) != 1 || s.Resources[0] != secretName {
		t.Errorf("%+v %v", s, err)
	}
	r, err := contract.ParseResource("kbs:///" + secretName)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.admin.PutResource(t.Context(), launchID, contract.Resource{Repository: "a", Type: "b", Tag: "c"}, []byte("more")); err != nil {
		t.Fatal(err)
	}
	if err := w.admin.DeleteResource(t.Context(), launchID, r); err != nil {
		t.Fatal(err)
	}
	if s, err = w.admin.Launch(t.Context(), launchID); err != nil || len(s.Resources) != 1 || s.Resources[0] != "a/b/c" {
		t.Errorf("%+v %v", s, err)
	}
	if bytes.Contains(w.log.Bytes(), []byte(hsmtest.PIN)) || bytes.Contains(w.log.Bytes(), []byte(secret)) {
		t.Error("PIN or secret is in the log")
	}
}

func TestATokenThatIsAwayCostsNoRelease(t *testing.T) {
	token, soft := withToken(t)
	w := newWorld(t, func(c *Config) { c.Token = token })
	soft.Remove(t)
	g := w.guest()
	if _, status, refused := g.attest(g.attestBody(g.auth())); status != http.StatusServiceUnavailable || refused.Code != hsm.CodeMissing {
		t.Fatalf("%d %+v", status, refused)
	}
	err := w.admin.PutResource(t.Context(), launchID, contract.Resource{Repository: "a", Type: "b", Tag: "c"}, []byte("x"))
	if contract.AsRefusal(err).Code != hsm.CodeMissing {
		t.Errorf("registered without the token: %v", err)
	}
	s, err := w.admin.Launch(t.Context(), launchID)
	if err != nil || len(s.Releases) != 0 || s.RefusalCount != 1 {
		t.Fatalf("%+v %v", s, err)
	}
	soft.Return(t)
	if value, code := w.fetch(); value != secret {
		t.Errorf("%q %s", value, code)
	}
	if s, err = w.admin.Launch(t.Context(), launchID); err != nil || len(s.Releases) != 1 {
		t.Errorf("%+v %v", s, err)
	}
}

// A record's resource opens under its own name and launch only.
func TestWrappedResourcesCannotBeSwapped(t *testing.T) {
	token, _ := withToken(t)
	w := newWorld(t, func(c *Config) { c.Token = token })
	w.launch.Resources = map[string][]byte{secretName: []byte(secret), "job/age/other": []byte("other")}
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	w.stop()
	path := filepath.Join(w.cfg.StateDir, "launches", launchID+".json")
	r, err := readRecord(path, launchID)
	if err != nil {
		t.Fatal(err)
	}
	r.Wrapped[secretName], r.Wrapped["job/age/other"] = r.Wrapped["job/age/other"], r.Wrapped[secretName]
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	w.start()
	if value, code := w.fetch(); value != "" || code != hsm.CodeDamaged {
		t.Errorf("%q %s", value, code)
	}
}

func TestAPlainStoreIsMigratedOnceAndKeepsItsCounts(t *testing.T) {
	token, _ := withToken(t)
	w := newWorld(t, nil)
	if value, code := w.fetch(); value != secret {
		t.Fatalf("%q %s", value, code)
	}
	if !w.onDisk(secretOnDisk()) {
		t.Fatal("the test looks for the wrong text")
	}
	if _, err := Rewrap(w.cfg.StateDir, token); contract.AsRefusal(err).Code != "broker.state-in-use" {
		t.Fatalf("migrated under a running broker: %v", err)
	}
	w.stop()
	plain := w.cfg
	w.cfg.Token = token
	if _, err := New(w.cfg); contract.AsRefusal(err).Code != "broker.store-not-migrated" {
		t.Errorf("opened with a token: %v", err)
	}
	// What an interrupted write of the old store left goes too.
	if err := os.WriteFile(filepath.Join(w.cfg.StateDir, "launches", "."+launchID+".json123"), []byte(secretOnDisk()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, changed := range []int{1, 0} {
		if done, err := Rewrap(w.cfg.StateDir, token); err != nil || done != (Rewrapped{"broker-1", 1, changed}) {
			t.Fatalf("%+v %v", done, err)
		}
	}
	if w.onDisk(secretOnDisk()) {
		t.Error("a resource is still readable in the state folder")
	}
	if _, err := New(plain); contract.AsRefusal(err).Code != "broker.token-required" {
		t.Errorf("opened without the token: %v", err)
	}
	w.start()
	if _, code := w.fetch(); code != "broker.release-exhausted" {
		t.Errorf("the release before the migration is forgotten: %s", code)
	}
	w.launch.Releases = 2
	w.launch.Resources = map[string][]byte{secretName: []byte(secret)}
	if err := w.admin.PutLaunch(t.Context(), launchID, &w.launch); err != nil {
		t.Fatal(err)
	}
	if value, code := w.fetch(); value != secret {
		t.Errorf("%q %s", value, code)
	}
}

// A migration that ends at any launch leaves a store that the next one ends.
func TestARewrapGoesOnWhereItEnded(t *testing.T) {
	token, _ := withToken(t)
	w := newWorld(t, func(c *Config) { c.Token = token })
	second := strings.Repeat("f", 32)
	m := *w.manifest
	m.LaunchID = second
	other := w.launch
	other.Manifest, other.Resources = encode(t, &m), map[string][]byte{secretName: []byte("second")}
	if err := w.admin.PutLaunch(t.Context(), second, &other); err != nil {
		t.Fatal(err)
	}
	w.stop()
	if label, err := token.Generate(); err != nil || label != "broker-2" {
		t.Fatal(label, err)
	}
	// The second launch does not open yet.
	path := filepath.Join(w.cfg.StateDir, "launches", second+".json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(good, []byte(`"ciphertext":"`), []byte(`"ciphertext":"AAAA`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Rewrap(w.cfg.StateDir, token); contract.AsRefusal(err).Code != hsm.CodeDamaged {
		t.Fatalf("damaged: %v", err)
	}
	keys := func() (first, other string) {
		for id, key := range map[string]*string{launchID: &first, second: &other} {
			r, err := readRecord(filepath.Join(w.cfg.StateDir, "launches", id+".json"), id)
			if err != nil {
				t.Fatal(err)
			}
			*key = r.Wrapped[secretName].Key
		}
		return first, other
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if a, b := keys(); a != "broker-2" || b != "broker-1" {
		t.Errorf("half way: %s %s", a, b)
	}
	w.start() // with both keys, the half-way store serves
	if value, code := w.fetch(); value != secret {
		t.Errorf("%q %s", value, code)
	}
	w.stop()
	if done, err := Rewrap(w.cfg.StateDir, token); err != nil || done != (Rewrapped{"broker-2", 2, 1}) {
		t.Errorf("%+v %v", done, err)
	}
	if a, b := keys(); a != "broker-2" || b != "broker-2" {
		t.Errorf("in the end: %s %s", a, b)
	}
}

func TestABrokerWithoutAWrappingKeyDoesNotStart(t *testing.T) {
	soft := hsmtest.New(t)
	token, err := hsm.Open(hsm.Config{Library: soft.Library, Label: soft.Label, PINFile: soft.PINFile, Key: "broker"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = New(Config{StateDir: t.TempDir(), AdminToken: adminToken, Token: token})
	if contract.AsRefusal(err).Code != hsm.CodeKeyMissing {
		t.Error(err)
	}
	if err := token.Close(); err != nil {
		t.Error(err)
	}
}

func TestTwoBrokersDoNotShareAStateFolder(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	if _, err := New(w.cfg); contract.AsRefusal(err).Code != "broker.state-in-use" {
		t.Error(err)
	}
}
