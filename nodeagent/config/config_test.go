package config

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const minimal = `
host_id = "host-1"
[control]
servers = ["tls://nats.example:4222"]
ca_file = "/etc/nodeagent/ca.pem"
creds_file = "/etc/nodeagent/host.creds"
issuer_keys = ["AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="]
`

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDropInsOverrideKeyByKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := write(t, dir, "agent.toml", minimal)
	write(t, dir, "conf.d/10-a.toml", "[policy]\nmax_guests = 3\nstart_timeout = \"90s\"\n")
	write(t, dir, "conf.d/20-b.toml", "[policy]\nmax_guests = 4\n[network]\npublished_ports = \"100-200\"\n")
	cfg, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Policy.MaxGuests != 4 || time.Duration(cfg.Policy.StartTimeout) != 90*time.Second || cfg.Network.PublishedPorts != (PortRange{100, 200}) {
		t.Errorf("merged policy is %+v, ports %+v", cfg.Policy, cfg.Network.PublishedPorts)
	}
	if cfg.HostID != "host-1" || cfg.TEE != TEESNP || cfg.RunDir != "/run/nodeagent" {
		t.Errorf("defaults or base file lost: %+v", cfg)
	}
}

func TestBadConfigurationNamesFileLineAndKey(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":                  {minimal + "colour = 1\n", `agent.toml:8: unknown key "control.colour"`},
		"unknown table":                {minimal + "[nosuch]\nx = 1\n", `unknown key "nosuch`},
		"wrong type":                   {minimal + "[policy]\nmax_guests = \"many\"\n", `agent.toml:9:`},
		"syntax":                       {minimal + "= 3\n", "agent.toml:8:"},
		"bad duration":                 {minimal + "[policy]\nstart_timeout = \"soon\"\n", "soon"},
		"bad port range":               {minimal + "[network]\npublished_ports = \"9-1\"\n", "not first-last"},
		"host id":                      {strings.Replace(minimal, "host-1", "Host 1", 1), "host_id"},
		"no issuer":                    {strings.Replace(minimal, `"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="`, "", 1), `agent.toml:7: key "control.issuer_keys": there is none`},
		"short issuer":                 {strings.Replace(minimal, "AQEBAQEB", "", 1), `agent.toml:7: key "control.issuer_keys"`},
		"sample's issuer":              {strings.Replace(minimal, "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", 1), `agent.toml:7: key "control.issuer_keys": it is the sample's placeholder`},
		"plain text link":              {strings.Replace(minimal, "tls://", "nats://", 1), `agent.toml:4: key "control.servers"`},
		"psp without tee":              {minimal + "[emulated]\npsp_socket = \"/x\"\n", `agent.toml:9: key "emulated.psp_socket"`},
		"tee without psp":              {"tee = \"emulated\"\n" + minimal, "emulated.psp_socket"},
		"unknown tee":                  {"tee = \"tdx\"\n" + minimal, `agent.toml:1: key "tee": "tdx"`},
		"relative directory":           {"state_dir = \"x\"\n" + minimal, `agent.toml:1: key "state_dir": "x" is not an absolute path`},
		"relative file":                {strings.Replace(minimal, "/etc/nodeagent/ca.pem", "ca.pem", 1), `agent.toml:5: key "control.ca_file"`},
		"no port":                      {strings.Replace(minimal, ":4222", "", 1), `agent.toml:4: key "control.servers"`},
		"out of range":                 {minimal + "[policy]\nmax_vcpus = 2\nmax_guests = 0\n", `agent.toml:10: key "policy.max_guests": 0 is not within 1..1000`},
		"more than an upload":          {minimal + "[policy]\nresults_quota = 53687091200001\n", `agent.toml:9: key "policy.results_quota"`},
		"missing":                      {strings.Replace(minimal, "host_id", "# host_id", 1), `agent.toml: key "host_id"`},
		"guest range too wee":          {minimal + "[network]\nguest_cidr = \"10.0.0.0/30\"\n", `agent.toml:9: key "network.guest_cidr"`},
		"a shared port without domain": {minimal + "[network.tls]\nlisten = \":443\"\n", `key "network.tls": listen and domain belong together`},
		"a shared port of the range":   {minimal + "[network.tls]\nlisten = \":20000\"\ndomain = \"g.example\"\n", `agent.toml:9: key "network.tls.listen": port 20000 is one of published_ports`},
		"a shared port that is none":   {minimal + "[network.tls]\nlisten = \"443\"\ndomain = \"g.example\"\n", `key "network.tls.listen": "443" is not address:port`},
		"a domain that is none":        {minimal + "[network.tls]\nlisten = \":443\"\ndomain = \"G.example.\"\n", `agent.toml:10: key "network.tls.domain"`},
		"no relayed connection":        {minimal + "[network]\nmax_relayed_connections = 0\n", `agent.toml:9: key "network.max_relayed_connections"`},
		"more than the descriptors":    {minimal + "[network]\nmax_relayed_connections = 8193\n", `agent.toml:9: key "network.max_relayed_connections"`},
		"idle for no time":             {minimal + "[network]\nrelay_idle = \"1s\"\n", `agent.toml:9: key "network.relay_idle"`},
		"no packet of a guest":         {minimal + "[network]\nmax_guest_packets = 0\n", `agent.toml:9: key "network.max_guest_packets"`},
		"no connection per port":       {minimal + "[network]\nmax_port_connections = 0\n", `agent.toml:9: key "network.max_port_connections"`},
		"no connection per client":     {minimal + "[network]\nmax_source_connections = -1\n", `agent.toml:9: key "network.max_source_connections"`},
		"plain key service":            {"key_service = \"http://kdsintf.amd.com\"\n" + minimal, `agent.toml:1: key "key_service"`},
		"gpu of no form":               {minimal + "[gpu]\nmanage = [\"41:00.0\"]\n", `agent.toml:9: key "gpu.manage": "41:00.0" is no PCI address`},
		"gpu twice":                    {minimal + "[gpu]\nmanage = [\"0000:41:00.0\", \"0000:41:00.0\"]\n", `"0000:41:00.0" is there twice`},
		"all and one":                  {minimal + "[gpu]\nmanage = [\"all-capable\", \"0000:41:00.0\"]\n", `"all-capable" stands alone`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Load(write(t, t.TempDir(), "agent.toml", c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want it to contain %q", err, c.want)
			}
		})
	}
}

func TestADropInsMistakeIsNamedWhereItStands(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := write(t, dir, "agent.toml", minimal+"[policy]\nmax_guests = 3\n")
	write(t, dir, "conf.d/10-a.toml", "\n[policy]\nmax_guests = 5000\n")
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), `10-a.toml:3: key "policy.max_guests"`) {
		t.Errorf("error is %v", err)
	}
}

func TestOversizeAndMissingFilesAreRefused(t *testing.T) {
	t.Parallel()
	big := write(t, t.TempDir(), "agent.toml", string(bytes.Repeat([]byte("#\n"), maxFileBytes)))
	if _, err := Load(big); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("oversize: %v", err)
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none.toml")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "packaging/agent.toml") {
		t.Errorf("a missing file: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte("[policy]\nmax_guests = 1e9"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg := Default()
		if parse("fuzz.toml", data, &cfg) == nil {
			at := map[string]string{}
			places("fuzz.toml", data, at)
			_ = cfg.validate("fuzz.toml", at)
		}
	})
}
