// Package inputs turns sealed block devices into plaintext files: every
// ciphertext is copied to private memory, bounded by the manifest's exact size
// and compared with its digest, and nothing is used before all of it holds.
// The host can change a device at any time, so no byte is read from one twice.
package inputs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/sealed"
)

// serialLength is where virtio-blk cuts a serial (virtio 1.2, 5.2.6.1).
const serialLength = 20

// shareNumerator over shareDenominator is the part of memory that ciphertext
// and plaintext together may take. The rest is for the workload.
const (
	shareNumerator   = 60
	shareDenominator = 100
)

const redeploy = "deploy again; if it repeats, report the node"

// Budget refuses inputs that would not leave the workload room. While an input
// is opened, ciphertext and plaintext are both in memory.
func Budget(list []contract.Input, memory uint64) error {
	share := memory / shareDenominator * shareNumerator
	var total uint64
	for _, in := range list {
		total += uint64(in.Size)
		if total > share/2 {
			return contract.Refuse("guest.out-of-memory", "give the guest more memory: at least twice the inputs' size divided by 0.6",
				"the inputs need more than %d%% of the guest's %d MiB of memory while they are opened", shareNumerator, memory>>20)
		}
	}
	return nil
}

// Disks finds block devices by serial.
type Disks struct {
	// Sys is /sys/block, Dev is /dev.
	Sys, Dev string
}

// Find returns the path of the device that says it carries the input.
func (d Disks) Find(in contract.Input) (string, error) {
	want := in.SHA256[:serialLength]
	names, err := filepath.Glob(filepath.Join(d.Sys, "*", "serial"))
	if err != nil {
		return "", fmt.Errorf("listing disks: %w", err)
	}
	for _, file := range names {
		serial, err := os.ReadFile(file)
		if err == nil && strings.TrimRight(string(serial), "\n\x00 ") == want {
			return filepath.Join(d.Dev, filepath.Base(filepath.Dir(file))), nil
		}
	}
	return "", contract.Refuse("guest.input-missing", redeploy, "no disk carries input %s", in.Name)
}

// Copy reads exactly the input's size from a device into a new file and
// compares the digest.
func Copy(ctx context.Context, device string, in contract.Input, path string) (err error) {
	src, err := os.Open(device)
	if err != nil {
		return fmt.Errorf("opening disk of input %s: %w", in.Name, err)
	}
	defer src.Close() //nolint:errcheck // only read from
	dst, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("making file of input %s: %w", in.Name, err)
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(dst, sum), io.LimitReader(contextReader{ctx, src}, in.Size))
	if err != nil {
		return memoryError(in, fmt.Errorf("copying input %s: %w", in.Name, err))
	}
	if n != in.Size || hex.EncodeToString(sum.Sum(nil)) != in.SHA256 {
		return contract.Refuse("guest.input-digest-mismatch", redeploy, "input %s is not the one in the manifest", in.Name)
	}
	return nil
}

// Open decrypts a verified ciphertext into a new file that everybody in the
// guest may read.
func Open(ctx context.Context, sealedPath string, in contract.Input, key []byte, path string) (err error) {
	src, err := os.Open(sealedPath)
	if err != nil {
		return fmt.Errorf("opening input %s: %w", in.Name, err)
	}
	defer src.Close() //nolint:errcheck // only read from
	if err := sealed.CheckHeader(src); err != nil {
		return contract.Refuse("guest.input-format", "seal the input with age for an X25519 or hybrid recipient", "input %s is not a sealed file this guest opens", in.Name).Because(err)
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("opening input %s: %w", in.Name, err)
	}
	identity, err := sealed.IdentityFromKey(key)
	if err != nil {
		return contract.Refuse("guest.input-key", "register the key the input was sealed with", "the key of input %s is not usable", in.Name).Because(err)
	}
	plain, err := age.Decrypt(contextReader{ctx, src}, identity)
	if err != nil {
		return contract.Refuse("guest.input-key", "register the key the input was sealed with", "the released key does not open input %s", in.Name).Because(err)
	}
	dst, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("making file of input %s: %w", in.Name, err)
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if _, err := io.Copy(dst, plain); err != nil {
		return memoryError(in, contract.Refuse("guest.input-damaged", "seal the input again", "input %s does not decrypt to its end", in.Name).Because(err))
	}
	return nil
}

// memoryError names the one cause of a failed write that is the tenant's to
// mend.
func memoryError(in contract.Input, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
		return contract.Refuse("guest.out-of-memory", "give the guest more memory", "input %s does not fit the guest's memory", in.Name).Because(err)
	}
	return err
}

// contextReader ends a copy when ctx ends.
type contextReader struct {
	ctx context.Context //nolint:containedctx // lives for one copy
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// Store opens all inputs of a manifest.
type Store struct {
	Disks Disks
	// Private takes the ciphertexts, Plain the opened inputs. Both lie in
	// memory.
	Private, Plain string
}

// Verify copies every input and compares it. It returns when all hold.
func (s Store) Verify(ctx context.Context, list []contract.Input) error {
	for _, in := range list {
		device, err := s.Disks.Find(in)
		if err != nil {
			return err
		}
		if err := Copy(ctx, device, in, s.sealed(in)); err != nil {
			return err
		}
	}
	return nil
}

// Open decrypts every verified input and removes its ciphertext. key is asked
// once per input; what it returns is wiped.
func (s Store) Open(ctx context.Context, list []contract.Input, key func(context.Context, contract.Input) ([]byte, error)) error {
	for _, in := range list {
		secret, err := key(ctx, in)
		if err != nil {
			return err
		}
		err = Open(ctx, s.sealed(in), in, secret, filepath.Join(s.Plain, in.Name))
		clear(secret)
		if err != nil {
			return err
		}
		if err := os.Remove(s.sealed(in)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing ciphertext of input %s: %w", in.Name, err)
		}
	}
	return nil
}

func (s Store) sealed(in contract.Input) string { return filepath.Join(s.Private, in.Name+".age") }
