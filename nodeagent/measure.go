package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/nodeagent/output"
)

// maxFirmwareBytes bounds the firmware image read into memory; the parser
// refuses anything above 16 MiB itself.
const maxFirmwareBytes = 16<<20 + 1

// launchDigest is the document of `nodeagent measure`.
type launchDigest struct {
	output.Header
	LaunchDigest   string `json:"launch_digest"`
	FirmwareSHA256 string `json:"firmware_sha256"`
	KernelSHA256   string `json:"kernel_sha256,omitempty"`
	InitrdSHA256   string `json:"initrd_sha256,omitempty"`
	Cmdline        string `json:"cmdline,omitempty"`
	VCPUs          int    `json:"vcpus"`
	CPUModel       string `json:"cpu_model"`
	GuestFeatures  string `json:"guest_features"`
	// IDBlock is there with --id-block.
	IDBlock *signedIDBlock `json:"id_block,omitempty"`
}

type measureFlags struct {
	firmware, kernel, initrd, cmdline, cpuModel, features string
	vcpus                                                 int
	idBlock                                               idBlockFlags
}

func newMeasureCommand() *cobra.Command {
	var format output.Format
	var f measureFlags
	cmd := &cobra.Command{
		Use:   "measure --firmware FILE [--kernel FILE [--initrd FILE] [--cmdline TEXT]] --vcpus N",
		Short: "Predict the launch digest of a guest from its files",
		Long: `Predict the SEV-SNP launch digest (field MEASUREMENT of the report) that a guest of
these very files gets under QEMU. Memory size, devices and ACPI are not part of it.

With --id-block also sign an ID block for it, as the image's publisher: the firmware
then starts nothing else under it, and every report of the guest carries the digest of
the ID key, and of the author key that vouches for it, for verifiers to pin. The launch
command takes block and auth as id_block and id_auth; the agent itself signs nothing.`,
		Example: "  nodeagent measure --firmware OVMF.amdsev.fd --kernel vmlinuz --initrd initrd.img --cmdline 'quiet' --vcpus 4\n" +
			"  nodeagent measure --firmware OVMF.amdsev.fd --kernel vmlinuz --initrd initrd.img --cmdline 'quiet' --vcpus 4 --id-block --id-key image.pem --author-key author.pem -o json",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.idBlock.check(cmd); err != nil {
				return err
			}
			doc, err := predict(f)
			if err != nil {
				return err
			}
			return format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, doc.LaunchDigest)
				if doc.IDBlock != nil {
					doc.IDBlock.table(w)
				}
				return err
			})
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "how to print")
	cmd.Flags().StringVar(&f.firmware, "firmware", "", "OVMF image, AmdSev build")
	cmd.Flags().StringVar(&f.kernel, "kernel", "", "kernel image; without it no kernel is measured")
	cmd.Flags().StringVar(&f.initrd, "initrd", "", "initial RAM disk")
	cmd.Flags().StringVar(&f.cmdline, "cmdline", "", "exact kernel command line")
	cmd.Flags().IntVar(&f.vcpus, "vcpus", 0, "number of vCPUs, 1 to 512")
	cmd.Flags().StringVar(&f.cpuModel, "cpu-model", "EPYC-v4", "QEMU CPU model")
	cmd.Flags().StringVar(&f.features, "guest-features", "0x1", "SEV_FEATURES of the VMSA")
	f.idBlock.register(cmd)
	return cmd
}

func predict(f measureFlags) (launchDigest, error) {
	if f.firmware == "" || f.vcpus == 0 {
		return launchDigest{}, usageError("--firmware and --vcpus are required")
	}
	if f.kernel == "" && (f.initrd != "" || f.cmdline != "") {
		return launchDigest{}, usageError("--initrd and --cmdline need --kernel: without a kernel nothing of them is measured")
	}
	features, err := strconv.ParseUint(f.features, 0, 64)
	if err != nil {
		return launchDigest{}, usageError("--guest-features %q is not a number", f.features)
	}
	firmware, err := readLimited(f.firmware, maxFirmwareBytes)
	if err != nil {
		return launchDigest{}, err
	}
	in := measure.Input{Firmware: firmware, VCPUs: f.vcpus, CPUModel: f.cpuModel, GuestFeatures: features}
	sum := sha256.Sum256(firmware)
	doc := launchDigest{
		Header: output.NewHeader("LaunchDigest"), FirmwareSHA256: hex.EncodeToString(sum[:]),
		Cmdline: f.cmdline, VCPUs: f.vcpus, CPUModel: f.cpuModel, GuestFeatures: fmt.Sprintf("%#x", features),
	}
	if f.kernel != "" {
		kernel := measure.KernelDigests{Initrd: sha256.Sum256(nil), Cmdline: f.cmdline}
		if kernel.Kernel, err = hashFile(f.kernel); err != nil {
			return launchDigest{}, err
		}
		if f.initrd != "" {
			if kernel.Initrd, err = hashFile(f.initrd); err != nil {
				return launchDigest{}, err
			}
		}
		in.Kernel = &kernel
		doc.KernelSHA256, doc.InitrdSHA256 = hex.EncodeToString(kernel.Kernel[:]), hex.EncodeToString(kernel.Initrd[:])
	}
	digest, err := measure.Digest(in)
	if err != nil {
		return launchDigest{}, fmt.Errorf("measuring %s: %w", f.firmware, err)
	}
	doc.LaunchDigest = hex.EncodeToString(digest[:])
	if f.idBlock.wanted {
		if doc.IDBlock, err = f.idBlock.sign(digest); err != nil {
			return launchDigest{}, fmt.Errorf("signing ID block: %w", err)
		}
	}
	return doc, nil
}

func hashFile(name string) (sum [sha256.Size]byte, err error) {
	file, err := openNamed(name)
	if err != nil {
		return sum, err
	}
	defer file.Close() //nolint:errcheck // read only
	h := sha256.New()
	if _, err := io.Copy(h, file); err != nil {
		return sum, fmt.Errorf("hashing %s: %w", name, err)
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// openNamed opens a file that the user or the configuration named.
func openNamed(name string) (*os.File, error) {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w; check the path", err)
	}
	return file, err
}

// readLimited reads a file of at most limit bytes whole.
func readLimited(name string, limit int64) ([]byte, error) {
	file, err := openNamed(name)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("reading %s: larger than %d bytes", name, limit)
	}
	return data, nil
}
