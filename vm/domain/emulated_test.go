package domain

import (
	"bytes"
	"strings"
	"testing"

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
