package measure

import (
	"crypto/sha512"
	"testing"

	"github.com/confidential-node/agent/firmware/measure/measuretest"
	"github.com/confidential-node/agent/firmware/ovmf"
)

// benchSize is the size of an AmdSev OVMF image.
const benchSize = 4 << 20

// BenchmarkDigest against BenchmarkBareSHA384 of the same pages shows what
// the digest costs beyond hashing its input.
func BenchmarkDigest(b *testing.B) {
	image := measuretest.Firmware(benchSize, true)
	b.SetBytes(benchSize)
	for b.Loop() {
		if _, err := Digest(Input{Firmware: image, Kernel: &KernelDigests{}, VCPUs: 8, CPUModel: "EPYC-v4", GuestFeatures: 1}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBareSHA384(b *testing.B) {
	image := measuretest.Firmware(benchSize, true)
	b.SetBytes(benchSize)
	for b.Loop() {
		for off := 0; off < len(image); off += ovmf.PageSize {
			sha512.Sum384(image[off : off+ovmf.PageSize])
		}
	}
}
