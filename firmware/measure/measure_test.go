package measure

import (
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/google/uuid"

	"github.com/confidential-node/agent/firmware/measure/measuretest"
	"github.com/confidential-node/agent/firmware/ovmf"
)

func sum(s string) [32]byte { return sha256.Sum256([]byte(s)) }

func TestSyntheticImagesAreTheRecipesImages(t *testing.T) {
	t.Parallel()
	for want, image := range map[string][]byte{
		"c8a5532fce30b699480052561a4094d3e9e0a78879e29d5dc04f038012316071": measuretest.Firmware(4096, true),
		"bcf04e5479e0ec38482872d56ee817061e06b3306f50310f02d2a082319efab4": measuretest.Firmware(4096, false),
		"56bbec35a73c060d8bd17ec3bb124d6043c0e67ebd4553b8a9625d5b676e5851": measuretest.Firmware(65536, true),
		"f2668b5c6dfedcb8e803e93f9f92742d51484a7879546bfd8fe6759ba1a02bd4": measuretest.Firmware(65536, false),
	} {
		got := sha256.Sum256(image)
		if hex.EncodeToString(got[:]) != want {
			t.Errorf("image is %x, want %s", got, want)
		}
	}
}

func TestLaunchDigestsMatchTheSyntheticVectors(t *testing.T) {
	t.Parallel()
	kernel := &KernelDigests{sum("kernel-bytes"), sum("initrd-bytes"), "console=ttyS0 ro"}
	for _, c := range []struct {
		size     int
		hashes   bool
		kernel   *KernelDigests
		vcpus    int
		model    string
		features uint64
		want     string
	}{
		{4096, true, kernel, 2, "EPYC-Genoa", 1, "fb423daed249ec1d211a4349df60348381424ed8ca695dfb5a12064c6623549d5d50b7add03d5a9ebe4d06f64f789cce"},
		{4096, false, nil, 2, "EPYC-Genoa", 1, "098abbcd326bd74d4707f0293677e6665200dfec166453e606bb8b71096fe93664769cf37e4bd5773429d9e75dd4a5e6"},
		{4096, false, nil, 240, "EPYC-v4", 1, "9156e8ec0f8988a0e6b2bd95194a8fbedc8216a756f99a951b74b6ec120395d3a3d35cd06023f70886fc5aa75a3d2c58"},
		{65536, true, nil, 1, "EPYC", 1, "d696b65b609f552bb478b74859a3127e09a6b9536c4e834f6bcf88bef6dbf9bc2b54130d59679dc399947bbf8b88d58d"},
		{65536, true, nil, 4, "EPYC-v1", 1, "3f404611b168ff73f1d28f56e246478ceb64881029b33ed3255c25df7bd2887eb752526182497d8b7b34adb4715b13b6"},
		{65536, true, kernel, 1, "EPYC-v4", 1, "120d36b6db1972fceec3d006d8a077803066edad043b63d41d12dc950861baf49e4a421f17f20909708dc6a2dd52df3c"},
		{65536, true, kernel, 4, "EPYC-v4", 1, "75bc4ca55c0aca30c1226f9103b4c5eb40d76cadbd5e002fb43350ac54a402c43ece803885d5e5c71cdbca0b75073cb3"},
		{65536, true, kernel, 2, "EPYC-Milan", 1, "81ea69ed5779df03342e8202ca5cc5223146f5c3f90e93713d4df634c43342b217efbd41d3fb538345f16baf4cfeb07d"},
		{65536, true, kernel, 2, "EPYC-Genoa", 1, "264e7e4b470d09fcd26619ef02548544fe046355270b4a4efdcdaea60d658d2b4ec537b83fc9ce1e024f00c114b82209"},
		{65536, true, kernel, 2, "EPYC-Turin", 1, "1e0ae09d039cad5ff9ae5841bd14307e074b9aba4556dd97f0b4df02923d572802d26adb6009d6c904efeccd6f2095f4"},
		{65536, true, kernel, 2, "EPYC-v4", 0x201, "d8702cc3357cc6c020959e03e0ddf60f5e16f1941d6cdd286a6c001bb1aee61aacac83ba15f1bdc8e71fdd299551d715"},
		{65536, true, kernel, 240, "EPYC-v4", 1, "a5539f2c911c3f57c1bd0591a1ba8f129f2bdbc66bd34a4407346e9875cf34d4e026756d3d74b9d01e3182d690425276"},
		{65536, false, nil, 1, "EPYC-v4", 1, "436747ecdfdc5d8b3717090e9d94cfd4482b4e14866176f24bcb7178910a89dc4ef020de8698ec052e457691d38aed06"},
	} {
		got, err := Digest(Input{Firmware: measuretest.Firmware(c.size, c.hashes), Kernel: c.kernel, VCPUs: c.vcpus, CPUModel: c.model, GuestFeatures: c.features})
		if err != nil || hex.EncodeToString(got[:]) != c.want {
			t.Errorf("%d bytes, kernel %v, %d × %s, %#x: %x (%v), want %s", c.size, c.kernel != nil, c.vcpus, c.model, c.features, got, err, c.want)
		}
	}
}

