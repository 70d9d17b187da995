package domain

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm"
)

var update = flag.Bool("update", false, "rewrite the golden files") //nolint:gochecknoglobals // a test flag

func spec() vm.Spec {
	return vm.Spec{
		GuestID: "01234567-89ab-cdef-0123-456789abcdef", Generation: 3, VCPUs: 4, MemoryMiB: 4096, CPUModel: "EPYC-v4",
		Firmware: "/run/nodeagent/guests/g/firmware", Kernel: "/run/nodeagent/guests/g/kernel", Initrd: "/run/nodeagent/guests/g/initrd",
		Cmdline: "panic=-1 quiet",
		Disks:   []vm.Disk{{Path: "/var/cache/nodeagent/blobs/aa", Serial: "aaaaaaaaaaaaaaaaaaaa"}, {Path: "/var/cache/nodeagent/blobs/bb", Serial: "bbbbbbbbbbbbbbbbbbbb"}},
		NIC:     vm.NIC{Tap: "na00000001", MAC: "52:54:00:00:00:01"},
		TEE:     vm.TEE{SNP: &vm.SNP{Policy: 0x30000, HostData: bytes.Repeat([]byte{0xAB}, 32)}},
	}
}

func golden(t *testing.T, name string, s vm.Spec) {
	t.Helper()
	got, err := Render(s)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; run with -update and review:\n%s", name, got)
	}
}

func TestSNPDomainIsTheGoldenOne(t *testing.T) {
	t.Parallel()
	golden(t, "snp.xml", spec())
	text, err := Render(spec())
	if err != nil {
		t.Fatal(err)
	}
	for _, never := range []string{"<serial type", "<console", "pflash", "nvram", "smm", "<hugepages", "memballoon model=\"virtio"} {
		if strings.Contains(text, never) {
			t.Errorf("a production guest has %s", never)
		}
	}
}

