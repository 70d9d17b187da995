package domain

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Every golden domain has the devices of this list and no other: nothing that
// a process of the host serves (agent channels, VNC and SPICE, shared folders,
// vsock, smart cards, USB redirection), and none of QEMU's own monitor.
func TestNoDeviceOfAGuestLeadsToAProcessOfTheHost(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.xml")
	if err != nil || len(files) < 2 {
		t.Fatalf("golden domains are %v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		allowed := []string{"disk", "controller", "interface", "hostdev", "memballoon", "iommu"}
		sources := regexp.MustCompile(`^(file|disk)$`)
		if strings.HasPrefix(filepath.Base(file), "emulated") {
			allowed = append(allowed, "channel") // to the process that stands for the security processor
			sources = regexp.MustCompile(`^(file|disk|unix)$`)
		}
		d := xml.NewDecoder(strings.NewReader(string(text)))
		var path []string
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			switch e := token.(type) {
			case xml.StartElement:
				path = append(path, e.Name.Local)
				if len(path) == 3 && path[1] == "devices" && !slices.Contains(allowed, e.Name.Local) {
					t.Errorf("%s: a guest has the device <%s>", file, e.Name.Local)
				}
				for _, a := range e.Attr {
					switch {
					case len(path) == 3 && (e.Name.Local == "disk" || e.Name.Local == "channel") && a.Name.Local == "type" && !sources.MatchString(a.Value):
						t.Errorf("%s: <%s> is a %s", file, e.Name.Local, a.Value)
					case a.Name.Local == "path" && strings.Contains(a.Value, "libvirt"), a.Name.Local == "mode" && a.Value == "bind":
						t.Errorf("%s: <%s %s=%q>", file, e.Name.Local, a.Name.Local, a.Value)
					case e.Name.Local == "arg" && regexp.MustCompile(`^-(chardev|monitor|qmp|mon|vnc|spice|serial|netdev|fsdev|incoming|object|gdb|s)\b`).MatchString(a.Value):
						t.Errorf("%s: QEMU is given %s", file, a.Value)
					}
				}
			case xml.EndElement:
				path = path[:len(path)-1]
			}
		}
	}
}
