package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/config"
)

// soundConfig is the packaged sample as an enrolled host has it.
func soundConfig(t *testing.T) string {
	t.Helper()
	sample, err := os.ReadFile("../packaging/agent.toml")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(string(sample), "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=", 1)
}

func TestAHangupSaysWhatTheNextStartWouldDo(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "agent.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sound := soundConfig(t)
	write(sound)
	running, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ text, want string }{
		{sound, "[INFO]  the configuration on disk is the running one"},
		{sound + "\n[policy]\n", "[ERROR] the configuration on disk cannot be used"},
		{"colour = \"red\"\n" + sound, "unknown key"},
		{"state_dir = \"/var/lib/other\"\n" + sound, "[WARN]"},
	} {
		write(c.text)
		var out bytes.Buffer
		checkConfig(file, running, hclog.New(&hclog.LoggerOptions{Output: &out}))
		if !strings.Contains(out.String(), c.want) {
			t.Errorf("%q is not in: %s", c.want, out.String())
		}
	}
}