// The digests of the upstream fixtures after their firmware page.
const (
	amdSevStart = "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"
	x64Start    = "b91e6fec73d2bcc57ad5fd400a426ce02731c22ea92bc894ce675e7c9921a822977d6cf025b85f8ef4f264bff8839d20"
)

// fixtures are the upstream fixtures, as parsed inputs.
func fixtures() (amdSev, x64 *ovmf.Firmware) {
	common := []ovmf.Section{
		{GPA: 0x800000, Size: 0x9000, Type: 1},
		{GPA: 0x80a000, Size: 0x3000, Type: 1},
		{GPA: 0x80d000, Size: 0x1000, Type: 2},
		{GPA: 0x80e000, Size: 0x1000, Type: 3},
		{GPA: 0x80f000, Size: 0x1000, Type: 4},
	}
	amdSev = &ovmf.Firmware{
		ResetEIP: 0x80b004, HashTable: &ovmf.Area{Base: 0x810c00, Size: 0x400},
		Sections: append(common[:5:5], ovmf.Section{GPA: 0x810000, Size: 0x1000, Type: 0x10}, ovmf.Section{GPA: 0x811000, Size: 0xf000, Type: 1}),
	}
	return amdSev, &ovmf.Firmware{ResetEIP: 0x80b004, Sections: append(common[:5:5], ovmf.Section{GPA: 0x810000, Size: 0x10000, Type: 1})}
}

func TestLaunchDigestsMatchTheUpstreamFixtures(t *testing.T) {
	t.Parallel()
	amdSev, x64 := fixtures()
	cmdline := func(s string) *[ovmf.HashTableSize]byte {
		table := HashTable(sum(""), sum(""), s)
		return &table
	}
	for _, c := range []struct {
		firmware *ovmf.Firmware
		start    string
		table    *[ovmf.HashTableSize]byte
		vcpus    int
		features uint64
		want     string
	}{
		{amdSev, amdSevStart, cmdline("console=ttyS0 loglevel=7"), 1, 0x21, "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977"},
		{amdSev, amdSevStart, cmdline("console=ttyS0 loglevel=7"), 1, 0x1, "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa"},
		{amdSev, amdSevStart, cmdline(""), 1, 0x21, "329c8ce0972ae52343b64d34a434a86f245dfd74f5ed7aae15d22efc78fb9683632b9b50e4e1d7fa41179ef98a7ef198"},
		{amdSev, amdSevStart, cmdline(""), 1, 0x1, "ddc5224521617a536ee7ce9dd6224d1b58a8d4fda1c741f3ac99fc4bfa04ba6e9fc98646d4a07a9079397fa3852819b5"},
		{amdSev, amdSevStart, cmdline(""), 4, 0x21, "4953b1fb416fa874980e8442b3706d345926d5f38879134e00813c5d7abcbe78eafe7b422907be0b4698e2414a631942"},
		{amdSev, amdSevStart, cmdline(""), 4, 0x1, "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5"},
		{amdSev, amdSevStart, nil, 1, 0x21, "e1e1ca029dd7973ab9513295be68198472dcd4fc834bd9af9b63f6e8a1674dbf281a9278a4a2ebe0eed9f22adbcd0e2b"},
		{amdSev, amdSevStart, nil, 1, 0x1, "19358ba9a7615534a9a1e2f0dfc29384dcd4dcb7062ff9c6013b26869a5fc6ecabe033c48dd6f6db5d6d76e7c5df632d"},
		{x64, x64Start, nil, 1, 0x21, "28797ae0afaba4005a81e629acebfb59e6687949d6be44007cd5506823b0dd66f146aaae26ff291eed7b493d8a64c385"},
		{x64, x64Start, nil, 1, 0x1, "da0296de8193586a5512078dcd719eccecbd87e2b825ad4148c44f665dc87df21e5b49e21523a9ad993afdb6a30b4005"},
	} {
		start, err := hex.DecodeString(c.start)
		if err != nil {
			t.Fatal(err)
		}
		d := launch{[Size]byte(start)}
		d.sections(c.firmware, c.table)
		d.vmsas(c.vcpus, c.firmware.ResetEIP, signature(23, 1, 2), c.features)
		if hex.EncodeToString(d.digest[:]) != c.want {
			t.Errorf("%d vCPUs, features %#x, table %v: %x, want %s", c.vcpus, c.features, c.table != nil, d.digest, c.want)
		}
	}
}

