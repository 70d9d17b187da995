package measure

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/measure/measuretest"
	"github.com/confidential-node/agent/firmware/ovmf"
	"github.com/confidential-node/agent/tests/skip"
)

// The digest after every step, so that a mistake shows where it is made.
func TestEveryStepOfALaunchMatchesTheTrace(t *testing.T) {
	t.Parallel()
	table := HashTable(sum("kernel-bytes"), sum("initrd-bytes"), "console=ttyS0 ro")
	image := measuretest.Firmware(4096, true)
	firmware, err := ovmf.Parse(image)
	if err != nil {
		t.Fatal(err)
	}
	var d launch
	step := func(what, want string) {
		t.Helper()
		if got := hex.EncodeToString(d.digest[:]); got != want {
			t.Errorf("after %s: %s, want %s", what, got, want)
		}
	}
	d.normal(image, firmware.GPA())
	step("firmware", "2f6ab0baa4416027356921d31238f781e6e85f29693926c53f5075a5e33e8e895d6f6f3d1d57aeffbfcfa6bfce666035")
	for i, want := range []string{
		"3435068a3f2d00fec6885621e1093c65613728ace53ce68976ae4e5a278531ab4c1859bdd90f0667a4b04e32f97e19a2",
		"91b20cda205b8ab5e472f4890b60717a9eff9732435f696e0ddf9b28bc674f9ce4efb6112eada84415379fc87524bb28",
		"5f256c317a05e91d30eb93af62638b55b776548cd2d9e2492284acfcfbd54b4cdfb12e142905f7a63111a5f8616d69b9",
		"beb4203e312dfbfff8042f9ee43aebb58d4f5c089dec66729d7c1d1c239f3e4d4f447cc7c6b64a11946a1323f118bdb0",
		"4fb4f7994a2de35440ac0d24e0392c50286cc02e7f21f92dca7b5f36fbe56bff30e9f6bbe9bdb8fca3b4b97fdfb9a86a",
		"08a38893f6ddea4e14f96d30fdd0c552a502df623ab44a827887cbd0dfa33138b8e89373627968f46a416164ee664853",
		"ee5ab1723d5a922df92e484eb30be3527b04eee5010d0d2c646db4b378894a2d4453cff8edd1e4092d0563b722c996c4",
	} {
		one := *firmware
		one.Sections = firmware.Sections[i : i+1]
		d.sections(&one, &table)
		step("section "+string(rune('0'+i)), want)
	}
	single := d
	single.vmsas(1, firmware.ResetEIP, 0xa10f10, 1)
	if got := hex.EncodeToString(single.digest[:]); got != "e94367cc4f6924061eed65a3fed98a99e8184f9966f7b5950e9d7d4cdc695014bdb6c49e8309156842f47aea4c170953" {
		t.Errorf("after VMSA 0: %s", got)
	}
	d.vmsas(2, firmware.ResetEIP, 0xa10f10, 1)
	step("VMSA 1", "fb423daed249ec1d211a4349df60348381424ed8ca695dfb5a12064c6623549d5d50b7add03d5a9ebe4d06f64f789cce")
}

func TestStepsWithoutHashesMatchTheTrace(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		size                   int
		hashes                 bool
		firmware, lastSections string
	}{
		{4096, false, "9bdd2fb2d239da9b99e8c459fe25288fa35e0d09289feb2f9c8a7070a27f21d6809ab6c902be0353de3272a89f5d5a39", "3cba787bf49718fb9f74b64f93ea3ef06d0de4ef779dd449d273f0c1166c8ef726190d0b9abb35063c657ffa99a7c0d3"},
		{65536, true, "769e6c1c76dd749919c4bb3d5f904511ea2f3a0fa50a6a098c99df840ac92accef70805ea2291f6bf4b74308fc51a249", ""},
	} {
		image := measuretest.Firmware(c.size, c.hashes)
		firmware, err := ovmf.Parse(image)
		if err != nil {
			t.Fatal(err)
		}
		var d launch
		d.normal(image, firmware.GPA())
		if got := hex.EncodeToString(d.digest[:]); got != c.firmware {
			t.Errorf("%d bytes, after firmware: %s, want %s", c.size, got, c.firmware)
		}
		d.sections(firmware, nil)
		if got := hex.EncodeToString(d.digest[:]); c.lastSections != "" && got != c.lastSections {
			t.Errorf("%d bytes, after the sections: %s, want %s", c.size, got, c.lastSections)
		}
	}
}

func TestSaveAreasMatchTheVectors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		eip, signature uint32
		want           string
	}{
		{0xFFFFFFF0, 0x800f12, "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a"},
		{0x80b004, 0x800f12, "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4"},
		{0xFFFFFFF0, 0xa10f10, "7d39672d1b8a3e38353a8eef23af9a14a850be7b9c80bd29898aff5cd2386719e5ce72ad660a022def56b15e5e0f899e"},
		{0x80b004, 0xa10f10, "2eb1a41390605ea8527eded2db4f86244f621bd8b4abd7791e6ea37949d43373d47725b1f20213bb83332de70d646a4f"},
	} {
		page := vmsa(c.eip, c.signature, 1)
		if got := sha512.Sum384(page[:]); hex.EncodeToString(got[:]) != c.want {
			t.Errorf("EIP %#x, signature %#x: %x, want %s", c.eip, c.signature, got, c.want)
		}
	}
}

