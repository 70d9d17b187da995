package lifecycle

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/api"
)

// Names in a guest's folder.
const (
	fileFirmware = "firmware"
	fileKernel   = "kernel"
	fileInitrd   = "initrd"
	fileConsole  = "console.log"
)

// copyBoot copies what the guest boots to its own folder, where nobody
// replaces it between being measured and being loaded. QEMU runs as another
// user: the folder can be passed through, the files be read.
func (g *guest) copyBoot(ctx context.Context, image admit.Image) error {
	dir := g.dir()
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clearing boot copies: %w", err)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil { //nolint:gosec // see above
		return fmt.Errorf("creating boot copies: %w", err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // whatever the umask is
		return fmt.Errorf("creating boot copies: %w", err)
	}
	copies, copiesCtx := errgroup.WithContext(ctx)
	for name, file := range map[string]contract.ImageFile{
		fileFirmware: image.Description.Firmware, fileKernel: image.Description.Kernel, fileInitrd: image.Description.Initrd,
	} {
		copies.Go(func() error {
			sum, err := copyFile(copiesCtx, filepath.Join(image.Dir, file.File), filepath.Join(dir, name))
			if err != nil {
				return err
			}
			if hex.EncodeToString(sum[:]) != file.SHA256 {
				return contract.Refuse("launch.image-changed", "install the guest image again on the host",
					"the image's %s is not the file its %s describes", name, contract.ImageDescriptionName)
			}
			return nil
		})
	}
	if err := copies.Wait(); err != nil {
		return err
	}
	if err := g.m.hook("inside:" + stepCopies); err != nil {
		return err
	}
	_, err := copyFile(ctx, filepath.Join(image.Dir, contract.ImageDescriptionName), filepath.Join(dir, contract.ImageDescriptionName))
	return err
}

// copyFile returns the digest of the copy, read back through the descriptor
// that wrote it.
func copyFile(ctx context.Context, from, to string) (sum [sha256.Size]byte, err error) {
	src, err := os.Open(from)
	if err != nil {
		return sum, fmt.Errorf("reading guest image: %w", err)
	}
	defer src.Close() //nolint:errcheck // read only
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return sum, fmt.Errorf("writing boot copy: %w", err)
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if _, err := io.Copy(dst, reader{ctx, src}); err != nil {
		return sum, fmt.Errorf("writing boot copy: %w", err)
	}
	if err := dst.Chmod(0o444); err != nil {
		return sum, fmt.Errorf("writing boot copy: %w", err)
	}
	if _, err := dst.Seek(0, io.SeekStart); err != nil {
		return sum, fmt.Errorf("reading boot copy back: %w", err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, reader{ctx, dst}); err != nil {
		return sum, fmt.Errorf("reading boot copy back: %w", err)
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// reader ends with its context.
type reader struct {
	ctx context.Context // lives for one copy
	io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// bootComponents are what the guest hands on to verifiers, from the command
// and the copies.
func (g *guest) bootComponents(cmd *api.LaunchGuest) (contract.BootComponents, error) {
	description, err := os.ReadFile(filepath.Join(g.dir(), contract.ImageDescriptionName))
	if err != nil {
		return contract.BootComponents{}, fmt.Errorf("reading boot copies: %w", err)
	}
	i, m := cmd.GetImage(), cmd.GetMachine()
	return contract.BootComponents{
		FirmwareSHA256: hex.EncodeToString(i.GetFirmwareSha256()), KernelSHA256: hex.EncodeToString(i.GetKernelSha256()),
		InitrdSHA256: hex.EncodeToString(i.GetInitrdSha256()), Cmdline: i.GetCmdline(), VCPUs: int(m.GetVcpus()),
		CPUModel: m.GetCpuModel(), GuestFeatures: m.GetGuestFeatures(), LaunchDigest: hex.EncodeToString(cmd.GetLaunchDigest()),
		Image: description,
	}, nil
}