func TestHashTableBytesEqualQEMUs(t *testing.T) {
	t.Parallel()
	const want = "06d63894224fc94cb479a793d411fd21a800" +
		"d82dd09720bd944caa78e7714d36ab2a32003722c888d9e8c6feb2037dc9b615afdb267755daa4a3bed6c9039fa17caa0bfc" +
		"31f7ba442f3ad74b9af141e29169781d3200ca17bed8bc4079637fa3d2a691a5174d7a4f6b9787b196222b7b18062755c99a" +
		"3794e74dd2ab7f42b835d5b172d2045b32004e72696f3eefb3b2375c36063864c2635cf3b8c85a83296a9cc30b0534c16f4d" + "0000000000000000"
	table := HashTable(sum("kernel-bytes"), sum("initrd-bytes"), "console=ttyS0 ro")
	if hex.EncodeToString(table[:]) != want {
		t.Errorf("table is %x", table)
	}
}

func TestWhatCannotBeMeasuredIsRefused(t *testing.T) {
	t.Parallel()
	kernel := &KernelDigests{}
	for name, in := range map[string]Input{
		"kernel without hash area": {Firmware: measuretest.Firmware(4096, false), Kernel: kernel, VCPUs: 1, CPUModel: "EPYC-v4"},
		"no vCPU":                  {Firmware: measuretest.Firmware(4096, true), VCPUs: 0, CPUModel: "EPYC-v4"},
		"too many vCPUs":           {Firmware: measuretest.Firmware(4096, true), VCPUs: 513, CPUModel: "EPYC-v4"},
		"unknown model":            {Firmware: measuretest.Firmware(4096, true), VCPUs: 1, CPUModel: "host"},
		"no firmware":              {VCPUs: 1, CPUModel: "EPYC-v4"},
	} {
		if _, err := Digest(in); err == nil {
			t.Errorf("%s is measured", name)
		}
	}
}

func TestGUIDsRoundTripMixedEndian(t *testing.T) {
	t.Parallel()
	var b [16]byte
	putGUID(b[:], guidHashes)
	if b[0] != 0x06 || b[15] != uuid.MustParse(guidHashes)[15] {
		t.Errorf("%x", b)
	}
}

func FuzzDigest(f *testing.F) {
	f.Add(measuretest.Firmware(4096, true))
	f.Add(measuretest.Firmware(4096, false))
	f.Fuzz(func(_ *testing.T, image []byte) {
		_, _ = Digest(Input{Firmware: image, Kernel: &KernelDigests{}, VCPUs: 2, CPUModel: "EPYC-v4", GuestFeatures: 1})
	})
}
