//go:build emulated

package rig_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/diagnosis"
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
		if strings.Contains(string(text), "<sev>") {
			continue // a host before this one was pretended to, and left what it knew
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

// argv is what libvirt on a host with SEV-SNP makes of a golden domain. TCG
// stands in for KVM where this machine has none.
func argv(t *testing.T, h *rig.Host, name string) string {
	t.Helper()
	golden, err := os.ReadFile(filepath.Join("..", "..", "vm", "domain", "testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(h.Path("/dev/kvm")); err != nil {
		golden = bytes.Replace(golden, []byte(`type="kvm"`), []byte(`type="qemu"`), 1)
	}
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, golden, 0o600); err != nil {
		t.Fatal(err)
	}
	return output(t, h, "virsh", "-c", rig.LibvirtURI, "domxml-to-native", "qemu-argv", "--xml", file)
}

// goldenFiles puts on the host what the golden domains name.
func goldenFiles(t *testing.T, h *rig.Host) {
	t.Helper()
	for path, data := range map[string][]byte{
		"/run/nodeagent/guests/g/firmware": make([]byte, 1<<20), "/run/nodeagent/guests/g/kernel": blankKernel(), "/run/nodeagent/guests/g/initrd": make([]byte, 4096),
		"/var/cache/nodeagent/blobs/aa": make([]byte, 4096), "/var/cache/nodeagent/blobs/bb": make([]byte, 4096), "/run/qemu/master-key.aes": make([]byte, 32),
	} {
		if err := os.MkdirAll(h.Path(filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(h.Path(path), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// runQEMU runs QEMU with libvirt's arguments, of which only what libvirt
// would have made itself is replaced: the monitor's folder and the open tap.
func runQEMU(t *testing.T, h *rig.Host, args string) (stdout, stderr string, failed bool) {
	t.Helper()
	args = regexp.MustCompile(`/var/lib/libvirt/qemu/domain--1-[^/'" ]*/`).ReplaceAllString(args, "/run/qemu/")
	args = regexp.MustCompile(`"type":"tap","fd":"[0-9]+"`).ReplaceAllString(args, `"type":"hubport","hubid":0`)
	cmd := h.Command(t.Context(), "bash", "-c", "exec env "+strings.TrimSpace(args)+" -qmp stdio")
	cmd.Stdin = strings.NewReader(`{"execute":"qmp_capabilities"}{"execute":"query-status"}{"execute":"quit"}`)
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	return out.String(), errOut.String(), err != nil
}

// always must be in the arguments of every guest under SEV-SNP, never in none.
func always() []string {
	return []string{
		`"qom-type":"sev-snp-guest","id":"lsec0","cbitpos":51,"reduced-phys-bits":1,`, `"kernel-hashes":true,"policy":196608,`,
		`"host-data":"` + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xAB}, 32)) + `"`,
		"confidential-guest-support=lsec0", "-machine pc-q35-", "dump-guest-core=off",
		"-bios /run/nodeagent/guests/g/firmware", "-kernel /run/nodeagent/guests/g/kernel", "-initrd /run/nodeagent/guests/g/initrd",
		"-append 'panic=-1 quiet'", "-smp 4,sockets=4", "-nodefaults", "-display none",
		`"read-only":true`, `"serial":"bbbbbbbbbbbbbbbbbbbb"`,
	}
}

func never() []string {
	return []string{"pflash", "smm=on", "isa-serial", "-serial", "balloon", "usb-", "maxcpus", "hugepage", "memfd", "vnc", "virtconsole"}
}

// own is what each golden domain adds.
func own(t *testing.T) map[string][]string {
	t.Helper()
	golden, err := os.ReadFile(filepath.Join("..", "..", "vm", "domain", "testdata", "snp-id-block.xml"))
	if err != nil {
		t.Fatal(err)
	}
	element := func(name string) string {
		_, rest, _ := strings.Cut(string(golden), "<"+name+">")
		text, _, _ := strings.Cut(rest, "</"+name+">")
		return text
	}
	return map[string][]string{
		"snp.xml":          {"-cpu EPYC-v4 "},
		"snp-id-block.xml": {"-cpu EPYC-v4 ", `"id-block":"` + element("idBlock") + `"`, `"id-auth":"` + element("idAuth") + `"`, `"author-key-enabled":true`},
		"gpu-1-type1.xml": {
			"-cpu EPYC-v4,host-phys-bits=on ", "-fw_cfg name=opt/ovmf/X-PciMmio64Mb,string=262144", `"driver":"pcie-root-port","port":128,"chassis":1,`,
			`"driver":"vfio-pci","host":"0000:18:00.0"`,
		},
		"gpu-8-ppcie.xml": {
			"-cpu EPYC-v4,host-phys-bits=on ", "-fw_cfg name=opt/ovmf/X-PciMmio64Mb,string=2097152", `"driver":"pcie-root-port","port":139,"chassis":12,`,
			`"driver":"vfio-pci","host":"0000:88:00.0"`, `"driver":"vfio-pci","host":"0000:08:00.0"`,
		},
	}
}

// A host without SEV-SNP refuses the guest for that, and for nothing in its
// arguments; without the words on SEV-SNP it takes them all.
func TestLibvirtAndQEMUTakeTheGoldenSNPDomains(t *testing.T) {
	h := newHost(t)
	pretendSNP(t, h)
	goldenFiles(t, h)
	for name, extra := range own(t) {
		t.Run(name, func(t *testing.T) {
			args := argv(t, h, name)
			for _, want := range append(always(), extra...) {
				if !strings.Contains(args, want) {
					t.Errorf("QEMU's arguments lack %s", want)
				}
			}
			for _, bad := range never() {
				if strings.Contains(args, bad) {
					t.Errorf("QEMU's arguments have %s", bad)
				}
			}
			// Whether VFIO maps the device only a host that has it can tell.
			args = regexp.MustCompile(`"driver":"vfio-pci","host":"[^"]*"`).ReplaceAllString(args, `"driver":"pci-testdev"`)
			_, stderr, failed := runQEMU(t, h, args)
			if r, known := diagnosis.Start(stderr); !failed || !known || r.Code != "host.snp-unavailable" {
				t.Errorf("on a host without SEV-SNP QEMU says %q (%+v)", stderr, r)
			}
			plain := regexp.MustCompile(`-object '\{"qom-type":"sev-snp-guest"[^']*'`).ReplaceAllString(args, "")
			plain = strings.Replace(plain, ",confidential-guest-support=lsec0", "", 1)
			if stdout, stderr, failed := runQEMU(t, h, plain); failed || !strings.Contains(stdout, "prelaunch") {
				t.Errorf("without SEV-SNP QEMU says %q and %q", stderr, stdout)
			}
			if t.Failed() {
				t.Log(args)
			}
		})
	}
}

// The other way round: QEMU does look at what it is told of SEV-SNP.
func TestQEMURefusesWrongWordsOnSNP(t *testing.T) {
	h := newHost(t)
	pretendSNP(t, h)
	goldenFiles(t, h)
	args := argv(t, h, "snp-id-block.xml")
	for name, c := range map[string]struct{ from, to, code string }{
		"an unknown property": {`"kernel-hashes"`, `"kernel-hash"`, ""},
		"a short ID block":    {`"id-block":"BwcH`, `"id-block":"`, "vm.launch-data"},
	} {
		changed := strings.Replace(args, c.from, c.to, 1)
		if changed == args {
			t.Fatalf("%s: there is no %s", name, c.from)
		}
		_, stderr, failed := runQEMU(t, h, changed)
		code := ""
		if r, known := diagnosis.Start(stderr); known {
			code = r.Code
		}
		if !failed || code != c.code {
			t.Errorf("%s: QEMU says %q, which is explained as %q", name, stderr, code)
		}
	}
}

// The whole way: a libvirtd that believes in SEV-SNP, because it learnt so
// before something was changed, on a host that has no security processor.
func TestAHostWithoutSecurityProcessorSaysSo(t *testing.T) {
	h := newHost(t)
	if _, err := os.Stat(h.Path("/dev/kvm")); err != nil {
		skip.Missing(t, "KVM")
	}
	if _, err := os.Stat(h.Path("/dev/sev")); err == nil {
		skip.Missing(t, "host without SEV")
	}
	pretendSNP(t, h)
	d := drive(t, h)
	spec := blankSpec(t, h)
	spec.TEE = vm.TEE{SNP: &vm.SNP{Policy: 0x30000, HostData: make([]byte, 32)}}
	r, refused := errors.AsType[*contract.Refusal](d.Start(t.Context(), spec))
	if !refused || r.Code != "host.psp-missing" {
		t.Errorf("the start ends with %v", r)
	}
	text, err := os.ReadFile(h.Path("/var/log/libvirt/qemu/" + vm.NamePrefix + guestID + ".log"))
	if err != nil || !strings.Contains(string(text), ": starting up libvirt version") {
		t.Errorf("libvirt's log of the domain does not begin as the driver expects (%v):\n%s", err, text)
	}
}