// identify gives the guest the ID block of a publisher. Signatures are
// deterministic, and so is the golden file.
func identify(t *testing.T, s *vm.Spec, withAuthor bool) {
	t.Helper()
	key := func(b byte) *ecdsa.PrivateKey {
		k, err := ecdsa.ParseRawPrivateKey(elliptic.P384(), bytes.Repeat([]byte{b}, 48))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	var author *ecdsa.PrivateKey
	if withAuthor {
		author = key(2)
	}
	pair, err := idblock.Sign(idblock.Block{LaunchDigest: [48]byte(bytes.Repeat([]byte{7}, 48)), GuestSVN: 1, Policy: s.TEE.SNP.Policy}, key(1), author)
	if err != nil {
		t.Fatal(err)
	}
	s.TEE.SNP.IDBlock, s.TEE.SNP.IDAuth = pair.RawBlock, pair.RawAuth
}

func TestAnIDBlockIsPassedOnAsItsPublisherSignedIt(t *testing.T) {
	t.Parallel()
	s := spec()
	identify(t, &s, true)
	golden(t, "snp-id-block.xml", s)
	identify(t, &s, false)
	if text, err := Render(s); err != nil || !strings.Contains(text, "<idAuth>") || strings.Contains(text, "authorKey") {
		t.Errorf("a pair without author key (%v):\n%s", err, text)
	}
}

// The sizes are NVIDIA's published one and its multiples.
func TestTheMMIOWindowHoldsEveryGPU(t *testing.T) {
	t.Parallel()
	const gib = 1 << 30
	for _, c := range []struct {
		count int
		bar   uint64
		want  uint64
	}{
		{0, 0, 0},
		{1, 128 * gib, 262144},
		{2, 128 * gib, 524288},
		{4, 128 * gib, 1048576},
		{8, 128 * gib, 2097152},
		{1, 256 * gib, 524288},
		{2, 256 * gib, 1048576},
		{4, 256 * gib, 2097152},
		{8, 256 * gib, 4194304},
		{1, 512 * gib, 1048576},
		{8, 512 * gib, 8388608},
		{3, 128 * gib, 1048576},
		{8, 1024 * gib, 16777216},
		{1, 1 << 20, 2},
	} {
		if got, err := GPUWindowMiB(slices.Repeat([]uint64{c.bar}, c.count)); err != nil || got != c.want {
			t.Errorf("%d GPUs of %d GiB: %d (%v), want %d", c.count, c.bar/gib, got, err, c.want)
		}
	}
	if got, err := GPUWindowMiB([]uint64{1 << 20, 128 * gib}); err != nil || got != 524288 {
		t.Errorf("the largest BAR does not decide: %d, %v", got, err)
	}
	for _, bars := range [][]uint64{{0}, {3 << 30}, {1 << 19}, {1 << 63}, {16384 * gib}, slices.Repeat([]uint64{1024 * gib}, 16), {128 * gib, 0}} {
		if got, err := GPUWindowMiB(bars); err == nil || got != 0 {
			t.Errorf("BARs of %d give a window of %d MiB", bars, got)
		}
	}
}

// libvirt ignores elements it does not know; its schema does not.
func TestGoldenDomainsFitLibvirtsSchema(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("virt-xml-validate"); err != nil {
		skip.Missing(t, "virt-xml-validate (libvirt-clients)")
	}
	files, err := filepath.Glob(filepath.Join("testdata", "*.xml"))
	if err != nil || len(files) < 4 {
		t.Fatalf("golden files: %v, %v", files, err)
	}
	for _, file := range files {
		if strings.Contains(file, "iommufd") {
			continue // newer than libvirt 11.3's schema; see TestIOMMUFDIsOneElementMore
		}
		if out, err := exec.CommandContext(t.Context(), "virt-xml-validate", file, "domain").CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
}

func TestConsoleIsForDebugImagesOnly(t *testing.T) {
	t.Parallel()
	s := spec()
	s.ConsoleLog = "/run/nodeagent/guests/g/console.log"
	if text, err := Render(s); err != nil || !strings.Contains(text, "console.log") {
		t.Errorf("no console: %v", err)
	}
}

func TestWhatLibvirtLetsThroughAndCannotWorkIsRefused(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*vm.Spec){
		"id that is no UUID":       func(s *vm.Spec) { s.GuestID = "../../x" },
		"upper-case id":            func(s *vm.Spec) { s.GuestID = strings.ToUpper(s.GuestID) },
		"no generation":            func(s *vm.Spec) { s.Generation = 0 },
		"no vCPU":                  func(s *vm.Spec) { s.VCPUs = 0 },
		"little memory":            func(s *vm.Spec) { s.MemoryMiB = 1 },
		"CPU model with options":   func(s *vm.Spec) { s.CPUModel = "EPYC-v4,+x" },
		"no CPU model":             func(s *vm.Spec) { s.CPUModel = "" },
		"any CPU model":            func(s *vm.Spec) { s.CPUModel = "max" },
		"relative console":         func(s *vm.Spec) { s.ConsoleLog = "console.log" },
		"no firmware":              func(s *vm.Spec) { s.Firmware = "" },
		"host CPU":                 func(s *vm.Spec) { s.CPUModel = "host-passthrough" },
		"hashes without a kernel":  func(s *vm.Spec) { s.Kernel = "" },
		"relative path":            func(s *vm.Spec) { s.Initrd = "initrd" },
		"serial virtio would cut":  func(s *vm.Spec) { s.Disks[0].Serial = strings.Repeat("a", 21) },
		"too many disks":           func(s *vm.Spec) { s.Disks = make([]vm.Disk, 17) },
		"no TEE":                   func(s *vm.Spec) { s.TEE = vm.TEE{} },
		"two TEEs":                 func(s *vm.Spec) { s.TEE.Emulated = &vm.Emulated{} },
		"memory beyond reason":     func(s *vm.Spec) { s.MemoryMiB = 1 << 60 },
		"two disks of one serial":  func(s *vm.Spec) { s.Disks[1].Serial = s.Disks[0].Serial },
		"serial with a quote":      func(s *vm.Spec) { s.Disks[0].Serial = "a'b" },
		"relative disk":            func(s *vm.Spec) { s.Disks[0].Path = "blob" },
		"no MAC":                   func(s *vm.Spec) { s.NIC.MAC = "" },
		"multicast MAC":            func(s *vm.Spec) { s.NIC.MAC = "53:54:00:00:00:01" },
		"tap that is a path":       func(s *vm.Spec) { s.NIC.Tap = "../tap" },
		"no tap":                   func(s *vm.Spec) { s.NIC.Tap = "" },
		"line break in cmdline":    func(s *vm.Spec) { s.Cmdline = "quiet\ninit=/bin/sh" },
		"NUL in cmdline":           func(s *vm.Spec) { s.Cmdline = "quiet\x00" },
		"blank around cmdline":     func(s *vm.Spec) { s.Cmdline = "quiet " },
		"letters XML would change": func(s *vm.Spec) { s.Cmdline = "quiet\xff" },
		"tap name too long":        func(s *vm.Spec) { s.NIC.Tap = strings.Repeat("n", 16) },
		"policy without bit 17":    func(s *vm.Spec) { s.TEE.SNP.Policy = 0x10000 },
		"debug policy":             func(s *vm.Spec) { s.TEE.SNP.Policy |= 1 << 19 },
		"migration agent":          func(s *vm.Spec) { s.TEE.SNP.Policy |= 1 << 18 },
		"unknown policy bit":       func(s *vm.Spec) { s.TEE.SNP.Policy |= 1 << 40 },
		"short HOST_DATA":          func(s *vm.Spec) { s.TEE.SNP.HostData = nil },
		"ID block without ID auth": func(s *vm.Spec) { s.TEE.SNP.IDBlock = make([]byte, 96) },
		"ID auth of another size":  func(s *vm.Spec) { s.TEE.SNP.IDBlock, s.TEE.SNP.IDAuth = make([]byte, 96), make([]byte, 4095) },
		"ID block nobody signed":   func(s *vm.Spec) { s.TEE.SNP.IDBlock, s.TEE.SNP.IDAuth = make([]byte, 96), make([]byte, 4096) },
		"ID block changed":         func(s *vm.Spec) { identify(t, s, true); s.TEE.SNP.IDBlock[0x54]++ },
		"ID block of other policy": func(s *vm.Spec) { identify(t, s, true); s.TEE.SNP.Policy = 0x20000 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := spec()
			change(&s)
			_, err := Render(s)
			if refusal, ok := errors.AsType[*contract.Refusal](err); !ok || refusal.Remedy == "" {
				t.Errorf("not refused with a remedy: %v", err)
			}
		})
	}
}

func TestMetadataComesBack(t *testing.T) {
	t.Parallel()
	text, err := Render(spec())
	if err != nil {
		t.Fatal(err)
	}
	start, end := strings.Index(text, "<guest "), strings.Index(text, "</guest>")+len("</guest>")
	id, generation, err := ParseMark(text[start:end])
	if err != nil || id != spec().GuestID || generation != 3 {
		t.Errorf("mark is %s %d %v", id, generation, err)
	}
}

func FuzzParseMark(f *testing.F) {
	f.Add(`<guest xmlns="` + MetadataNamespace + `" id="01234567-89ab-cdef-0123-456789abcdef" generation="3"></guest>`)
	f.Add(`<guest id="x" generation="3"/>`)
	f.Add(`<n:guest xmlns:n="` + MetadataNamespace + `" id="x" generation="0"/>`)
	f.Fuzz(func(t *testing.T, text string) {
		if _, generation, err := ParseMark(text); err == nil && (generation == 0 || !strings.Contains(text, "guest")) {
			t.Errorf("%q is generation %d", text, generation)
		}
	})
}
