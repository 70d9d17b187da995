package packaging_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/confidential-node/agent/nodeagent/config"
)

// load reads a sample after doing the one thing an operator must not forget:
// putting the control plane's key where the placeholder is.
func load(t *testing.T, sample []byte) config.Config {
	t.Helper()
	placeholder := base64.StdEncoding.EncodeToString(make([]byte, ed25519.PublicKeySize))
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, ed25519.PublicKeySize))
	path := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(path, bytes.Replace(sample, []byte(placeholder), []byte(key), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestTheSampleAsItIsStartsNothing(t *testing.T) {
	t.Parallel()
	if _, err := config.Load("agent.toml"); err == nil || !strings.Contains(err.Error(), "placeholder") {
		t.Errorf("error is %v", err)
	}
}

func TestSampleConfigurationLoadsAndEqualsTheDefaults(t *testing.T) {
	t.Parallel()
	cfg := load(t, read(t, "agent.toml"))
	want := config.Default()
	want.HostID, want.Control.Servers, want.Control.CAFile = cfg.HostID, cfg.Control.Servers, cfg.Control.CAFile
	want.Control.CredsFile, want.Control.IssuerKeys = cfg.Control.CredsFile, cfg.Control.IssuerKeys
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("sample sets more than the required keys:\n got %+v\nwant %+v", cfg, want)
	}
}

// The commented lines are what people copy: they must be keys that exist,
// with the values that hold without them.
func TestCommentedKeysOfTheSampleAreTheDefaults(t *testing.T) {
	t.Parallel()
	text := read(t, "agent.toml")
	uncommented := regexp.MustCompile(`(?m)^# ([a-z_]+ = )`).ReplaceAll(text, []byte("$1"))
	if bytes.Equal(text, uncommented) {
		t.Fatal("no commented keys found")
	}
	sample, full := load(t, text), load(t, uncommented)
	// An empty list and an absent one mean the same.
	full.Network.AllowPrivateEgress, full.Network.DNS, full.GPU.Manage = nil, nil, nil
	if !reflect.DeepEqual(full, sample) {
		t.Errorf("commented values are not the defaults:\n got %+v\nwant %+v", full, sample)
	}
	// Every key of the struct except the emulated TEE's is shown.
	var missing []string
	collectKeys(reflect.TypeFor[config.Config](), func(key string) {
		if !bytes.Contains(text, []byte(key+" = ")) && !bytes.Contains(text, []byte("["+key+"]")) && !bytes.Contains(text, []byte("."+key+"]")) && key != "emulated" && key != "psp_socket" {
			missing = append(missing, key)
		}
	})
	if len(missing) > 0 {
		t.Errorf("sample lacks %s", strings.Join(missing, ", "))
	}
}

func collectKeys(typ reflect.Type, visit func(string)) {
	for field := range typ.Fields() {
		key := field.Tag.Get("toml")
		if key == "" {
			continue
		}
		visit(key)
		if field.Type.Kind() == reflect.Struct {
			collectKeys(field.Type, visit)
		}
	}
}

func TestUnitKeepsGuestsAliveAndStateClosed(t *testing.T) {
	t.Parallel()
	unit := read(t, "nodeagent.service")
	for _, line := range []string{"KillMode=process", "Type=notify", "WatchdogSec=60", "Restart=on-failure", "StateDirectoryMode=0700", "RuntimeDirectoryMode=0711", "LimitCORE=0"} {
		if !bytes.Contains(unit, []byte("\n"+line+"\n")) {
			t.Errorf("unit lacks %s", line)
		}
	}
}

// The README promises it: a line whose reason is forgotten is never removed,
// or removed by the first who meets it.
func TestEveryHardeningLineOfTheUnitHasItsReason(t *testing.T) {
	t.Parallel()
	unit, err := os.ReadFile("nodeagent.service")
	if err != nil {
		t.Fatal(err)
	}
	_, hardening, found := strings.Cut(string(unit), "# Guests outlive the agent")
	hardening, _, ended := strings.Cut(hardening, "\n\n[Install]")
	if !found || !ended {
		t.Fatal("the unit has another shape than this test knows")
	}
	explained := ""
	previous := "#"
	for _, line := range strings.Split(hardening, "\n")[1:] {
		key, _, _ := strings.Cut(line, "=")
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.HasPrefix(previous, "#"):
			explained = key
		case key != explained+"Mode": // a folder and its mode share a reason
			t.Errorf("%s has no reason above it", line)
		}
		previous = line
	}
	if strings.Contains(string(unit), "man:") {
		t.Error("the unit names a man page, and there are none")
	}
}

// Each of these settings closes devices that the agent opens.
func TestUnitLeavesTheDevicesOpen(t *testing.T) {
	t.Parallel()
	unit, err := os.ReadFile("nodeagent.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, setting := range []string{"ProtectClock", "PrivateDevices", "DevicePolicy", "DeviceAllow"} {
		if bytes.Contains(unit, []byte("\n"+setting+"=")) {
			t.Errorf("unit sets %s, which may close /dev/sev", setting)
		}
	}
}
