package tenant

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
)

// Reporter shows progress. Both methods are called from one goroutine.
type Reporter interface {
	// Step says what begins now, in a few words.
	Step(text string)
	// Transfer returns where the bytes of a transfer are counted; total is
	// -1 when it is not known. It is closed when the transfer ends.
	Transfer(label string, total int64) io.WriteCloser
}

// Sealed is the ciphertext of one file.
type Sealed struct {
	SHA256 string
	Size   int64
}

// Seal encrypts src to the recipients and writes the ciphertext to dst.
func Seal(dst io.Writer, src io.Reader, recipients ...age.Recipient) (Sealed, error) {
	hash := sha256.New()
	count := &counter{w: io.MultiWriter(dst, hash)}
	w, err := age.Encrypt(count, recipients...)
	if err != nil {
		return Sealed{}, fmt.Errorf("sealing: %w", err)
	}
	if _, err := io.Copy(w, src); err != nil {
		return Sealed{}, fmt.Errorf("sealing: %w", err)
	}
	if err := w.Close(); err != nil {
		return Sealed{}, fmt.Errorf("sealing: %w", err)
	}
	return Sealed{hex.EncodeToString(hash.Sum(nil)), count.n}, nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// sealedFile is ciphertext in a temporary file.
type sealedFile struct {
	Sealed
	file *os.File
}

// sealToTemp seals src into an unlinked-on-close file below dir. Only
// ciphertext reaches the disk.
func sealToTemp(dir string, src io.Reader, recipient age.Recipient) (*sealedFile, error) {
	f, err := os.CreateTemp(dir, "sealing-*.age")
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	out := &sealedFile{file: f}
	if out.Sealed, err = Seal(f, src, recipient); err != nil {
		return nil, errors.Join(err, out.Close())
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(fmt.Errorf("sealing: %w", err), out.Close())
	}
	return out, nil
}

// Close removes the file.
func (s *sealedFile) Close() error { return errors.Join(s.file.Close(), os.Remove(s.file.Name())) }

// SealFile seals the file src (or stdin, when src is "-") into the new file
// dst under a data key given as file://PATH.
func SealFile(src, dst, keyURL string, stdin io.Reader, report Reporter) (sealed Sealed, err error) {
	key, err := readKeyURL(keyURL)
	if err != nil {
		return Sealed{}, err
	}
	in, total := stdin, int64(-1)
	if src != "-" {
		f, err := os.Open(src)
		if err != nil {
			return Sealed{}, fmt.Errorf("sealing: %w", err)
		}
		defer f.Close() //nolint:errcheck // only read from
		info, err := f.Stat()
		if err != nil {
			return Sealed{}, fmt.Errorf("sealing: %w", err)
		}
		in, total = f, info.Size()
	}
	if in, err = checkPlain(src, in); err != nil {
		return Sealed{}, err
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return Sealed{}, contract.Refuse("tenant.file-conflict", "choose another --out, or remove the file", "file %s exists and is not overwritten", dst)
	}
	if err != nil {
		return Sealed{}, fmt.Errorf("sealing: %w", err)
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			err = errors.Join(err, os.Remove(dst))
		}
	}()
	bar := report.Transfer("sealing "+filepath.Base(src), total)
	defer bar.Close() //nolint:errcheck // a bar that stays is no error
	if sealed, err = Seal(out, io.TeeReader(in, bar), key.recipient); err != nil {
		return Sealed{}, err
	}
	return sealed, out.Sync()
}

// copyHashed copies r to w and returns digest and size.
func copyHashed(w io.Writer, r io.Reader) (Sealed, error) {
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, hash), r)
	return Sealed{hex.EncodeToString(hash.Sum(nil)), n}, err
}

// summer hashes what is read through it.
type summer struct {
	io.Reader
	hash hash.Hash
}

func newSummer(r io.Reader) *summer {
	h := sha256.New()
	return &summer{io.TeeReader(r, h), h}
}

// sum is the digest of what was read so far.
func (s *summer) sum() string { return hex.EncodeToString(s.hash.Sum(nil)) }
