package domain

import (
	"bytes"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

func emulatedSpec() vm.Spec {
	s := spec()
	s.TEE = vm.TEE{Emulated: &vm.Emulated{
		Policy: 0x30000, HostData: bytes.Repeat([]byte{0xAB}, 32),
		HashTable: "/run/nodeagent/guests/g/hash-table", HashTableGPA: 0x810c00, PSPSocket: "/run/psp/psp.sock",
	}}
	return s
}

func TestEmulatedDomainNeedsTheTag(t *testing.T) {
	t.Parallel()
	if emulatedBuild {
		golden(t, "emulated.xml", emulatedSpec())
		return
	}
	if _, err := Render(emulatedSpec()); err == nil || !strings.Contains(err.Error(), "vm.emulation-not-built") {
		t.Errorf("a build without the tag renders an emulated guest: %v", err)
	}
}

func TestEmulationIsCheckedLikeSilicon(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*vm.Emulated){
		"policy without bit 17":       func(e *vm.Emulated) { e.Policy = 0x10000 },
		"debug policy":                func(e *vm.Emulated) { e.Policy |= 1 << 19 },
		"short HOST_DATA":             func(e *vm.Emulated) { e.HostData = nil },
		"another option in the table": func(e *vm.Emulated) { e.HashTable += ",readonly=off" },
		"relative table":              func(e *vm.Emulated) { e.HashTable = "table" },
		"no socket":                   func(e *vm.Emulated) { e.PSPSocket = "" },
		"table nowhere":               func(e *vm.Emulated) { e.HashTableGPA = 0 },
		"table above 4 GiB":           func(e *vm.Emulated) { e.HashTableGPA = 1 << 32 },
	} {
		s := emulatedSpec()
		change(s.TEE.Emulated)
		if err := Check(s); err == nil || contract.AsRefusal(err).Code != "vm.spec-refused" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
