package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWrongInvocationsAreUsageErrors(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{},
		{"extra"},
		{"--nonsense"},
		{"--cert", "a", "--key", "b", "--state-dir", "c"},
		{"--cert", "a", "--key", "b", "--state-dir", "c", "--admin-token-file", "d", "--allow-product", "rome"},
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
	if _, err := loadRoots([]string{file}); err == nil || !strings.Contains(err.Error(), "parsing emulated root") {
		t.Error(err)
	}
}
