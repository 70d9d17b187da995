//go:build emulated

package rig_test

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/tests/rig"
)

const capabilities = "/var/cache/libvirt/qemu/capabilities"

// pretendSNP makes the host's libvirtd believe that QEMU found SEV-SNP and
// KVM: what it learnt from QEMU is a file, of which only the times are checked.
func pretendSNP(t *testing.T, h *rig.Host) {
	t.Helper()
	output(t, h, "virsh", "-q", "-c", rig.LibvirtURI, "domcapabilities", "--virttype", "qemu", "--arch", "x86_64")
	if err := h.KillLibvirtd(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(h.Path(capabilities + "/*.xml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no capabilities: %v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		const flags = "<flag name='sev-guest'/><flag name='sev-snp-guest'/>"
		const sev = "<sev><cbitpos>51</cbitpos><reducedPhysBits>1</reducedPhysBits><maxGuests>99</maxGuests><maxESGuests>99</maxESGuests><pdh>cGRo</pdh><certChain>Y2hhaW4=</certChain><cpu0Id>aWQ=</cpu0Id></sev>"
		edited := strings.Replace(string(text), "<flag ", flags+"<flag ", 1)
		edited = strings.Replace(edited, "</qemuCaps>", sev+"</qemuCaps>", 1)
		if err := os.WriteFile(file, []byte(edited), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.StartLibvirtd(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TCG stands in for KVM, which this machine may lack; the rest is what a host
// with SEV-SNP would run.
func TestLibvirtMakesOfTheGoldenSNPDomainWhatQEMUNeeds(t *testing.T) {
	h := newHost(t)
	golden, err := os.ReadFile(filepath.Join("..", "..", "vm", "domain", "testdata", "snp.xml"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "snp.xml")
	if err := os.WriteFile(file, []byte(strings.Replace(string(golden), `type="kvm"`, `type="qemu"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	pretendSNP(t, h)
	argv := output(t, h, "virsh", "-c", rig.LibvirtURI, "domxml-to-native", "qemu-argv", "--xml", file)
	for _, want := range []string{
		`-object '{"qom-type":"sev-snp-guest","id":"lsec0","cbitpos":51,"reduced-phys-bits":1,"kernel-hashes":true,"policy":196608,"host-data":"` +
			base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xAB}, 32)) + `"}'`,
		"confidential-guest-support=lsec0", "-machine pc-q35-", "dump-guest-core=off",
		"-bios /run/nodeagent/guests/g/firmware", "-kernel /run/nodeagent/guests/g/kernel", "-initrd /run/nodeagent/guests/g/initrd",
		"-append 'panic=-1 quiet'", "-cpu EPYC-v4 ", "-smp 4,sockets=4", "-nodefaults", "-display none",
		`"read-only":true`, `"serial":"bbbbbbbbbbbbbbbbbbbb"`,
	} {
		if !strings.Contains(argv, want) {
			t.Errorf("QEMU's arguments lack %s", want)
		}
	}
	for _, never := range []string{"pflash", "smm=on", "isa-serial", "-serial", "balloon", "usb-", "maxcpus", "hugepage", "memfd", "vnc", "virtconsole"} {
		if strings.Contains(argv, never) {
			t.Errorf("QEMU's arguments have %s", never)
		}
	}
	if t.Failed() {
		t.Log(argv)
	}
}
