package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/tests/keybroker/hsm/hsmtest"
)

func TestWrongInvocationsAreUsageErrors(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{},
		{"extra"},
		{"--nonsense"},
		{"--cert", "a", "--key", "b", "--state-dir", "c"},
		{"--cert", "a", "--key", "b", "--state-dir", "c", "--admin-token-file", "d", "--allow-product", "rome"},
		{"token"},
		{"token", "init"},
		{"token", "rewrap", "--token-library", "a"},
	} {
		root := newRoot()
		root.SetArgs(args)
		root.SetErr(&bytes.Buffer{})
		err := root.ExecuteContext(t.Context())
		if _, usage := errors.AsType[usageError](err); !usage {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestMissingFilesAndShortTokensStopTheBroker(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := options{listen: "127.0.0.1:0", cert: filepath.Join(dir, "none"), key: filepath.Join(dir, "none"), stateDir: dir, tokenFile: "x", logLevel: "info", logFormat: "text"}
	if err := run(context.Background(), &o); err == nil || !strings.Contains(err.Error(), "TLS certificate") {
		t.Error(err)
	}
	file := filepath.Join(dir, "root.pem")
	if err := os.WriteFile(file, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readManifests(filepath.Join(dir, "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := readManifests(dir, nil); err == nil || !strings.Contains(err.Error(), "--rim-dir") {
		t.Error(err)
	}
	if _, err := loadRoots([]string{file}); err == nil || !strings.Contains(err.Error(), "parsing emulated root") {
		t.Error(err)
	}
}

// The way of an operator: a store as it was before tokens is brought under a
// key, under the next one, and served.
func TestTheTokensKeysAreMadeChangedAndUsed(t *testing.T) {
	soft := hsmtest.New(t)
	state := t.TempDir()
	flags := []string{"--token-library", soft.Library, "--token", soft.Label, "--token-pin-file", soft.PINFile}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"token", "init"}, "wrapping key keybroker-1 made\n"},
		{[]string{"token", "init"}, "wrapping key keybroker-1 is there\n"},
		{[]string{"token", "migrate", "--state-dir", state}, "0 of 0 launches changed; all are wrapped by keybroker-1, and no older key is needed\n"},
		{[]string{"token", "rotate"}, "wrapping key keybroker-2 made\n"},
		{[]string{"token", "rewrap", "--state-dir", state}, "0 of 0 launches changed; all are wrapped by keybroker-2, and no older key is needed\n"},
	} {
		var out bytes.Buffer
		root := newRoot()
		root.SetArgs(append(c.args, flags...))
		root.SetOut(&out)
		if err := root.ExecuteContext(t.Context()); err != nil || out.String() != c.want {
			t.Errorf("%v: %q %v", c.args, out.String(), err)
		}
	}
}
