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

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
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
		{"resolve", []string{"resolve", "node-a"}, exitOK, ""},
		{"resolve nobody", []string{"resolve", "node-z"}, exitNotFound, "control.node-not-found"},
		{"revoke", []string{"revoke", "node-a"}, exitOK, ""},
		{"revoke nobody", []string{"revoke", "node-z"}, exitNotFound, "control.node-not-found"},
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
		matchesSchema(t, stdout)
	}
	refusal := &contract.Refusal{Code: "a.b", Message: "why", Remedy: "do"}
	proto := json.RawMessage(`{}`)
	seen := time.Now()
	for kind, printed := range map[string]func(*app, *cobra.Command) error{
		"Guest": func(a *app, cmd *cobra.Command) error {
			return a.printGuest(cmd, &client.Guest{GuestID: "x", Outcome: client.OutcomeRefused, Refusal: refusal, State: proto, Results: []json.RawMessage{proto}})
		},
		"Sent": func(a *app, cmd *cobra.Command) error { return a.sent(cmd, &client.Sent{GuestID: "x"}) },
		"NodeList": func(a *app, cmd *cobra.Command) error {
			return a.printNodes(cmd, []client.Node{{
				ID: "x", LastSeen: &seen, StoreID: "00", Capability: proto,
				Alarms: []client.Alarm{{Code: "a.b", Message: "why", Remedy: "do", Since: seen}}, Warnings: []contract.Refusal{*refusal},
			}})
		},
		"EventList": func(a *app, cmd *cobra.Command) error {
			return a.printEvents(cmd, []client.Event{{Seq: 1, Kind: "heartbeat", Event: proto}}, true)
		},
	} {
		var out bytes.Buffer
		cmd := &cobra.Command{}
		cmd.SetOut(&out)
		if err := printed(&app{format: "json"}, cmd); err != nil {
			t.Error(err)
		}
		identified(t, out.String(), kind)
		matchesSchema(t, out.String())
	}
}

// matchesSchema validates a document against the schema its kind publishes,
// and that this says of every field what it is.
func matchesSchema(t *testing.T, document string) {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal([]byte(document), &doc); err != nil {
		t.Fatalf("%v in %s", err, document)
	}
	kind, _ := doc["kind"].(string)
	code, text, stderr := call(t, t.TempDir(), "schema", kind)
	if code != exitOK {
		t.Fatalf("no schema of kind %q: %s", kind, stderr)
	}
	parsed, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource(kind+".json", parsed); err != nil {
		t.Fatal(err)
	}
	schema, err := compiler.Compile(kind + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(doc); err != nil {
		t.Errorf("%s breaks its schema: %v\n%s", kind, err, document)
	}
	described(t, kind, parsed, doc)
}

// described fails for a field that the schema does not know.
func described(t *testing.T, path string, schema, doc any) {
	t.Helper()
	s, _ := schema.(map[string]any)
	properties, closed := s["properties"].(map[string]any)
	switch d := doc.(type) {
	case map[string]any:
		for name, value := range d {
			if closed && properties[name] == nil {
				t.Errorf("%s.%s is not in the schema", path, name)
			}
			described(t, path+"."+name, properties[name], value)
		}
	case []any:
		for _, value := range d {
			described(t, path+"[]", s["items"], value)
		}
	}
}

func TestASchemaIsListedAndAnUnknownOneRefused(t *testing.T) {
	t.Parallel()
	if code, out, _ := call(t, t.TempDir(), "schema"); code != exitOK || out != "Enrolment\nEventList\nGuest\nNodeList\nSent\n" {
		t.Errorf("%d %q", code, out)
	}
	if code, _, stderr := call(t, t.TempDir(), "schema", "Nothing"); code != exitNotFound || !strings.Contains(stderr, "NodeList") {
		t.Errorf("%d %q", code, stderr)
	}
	if code, _, _ := call(t, t.TempDir(), "schema", "a", "b"); code != exitUsage {
		t.Errorf("exit %d", code)
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
