package measure

import (
	"crypto/sha512"
	"fmt"
	"os"
	"testing"

	"github.com/confidential-node/agent/firmware/measure/measuretest"
	"github.com/confidential-node/agent/firmware/ovmf"
)

// benchFirmware is the real AmdSev image where the checkout has one beside
// it, else one of the same size.
func benchFirmware(b *testing.B) []byte {
	b.Helper()
	image, err := os.ReadFile("../../../shared/data/firmware/OVMF.amdsev.fd")
	if err != nil {
		b.Log("no real image beside the checkout: measuring one made for tests")
		return measuretest.Firmware(4<<20, true)
	}
	return image
}

// otherPages are measured besides the firmware's: kernel hashes, the first
// vCPU's save area, and the one that all other vCPUs share.
func otherPages(vcpus int) int { return 1 + min(vcpus, 2) }

// BenchmarkDigest against BenchmarkBareSHA384 of the same pages shows what the
// digest costs beyond hashing its input.
func BenchmarkDigest(b *testing.B) {
	image := benchFirmware(b)
	for _, vcpus := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("vcpus=%d", vcpus), func(b *testing.B) {
			b.SetBytes(int64(len(image) + otherPages(vcpus)*ovmf.PageSize))
			in := Input{Firmware: image, Kernel: &KernelDigests{}, VCPUs: vcpus, CPUModel: "EPYC-v4", GuestFeatures: 1}
			for b.Loop() {
				if _, err := Digest(in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkBareSHA384(b *testing.B) {
	image := benchFirmware(b)
	pages := append(image, make([]byte, otherPages(2)*ovmf.PageSize)...)
	b.SetBytes(int64(len(pages)))
	for b.Loop() {
		for off := 0; off < len(pages); off += ovmf.PageSize {
			sha512.Sum384(pages[off : off+ovmf.PageSize])
		}
	}
}
