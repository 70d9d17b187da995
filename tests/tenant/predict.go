package tenant

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/measure"
)

// What a guest is started with unless the tenant says otherwise.
const (
	defaultCPUModel  = "EPYC-v4"
	defaultVCPUs     = 2
	defaultMemoryMiB = 2048
	guestFeatures    = 0x1     // SNP alone
	guestPolicy      = 0x30000 // SMT allowed, reserved bit 17, no debugging, no migration
)

// guestImage is the tenant's own copy of a guest image, its files verified
// against image.json.
type guestImage struct {
	desc     *contract.ImageDescription
	firmware []byte
	kernel   [sha256.Size]byte
	initrd   [sha256.Size]byte
}

// loadImage reads an image folder. image.json is the tenant's own and trusted;
// files that differ from it are refused.
func loadImage(dir string) (*guestImage, error) {
	data, err := readSmall(filepath.Join(dir, contract.ImageDescriptionName))
	if err != nil {
		return nil, fmt.Errorf("reading guest image: %w", err)
	}
	desc, err := contract.ParseImageDescription(data)
	if err != nil {
		return nil, err
	}
	image := &guestImage{desc: desc}
	if image.kernel, err = fileDigest(dir, desc.Kernel, io.Discard); err != nil {
		return nil, err
	}
	if image.initrd, err = fileDigest(dir, desc.Initrd, io.Discard); err != nil {
		return nil, err
	}
	firmware := &limitedBuffer{}
	if _, err = fileDigest(dir, desc.Firmware, firmware); err != nil {
		return nil, err
	}
	image.firmware = firmware.data
	return image, nil
}

// limitedBuffer holds a firmware image, which is never larger than 64 MiB.
type limitedBuffer struct{ data []byte }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	const limit = 64 << 20
	if len(b.data)+len(p) > limit {
		return 0, fmt.Errorf("firmware is larger than %d bytes", limit)
	}
	b.data = append(b.data, p...)
	return len(p), nil
}

func fileDigest(dir string, want contract.ImageFile, copyTo io.Writer) ([sha256.Size]byte, error) {
	var sum [sha256.Size]byte
	f, err := os.Open(filepath.Join(dir, want.File))
	if err != nil {
		return sum, fmt.Errorf("reading guest image: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	got, err := copyHashed(copyTo, f)
	if err != nil {
		return sum, fmt.Errorf("reading guest image: %s: %w", want.File, err)
	}
	if got.SHA256 != want.SHA256 || got.Size != want.Size {
		return sum, contract.Refuse("tenant.image-files-differ", "get the image again from where its description came from",
			"%s in the image folder is not the file that %s describes", want.File, contract.ImageDescriptionName)
	}
	raw, err := hex.DecodeString(got.SHA256)
	if err != nil {
		return sum, fmt.Errorf("reading guest image: %w", err)
	}
	return [sha256.Size]byte(raw), nil
}

// predict is the launch digest the silicon will report.
func (g *guestImage) predict(vcpus int, cpuModel string, features uint64) (string, error) {
	digest, err := measure.Digest(measure.Input{
		Firmware: g.firmware,
		Kernel:   &measure.KernelDigests{Kernel: g.kernel, Initrd: g.initrd, Cmdline: g.desc.Cmdline},
		VCPUs:    vcpus, CPUModel: cpuModel, GuestFeatures: features,
	})
	if err != nil {
		return "", fmt.Errorf("predicting launch digest: %w", err)
	}
	return hex.EncodeToString(digest[:]), nil
}
