package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/nodeagent/store"
)

func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = execute(t.Context(), args, &out, &errOut)
	return code, out.String(), errOut.String()
}

// matchesSchema validates a document against the schema its kind publishes.
func matchesSchema(t *testing.T, doc string) {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(doc), &v); err != nil {
		t.Fatalf("%v in %s", err, doc)
	}
	kind, _ := v["kind"].(string)
	code, text, _ := run(t, "schema", kind)
	if code != exitOK {
		t.Fatalf("no schema for kind %q", kind)
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
	if err := schema.Validate(v); err != nil {
		t.Errorf("%s breaks its schema: %v\n%s", kind, err, doc)
	}
}

func TestMistakesEndInOneClearLineAndTheRightExitCode(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	config := filepath.Join(dir, "agent.toml")
	if err := os.WriteFile(config, []byte("host_id = \"h\"\ncolour = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(dir, "evidence.json")
	if err := os.WriteFile(bundle, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"unknown verb":        {[]string{"lunch"}, exitUsage, `unknown command "lunch"`},
		"unknown flag":        {[]string{"status", "--colour"}, exitUsage, "--colour"},
		"bad format":          {[]string{"version", "-o", "xml"}, exitUsage, "xml"},
		"surplus argument":    {[]string{"version", "x"}, exitUsage, "takes 0 argument"},
		"no agent's clock":    {[]string{"clock", "accept", "--socket", filepath.Join(dir, "none.sock")}, exitUnreachable, "is nodeagent running"},
		"no agent":            {[]string{"status", "--socket", filepath.Join(dir, "none.sock")}, exitUnreachable, "is nodeagent running"},
		"unknown config key":  {[]string{"run", "--config", config}, exitFailed, `agent.toml:2: unknown key "colour"`},
		"no config":           {[]string{"run", "--config", filepath.Join(dir, "none.toml")}, exitNotFound, "none.toml"},
		"bad log level":       {[]string{"run", "--config", config, "--log-level", "loud"}, exitUsage, "loud"},
		"measure nothing":     {[]string{"measure"}, exitUsage, "--firmware and --vcpus are required"},
		"measure no file":     {[]string{"measure", "--firmware", filepath.Join(dir, "none"), "--vcpus", "1"}, exitNotFound, "none"},
		"initrd alone":        {[]string{"measure", "--firmware", config, "--vcpus", "1", "--initrd", config}, exitUsage, "need --kernel"},
		"bad features":        {[]string{"measure", "--firmware", config, "--vcpus", "1", "--guest-features", "x"}, exitUsage, "not a number"},
		"not a firmware":      {[]string{"measure", "--firmware", config, "--vcpus", "1"}, exitFailed, "agent.toml"},
		"verify nothing":      {[]string{"verify", config}, exitUsage, "--expected-digest is required"},
		"verify a tag":        {[]string{"verify", bundle, "--expected-image", "r/app:1", "--expected-digest", strings.Repeat("a", 96), "--nonce", "aa"}, exitUsage, "not pinned"},
		"unknown schema kind": {[]string{"schema", "Nothing"}, exitNotFound, "LaunchDigest"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, _, stderr := run(t, c.args...)
			if code != c.code || !strings.Contains(stderr, c.want) {
				t.Errorf("exit %d, want %d; stderr %q, want it to contain %q", code, c.code, stderr, c.want)
			}
		})
	}
}

func TestVersionSaysWhetherTheBuildCanEmulate(t *testing.T) {
	t.Parallel()
	code, out, _ := run(t, "version", "-o", "json")
	if code != exitOK {
		t.Fatalf("exit %d", code)
	}
	matchesSchema(t, out)
	var v versionInfo
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Emulated != emulatedTag {
		t.Errorf("emulated is %v in a build where the tag is %v (%v)", v.Emulated, emulatedTag, err)
	}
}

func TestEvidenceThatIsNoneFailsEveryCheckWithExitCodeFive(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "evidence.json")
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{
		"verify", file, "--expected-image", "r.example/app@sha256:" + strings.Repeat("a", 64),
		"--expected-digest", strings.Repeat("0", 96), "--nonce", strings.Repeat("0", 32),
	}
	code, out, stderr := run(t, append(args, "-o", "json")...)
	if code != exitPrecondition || stderr != "" {
		t.Errorf("exit %d, stderr %q", code, stderr)
	}
	matchesSchema(t, out)
	_, table, _ := run(t, args...)
	if !strings.Contains(table, "✗") || !strings.Contains(table, "does NOT hold") {
		t.Errorf("table:\n%s", table)
	}
}

