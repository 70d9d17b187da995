package e2e_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/confidential-node/agent/tests/rig/rigtest"
	"github.com/confidential-node/agent/tests/trial"
)

// The agent as systemd runs it: told when it is ready and when it ends, logs
// for machines, and a configuration that is read strictly.
func TestTheAgentIsAGoodService(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	h := hosts[0]
	if err := h.Agent().Stop(); err != nil {
		t.Fatal(err)
	}
	const socket = "/run/notify"
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: h.Path(socket), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // a test
	told := func() string {
		t.Helper()
		buffer := make([]byte, 1024)
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := conn.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		return string(buffer[:n])
	}
	if err := h.StartAgentWith(w.ctx, []string{"NOTIFY_SOCKET=" + socket}, "--log-format", "json", "--log-level", "info"); err != nil {
		t.Fatal(err)
	}
	if got := told(); got != "READY=1" {
		t.Errorf("systemd was told %q", got)
	}
	if err := h.Agent().Signal(syscall.SIGHUP); err != nil {
		t.Error(err)
	}
	if err := trial.Await(w.ctx, "an answer to SIGHUP", func() (bool, error) {
		text, err := os.ReadFile(h.Agent().Log)
		return strings.Contains(string(text), "the configuration on disk is the running one"), err
	}); err != nil || !h.Agent().Running() {
		t.Errorf("SIGHUP: %v", err)
	}
	if err := h.Agent().Stop(); err != nil {
		t.Error(err)
	}
	if got := told(); got != "STOPPING=1" {
		t.Errorf("systemd was told %q", got)
	}
	jsonLines(t, h.Agent().Log)
	config, err := os.ReadFile(h.Path(trial.AgentConfig))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.Path(trial.AgentConfig), append([]byte("colour = \"red\"\n"), config...), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := trial.Ask(h.AgentCommand(w.ctx, "run", "--config", trial.AgentConfig), nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%s:1: unknown key %q", trial.AgentConfig, "colour"); a.Code == 0 || !strings.Contains(a.Stderr, want) {
		t.Errorf("no %q in: %s", want, a)
	}
}

// jsonLines checks that what the agent logged last is one JSON object a line.
func jsonLines(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // only read from
	n := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var entry struct {
			Level   string `json:"@level"`
			Message string `json:"@message"`
		}
		if !strings.HasPrefix(lines.Text(), "{") && n == 0 {
			continue // of the run before, for people
		}
		if err := json.Unmarshal(lines.Bytes(), &entry); err != nil || entry.Message == "" {
			t.Errorf("logged %q: %v", lines.Text(), err)
		}
		if entry.Level == "debug" {
			t.Errorf("logged below the level: %s", lines.Text())
		}
		n++
	}
	if n < 3 {
		t.Errorf("only %d lines were logged", n)
	}
}

// What a newcomer runs first: it goes its whole way and leaves nothing.
func TestTheDemoEndsWellAndLeavesNothing(t *testing.T) {
	demo := built(t).Demo
	before := rigtest.Look(t)
	out, err := rigtest.Inner(t, demo).Output()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err != nil || lines[len(lines)-1] != "demo: ok" {
		t.Fatalf("%v\n%s", err, out)
	}
	before.NothingLeft()
	// Every step is shown with its time.
	steps, times := 0, 0
	for _, line := range lines {
		if regexp.MustCompile(`^\d+\. `).MatchString(line) {
			if steps != times {
				t.Errorf("step %d has no time", steps)
			}
			steps++
		}
		if regexp.MustCompile(`^   ✓ \d+\.\d s$`).MatchString(line) {
			times++
		}
	}
	if steps < 8 || steps != times {
		t.Errorf("%d steps and %d times in:\n%s", steps, times, out)
	}
}

// A package that an operator installs while the agent is down changes what the
// host can do, and the control plane is told what.
func TestWhatChangesAboutAHostIsToldByName(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	h := hosts[0]
	if err := h.Agent().Stop(); err != nil {
		t.Fatal(err)
	}
	images, err := filepath.Glob(filepath.Join(w.Programs.Images, "*", "*.fd"))
	if err != nil || len(images) == 0 {
		t.Fatalf("no firmware in %s: %v", w.Programs.Images, err)
	}
	firmware, err := os.ReadFile(images[0])
	if err != nil {
		t.Fatal(err)
	}
	const added = "/run/added-firmware"
	if err := os.MkdirAll(h.Path(added), 0o755); err != nil { //nolint:gosec // as a package makes it
		t.Fatal(err)
	}
	config, err := os.ReadFile(h.Path(trial.AgentConfig))
	if err != nil {
		t.Fatal(err)
	}
	config = bytes.Replace(config, []byte("image_dirs = ["), []byte(`image_dirs = ["`+added+`", `), 1)
	if err := errors.Join(os.WriteFile(h.Path(added+"/OVMF.fd"), firmware, 0o600), os.WriteFile(h.Path(trial.AgentConfig), config, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := h.StartAgent(w.ctx); err != nil {
		t.Fatal(err)
	}
	var told []string
	if err := trial.Await(w.ctx, "news of the firmware", func() (bool, error) {
		events, err := w.API.Events(w.ctx, 0, 1000, false)
		if err != nil {
			return false, err
		}
		for _, e := range events {
			event, err := e.Decode()
			if err != nil {
				return false, err
			}
			told = append(told, event.GetCapability().GetChanged()...)
		}
		return len(told) > 0, nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(told, []string{"components.ovmf.observed"}) {
		t.Errorf("told of %q, want the firmware and nothing else", told)
	}
}
