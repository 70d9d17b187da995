package boot

import (
	"net/netip"
	"strings"
	"testing"
)

// The host's words go into files with a syntax of their own: one line each,
// of exactly an address and a name.
func FuzzHostsAndResolver(f *testing.F) {
	f.Add("registry.example", "198.51.100.1")
	f.Add("a\n127.0.0.1 b", "::1")
	f.Add("localhost", "fe80::1%eth0 x")
	f.Add("registry.example", "::%\n6.6.6.6 broker.example") // a zone takes anything
	f.Add("a\vb", "1.2.3.4\nnameserver 6.6.6.6")
	f.Fuzz(func(t *testing.T, name, addr string) {
		hosts := strings.Split(strings.TrimSuffix(string(hostsFile(map[string]string{name: addr})), "\n"), "\n")
		if len(hosts) > 3 {
			t.Fatalf("hosts has %d lines", len(hosts))
		}
		for _, line := range hosts[2:] {
			if words := strings.Fields(line); len(words) != 2 || words[1] != name || words[1] == "localhost" {
				t.Errorf("hosts has line %q", line)
			}
		}
		text := string(resolvFile([]string{addr}))
		if text == "" {
			return
		}
		word, server, _ := strings.Cut(strings.TrimSuffix(text, "\n"), " ")
		if _, err := netip.ParseAddr(server); word != "nameserver" || err != nil {
			t.Errorf("resolver has %q", text)
		}
	})
}

func FuzzVariant(f *testing.F) {
	f.Add("console=null nodeagent.variant=production")
	f.Add("nodeagent.variant=debug nodeagent.variant=production")
	f.Fuzz(func(t *testing.T, cmdline string) {
		if v := variant(cmdline); !strings.Contains(cmdline, v) || strings.ContainsAny(v, " \t\n") {
			t.Errorf("%q has variant %q", cmdline, v)
		}
	})
}
