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
)

// libvirt's own test driver stands in for the hypervisor.
func TestRunAnswersStatusAndStopsGracefully(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "agent.toml")
	text := `host_id = "host-1"
run_dir = "` + dir + `/run"
[control]
servers = ["tls://control.example:4222"]
ca_file = "/none"
creds_file = "/none"
issuer_keys = ["AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]
[libvirt]
uri = "test:///default"
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var stdout, stderr bytes.Buffer
	done := make(chan int, 1)
	go func() {
		done <- execute(ctx, []string{"run", "--config", file, "--log-format", "json"}, &stdout, &stderr)
	}()
	socket := filepath.Join(dir, "run", "agent.sock")
	deadline := time.Now().Add(30 * time.Second)
	var doc string
	for {
		code, out, errOut := run(t, "status", "--socket", socket, "-o", "json")
		if code == exitOK {
			doc = out
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no status: exit %d, %s", code, errOut)
		}
	}
	matchesSchema(t, doc)
	if !strings.Contains(doc, `"host-1"`) || !strings.Contains(doc, "no control link") {
		t.Errorf("status is %s", doc)
	}
	cancel()
	if code := <-done; code != exitOK {
		t.Errorf("exit %d after a graceful stop: %s", code, stderr.String())
	}
	for line := range strings.Lines(stderr.String()) {
		if !json.Valid([]byte(line)) {
			t.Errorf("log line is no JSON: %s", line)
		}
	}
}
