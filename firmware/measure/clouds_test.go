package measure

import (
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"testing"

	"github.com/confidential-node/agent/firmware/ovmf"
)

// cloud is how somebody else than QEMU launches. The product predicts none of
// these; that their published digests come out too says that the chaining is
// right beyond the one flow it has.
type cloud struct {
	cpuidLast bool
	memory    byte // page type of SNP memory sections
	rdx       uint64
	pat       uint64
	// attributes of ss, tr and the boot processor's cs
	ss, tr, bootCS uint16
}

const pageUnmeasured = 4

func (c cloud) save(eip uint32, boot bool, features uint64) (page [ovmf.PageSize]byte) {
	page = vmsa(eip, 0, features)
	binary.LittleEndian.PutUint16(page[0x22:], c.ss)
	binary.LittleEndian.PutUint16(page[0x92:], c.tr)
	if boot {
		binary.LittleEndian.PutUint16(page[0x12:], c.bootCS)
	}
	binary.LittleEndian.PutUint64(page[0x268:], c.pat)
	binary.LittleEndian.PutUint64(page[0x310:], c.rdx)
	binary.LittleEndian.PutUint32(page[0x408:], 0)
	binary.LittleEndian.PutUint16(page[0x410:], 0)
	return page
}

func (c cloud) digest(start [Size]byte, f *ovmf.Firmware, table *[ovmf.HashTableSize]byte, vcpus int, features uint64) [Size]byte {
	d := launch{start}
	var last []ovmf.Section
	for _, s := range f.Sections {
		one := *f
		one.Sections = []ovmf.Section{s}
		switch {
		case s.Type == ovmf.SectionCPUID && c.cpuidLast:
			last = append(last, s)
		case s.Type == ovmf.SectionSNPMemory:
			for off := uint32(0); off < s.Size; off += ovmf.PageSize {
				d.extend(c.memory, uint64(s.GPA+off), [Size]byte{})
			}
		default:
			d.sections(&one, table)
		}
	}
	rest := *f
	rest.Sections = last
	d.sections(&rest, table)
	for i := range vcpus {
		page := c.save(f.ResetEIP, false, features)
		if i == 0 {
			page = c.save(0xFFFFFFF0, true, features)
		}
		d.extend(pageVMSA, gpaVMSA, sha512.Sum384(page[:]))
	}
	return d.digest
}

func TestOtherLaunchFlowsMatchTheirPublishedVectors(t *testing.T) {
	t.Parallel()
	amdSev, x64 := fixtures()
	other := &ovmf.Firmware{ResetEIP: 0x80b004, Sections: append(x64.Sections[:4:4], ovmf.Section{GPA: 0x80f000, Size: 0x11000, Type: 1})}
	empty := HashTable(sum(""), sum(""), "")
	ec2 := cloud{cpuidLast: true, memory: pageZero, rdx: 0x600, pat: 0x0007040600070406, ss: 0x92, tr: 0x83, bootCS: 0x9a}
	older := ec2
	older.rdx = 0
	gce := cloud{memory: pageUnmeasured, rdx: 0x600, pat: 0x00070106, ss: 0x93, tr: 0x8b, bootCS: 0x9b}
	for _, c := range []struct {
		name     string
		flow     cloud
		start    string
		firmware *ovmf.Firmware
		table    *[ovmf.HashTableSize]byte
		vcpus    int
		features uint64
		want     string
	}{
		{"EC2", ec2, amdSevStart, amdSev, &empty, 1, 0x21, "0ce9ccc06bab55eebe8abc234f3df6514883977a68a591b71052498ab52b2f1aa415db338033946ef93aa8278c0d67fb"},
		{"EC2", ec2, amdSevStart, amdSev, &empty, 1, 0x1, "0883bd0eeb716e65b7b977a321c278d1e51b33b5c655fab985443bbcc65c086b9c15e8a0bd8811050dec7e24964e5056"},
		{"EC2, older tools", older, amdSevStart, amdSev, &empty, 1, 0x21, "6ae80856486b1396af8c82a40351d6ed76a20c785e9c7fa4ffa27c22d5d6313b4b3b458cd3c9968e6f89fb5d8450d7a6"},
		{"EC2, older tools", older, amdSevStart, amdSev, &empty, 1, 0x1, "7d3756157c805bf6adf617064c8552e8c1688fa1c8756f11cbf56ba5d25c9270fb69c0505c1cbe1c5c66c0e34c6ed3be"},
		{"GCE", gce, amdSevStart, amdSev, &empty, 1, 0x1, "5da7106cf14cf46b1725ebab123eb9e53bd46a1e9f400cd0c08e7827b04b688ea8b4e403c8404efed4397ea5d5d0722e"},
		{"GCE", gce, amdSevStart, amdSev, &empty, 4, 0x1, "5c5debf100fc339f90276e761ee1f1658d08922c3b20e2a2e6c7a6c3370b2452a15a00eae11886a93d6fd1e7ab81e29d"},
		{"EC2, two vCPUs", older, "a58211791a556a630a4319dc9e2ea96cc0e9784dd9f20a4fadf81b26c98d163fcdcb6703884bbbb80d7b1de45b3d84d0", other, nil, 2, 0x1, "4c6e33087d08fa770259484dddbef367086a15c3e2cf10038dc97229d39c942671c2e22b300178f8de594a3f2fa59303"},
		{"EC2, two vCPUs", older, "2027a27bb9f7acfd280e4c7bd68a73973b94bf0756e5b282e004b9395f597b8d0eb4defa7d8f6549375aa4d2b146f0f3", other, nil, 2, 0x1, "c2c84b9364fc9f0f54b04534768c860c6e0e386ad98b96e8b98eca46ac8971d05c531ba48373f054c880cfd1f4a0a84e"},
	} {
		start, err := hex.DecodeString(c.start)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.flow.digest([Size]byte(start), c.firmware, c.table, c.vcpus, c.features); hex.EncodeToString(got[:]) != c.want {
			t.Errorf("%s, %d vCPUs, features %#x: %x, want %s", c.name, c.vcpus, c.features, got, c.want)
		}
	}
}
