package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/tests/controlplane"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// call runs one command line against a folder.
func call(t *testing.T, dir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = execute(t.Context(), append([]string{"--dir", dir}, args...), strings.NewReader(`{"guestId":"x"}`), &out, &errs)
	return code, out.String(), errs.String()
}

// serve runs the serve verb until the test's end.
func serve(t *testing.T, dir string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan int, 1)
	var errs bytes.Buffer
	go func() {
		done <- execute(ctx, []string{"--dir", dir, "serve", "--listen-nats", "127.0.0.1:0", "--listen-http", "127.0.0.1:0"}, nil, &errs, &errs)
	}()
	t.Cleanup(func() {
		cancel()
		if code := <-done; code != exitOK {
			t.Errorf("serve ended with %d: %s", code, errs.String())
		}
	})
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		if _, err := os.Stat(filepath.Join(dir, controlplane.URLFile)); err == nil {
			return
		}
		select {
		case code := <-done:
			t.Fatalf("serve ended with %d: %s", code, errs.String())
		case <-deadline.C:
			t.Fatal("serve never came up")
		case <-look.C:
		}
	}
}

func TestTheToolDrivesAServedControlPlane(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	serve(t, dir)
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	out, err := filepath.Rel(here, filepath.Join(t.TempDir(), "enrolment"))
	if err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := call(t, dir, "enrol", "node-a", "--out", out)
	if code != exitOK || !strings.Contains(stdout, "issuer_keys") || strings.Contains(stdout, "SEED") {
		t.Fatalf("enrol: %d %s %s", code, stdout, stderr)
	}
	file := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(file, []byte(stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	if cfg, err := config.Load(file); err != nil || cfg.HostID != "node-a" {
		t.Errorf("what enrol prints is no configuration: %v\n%s", err, stdout)
	}
	info, err := os.Stat(filepath.Join(out, "node-a.creds"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("credentials: %v, %v", info, err)
	}
	code, stdout, _ = call(t, dir, "nodes", "-o", "json")
	var list nodeList
	if err := json.Unmarshal([]byte(stdout), &list); code != exitOK || err != nil || len(list.Nodes) != 1 || list.Nodes[0].ID != "node-a" {
		t.Errorf("nodes: %d %s %v", code, stdout, err)
	}
	launch := filepath.Join(t.TempDir(), "launch.json")
	if err := os.WriteFile(launch, []byte(`{}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"nodes", []string{"nodes"}, exitOK, "node-a"},
		{"events", []string{"events"}, exitOK, "KIND"},
		{"launch without node ready", []string{"launch", "-f", launch, "--node", "node-a"}, exitPrecondition, "control.node-not-ready"},
		{"launch of nobody's image", []string{"launch", "-f", launch}, exitPrecondition, "control.no-node"},
		{"launch without file", []string{"launch"}, exitUsage, "--file"},
		{"launch of a missing file", []string{"launch", "-f", launch + "x"}, exitNotFound, "no such file"},
		{"launch of nonsense", []string{"launch", "-f", filepath.Join(dir, controlplane.TokenFile)}, exitUsage, "LaunchGuest"},
		{"launch from standard input", []string{"launch", "-f", "-", "--node", "node-a"}, exitPrecondition, "control.node-not-ready"},
		{"cordon nobody", []string{"cordon", "node-z"}, exitNotFound, "control.node-not-found"},
		{"uncordon unready", []string{"uncordon", "node-a"}, exitPrecondition, "remedy"},
		{"guest nobody", []string{"guest", "x"}, exitNotFound, "control.guest-unknown"},
		{"stop nobody", []string{"stop", "x"}, exitNotFound, "control.guest-unknown"},
		{"evidence of nobody", []string{"evidence", "x", "--nonce", strings.Repeat("00", 16)}, exitNotFound, "control.guest-unknown"},
		{"evidence without nonce", []string{"evidence", "x"}, exitUsage, "--nonce"},
		{"stop whom", []string{"stop"}, exitUsage, "GUEST"},
		{"unknown flag", []string{"nodes", "--colour"}, exitUsage, "colour"},
		{"unknown verb", []string{"dance"}, exitUsage, "dance"},
		{"unknown format", []string{"nodes", "-o", "xml"}, exitUsage, "xml"},
		{"serve with a strange level", []string{"serve", "--log-level", "loud"}, exitUsage, "log-level"},
	} {
		code, stdout, stderr := call(t, dir, c.args...)
		if code != c.code || !strings.Contains(stdout+stderr, c.says) {
			t.Errorf("%s: %d %s%s, want %d saying %q", c.name, code, stdout, stderr, c.code, c.says)
		}
	}
}

func TestEveryDocumentSaysWhatItIs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	serve(t, dir)
	for kind, args := range map[string][]string{
		"Enrolment": {"enrol", "node-a", "--out", t.TempDir()},
		"NodeList":  {"nodes"},
		"EventList": {"events"},
	} {
		code, stdout, stderr := call(t, dir, append(args, "-o", "json")...)
		if code != exitOK {
			t.Errorf("%v: %d %s", args, code, stderr)
		}
		identified(t, stdout, kind)
	}
	for kind, printed := range map[string]func(*app, *cobra.Command) error{
		"Guest": func(a *app, cmd *cobra.Command) error { return a.printGuest(cmd, &client.Guest{GuestID: "x"}) },
		"Sent":  func(a *app, cmd *cobra.Command) error { return a.sent(cmd, &client.Sent{GuestID: "x"}) },
	} {
		var out bytes.Buffer
		cmd := &cobra.Command{}
		cmd.SetOut(&out)
		if err := printed(&app{format: "json"}, cmd); err != nil {
			t.Error(err)
		}
		identified(t, out.String(), kind)
		if !strings.Contains(out.String(), `"guest_id": "x"`) {
			t.Errorf("%s does not carry its fields: %s", kind, out.String())
		}
	}
}

// identified checks the header of a document.
func identified(t *testing.T, document, kind string) {
	t.Helper()
	var got output.Header
	if err := json.Unmarshal([]byte(document), &got); err != nil || got != header(kind) || got.APIVersion == "" {
		t.Errorf("%v: %s, want kind %s", err, document, kind)
	}
}

func TestWithoutAControlPlaneTheToolSaysSo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if code, _, stderr := call(t, dir, "nodes"); code != exitNotFound || !strings.Contains(stderr, "--dir") {
		t.Errorf("no folder: %d %s", code, stderr)
	}
	other := t.TempDir()
	serve(t, other)
	for _, name := range []string{controlplane.TokenFile, controlplane.CAFile} {
		data, err := os.ReadFile(filepath.Join(other, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if code, _, stderr := call(t, dir, "--url", "https://127.0.0.1:1", "nodes"); code != exitUnreachable {
		t.Errorf("nobody there: %d %s", code, stderr)
	}
}