func TestHelpExplainsEveryMarkOfAVerdict(t *testing.T) {
	t.Parallel()
	code, help, _ := run(t, "verify", "--help")
	for _, mark := range []string{"✓", "✗", "-", "!"} {
		if code != exitOK || !strings.Contains(help, "\n  "+mark+"  ") {
			t.Errorf("exit %d, no line for %q in\n%s", code, mark, help)
		}
	}
}

func TestStatusTableTellsLinkEpochAndGuests(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	s := admin.Status{
		Header: output.NewHeader("Status"), HostID: "host-1", Version: "v1", TEE: "sev-snp", StartedAt: now.Add(-time.Hour),
		Control:    admin.Control{Connected: true, State: "connected", Server: "tls://c:1", LastRoundTrip: now.Add(-3 * time.Second)},
		Clock:      admin.Clock{Now: now, Reason: "it jumped (clock.jumped)"},
		Hypervisor: "QEMU 10.1", Warnings: []string{"low on disk"}, Shortages: []string{"host.disk-full: full"}, IssuerEpoch: 0,
		Guests: []admin.Guest{{ID: "g-1", Status: "running", Step: "domain", Since: now.Add(-time.Minute), VCPUs: 2, MemoryMiB: 1024, Relayed: 2, Ports: []admin.Port{{Guest: 8000, Host: 20000}, {Guest: 8001, Host: 443, Name: "job.guests.example"}}}},
		Relay:  admin.Relay{Open: 2, Routed: 7, Refused: map[relay.Reason]uint64{relay.UnknownName: 5, relay.Slow: 1}},
	}
	var out bytes.Buffer
	if err := printStatus(&out, s, now); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"last confirmed round trip 3s ago", "none yet", "low on disk", "closed: the host", "host.disk-full: full", "g-1", "1m0s", "domain", "20000->8000", "job.guests.example:443->8001", "2 connections open, 7 routed, 1 refused (slow), 5 refused (unknown-name)", "connected to tls://c:1 (connected)", "NOT TRUSTED, nothing is launched: it jumped"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	matchesSchema(t, string(raw))
}

func TestExitCodesTellKindsOfFailureApart(t *testing.T) {
	t.Parallel()
	for want, err := range map[int]error{
		exitFailed:       errors.New("x"),
		exitUsage:        usageError("x"),
		exitUnreachable:  fmt.Errorf("asking: %w", admin.ErrUnreachable),
		exitNotFound:     fmt.Errorf("reading: %w", os.ErrNotExist),
		exitPrecondition: fmt.Errorf("starting: %w", contract.Refuse("config.no-qemu-user", "r", "m")),
		exitConflict:     fmt.Errorf("opening: %w", contract.Refuse(store.CodeInUse, "r", "m")),
		exitTimeout:      fmt.Errorf("asking: %w", context.DeadlineExceeded),
	} {
		if got := exitCode(err); got != want {
			t.Errorf("%v ends with %d, want %d", err, got, want)
		}
	}
}

func TestCompletionIsThere(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, out, _ := run(t, "completion", shell); code != exitOK || !strings.Contains(out, "nodeagent") {
			t.Errorf("%s: exit %d", shell, code)
		}
	}
}