func TestTheFooterTableIsByteForByteTheRecipes(t *testing.T) {
	t.Parallel()
	const want = "0004000016006665" + "88dc4a989847a75e" + "5585a7bf67cc000c" + "8100000400001a00" + "1f3755723b3a044b" + "927b1da6efa8d454" +
		"04b080001600de71" + "f7007e1acb4f890e" + "68c77e2fb44e5800" + "de82b596b21ff745" + "baeaa366c55a082d"
	if got := hex.EncodeToString(measuretest.Firmware(4096, true)[3976 : 4096-32]); got != want {
		t.Errorf("footer table is %s", got)
	}
}

func TestTheHashPageMatchesTheVectors(t *testing.T) {
	t.Parallel()
	empty := HashTable(sum(""), sum(""), "")
	const want = "06d63894224fc94cb479a793d411fd21a800" +
		"d82dd09720bd944caa78e7714d36ab2a3200" + "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d" +
		"31f7ba442f3ad74b9af141e29169781d3200" + "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" +
		"3794e74dd2ab7f42b835d5b172d2045b3200" + "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" + "0000000000000000"
	if hex.EncodeToString(empty[:]) != want {
		t.Errorf("table of empty files is %x", empty)
	}
	table := HashTable(sum("kernel-bytes"), sum("initrd-bytes"), "console=ttyS0 ro")
	page := hashPage(&table, 0x810c00)
	if got := sha512.Sum384(page[:]); hex.EncodeToString(got[:]) != "4596d237df09734d43927eceeb63325e02d7334c465ff91efe8c263da6788e942d2247f0e5d7731c5db93f0520a2b7f8" {
		t.Errorf("page with the table at 0xc00 hashes to %x", got)
	}
}

// QEMU builds the table only under SEV, but the GUIDs it writes are in the
// program as they are in memory.
func TestTheInstalledQEMUWritesTheseGUIDs(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		skip.Missing(t, "qemu-system-x86_64")
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	table := HashTable(sum(""), sum(""), "")
	for _, offset := range []int{0, 18, 68, 118} {
		if guid := table[offset : offset+16]; !bytes.Contains(program, guid) {
			t.Errorf("QEMU knows no GUID %x, which is at %d of the table", guid, offset)
		}
	}
}

func TestCPUModelsHaveTheSignaturesOfTheTable(t *testing.T) {
	t.Parallel()
	for want, models := range map[uint32]string{
		0x00800f12: "EPYC EPYC-v1 EPYC-v2 EPYC-v3 EPYC-v4 EPYC-IBPB",
		0x00830f10: "EPYC-Rome EPYC-Rome-v1 EPYC-Rome-v2 EPYC-Rome-v3 EPYC-Rome-v4 EPYC-Rome-v5",
		0x00a00f11: "EPYC-Milan EPYC-Milan-v1 EPYC-Milan-v2 EPYC-Milan-v3",
		0x00a10f10: "EPYC-Genoa EPYC-Genoa-v1 EPYC-Genoa-v2",
		0x00b00f00: "EPYC-Turin EPYC-Turin-v1",
	} {
		for model := range strings.FieldsSeq(models) {
			if got, err := CPUSignature(model); err != nil || got != want {
				t.Errorf("%s: %#x (%v), want %#x", model, got, err, want)
			}
		}
	}
	for _, model := range []string{"", "host", "max", "epyc-v4", "EPYC-v4 ", "EPYC-v9", "qemu64"} {
		if got, err := CPUSignature(model); err == nil {
			t.Errorf("%q measures as %#x", model, got)
		}
	}
}

// The emulator knows only what QEMU was given; both ways must agree.
func TestTheDigestOfARealFirmwareIsTheSameBothWays(t *testing.T) {
	t.Parallel()
	image, err := os.ReadFile(filepath.Join("..", "..", "..", "shared", "data", "firmware", "OVMF.amdsev.fd"))
	if err != nil {
		skip.Missing(t, "a real AmdSev OVMF in ../shared/data")
	}
	kernel := &KernelDigests{sum("kernel-bytes"), sum("initrd-bytes"), "quiet"}
	in := Input{Firmware: image, Kernel: kernel, VCPUs: 2, CPUModel: "EPYC-v4", GuestFeatures: 1}
	predicted, err := Digest(in)
	if err != nil {
		t.Fatal(err)
	}
	table := HashTable(kernel.Kernel, kernel.Initrd, kernel.Cmdline)
	seen, err := DigestWithTable(image, &table, 2, 0x800f12, 1)
	if err != nil || seen != predicted {
		t.Errorf("%x and %x (%v)", predicted, seen, err)
	}
	for name, change := range map[string]func(*Input){
		"firmware": func(in *Input) { in.Firmware = append([]byte{in.Firmware[0] ^ 1}, in.Firmware[1:]...) },
		"kernel":   func(in *Input) { in.Kernel = &KernelDigests{sum("x"), kernel.Initrd, kernel.Cmdline} },
		"initrd":   func(in *Input) { in.Kernel = &KernelDigests{kernel.Kernel, sum("x"), kernel.Cmdline} },
		"cmdline":  func(in *Input) { in.Kernel = &KernelDigests{kernel.Kernel, kernel.Initrd, "quiet "} },
		"no table": func(in *Input) { in.Kernel = nil },
		"vCPUs":    func(in *Input) { in.VCPUs = 3 },
		"model":    func(in *Input) { in.CPUModel = "EPYC-Genoa" },
		"features": func(in *Input) { in.GuestFeatures = 0x201 },
	} {
		other := in
		change(&other)
		if got, err := Digest(other); err != nil || got == predicted {
			t.Errorf("%s does not change the digest (%v)", name, err)
		}
	}
}
