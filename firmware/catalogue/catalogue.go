// Package catalogue finds the firmware images of a host and says of each what
// it is: path, digest, build, reset vector, measured sections, and whether it
// can boot guests. It reads files and never changes one; it keeps no state and
// is safe for concurrent use. What the bytes mean is ovmf's to say.
package catalogue

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/ovmf"
)

// Entry is one firmware image.
type Entry struct {
	Path   string
	Size   int64
	SHA256 [sha256.Size]byte
	Build  ovmf.Build
	// Firmware is nil unless its SEV-SNP metadata is whole.
	Firmware *ovmf.Firmware
	// Refusal says why it cannot boot guests, nil when it can.
	Refusal *contract.Refusal
}

// Dirs are where distributions put firmware for QEMU, below root.
func Dirs(root string) []string {
	dirs := []string{"usr/share/ovmf", "usr/share/OVMF", "usr/share/qemu", "usr/share/edk2/ovmf", "usr/share/edk2/x64", "usr/local/share/ovmf"}
	for i, d := range dirs {
		dirs[i] = filepath.Join(root, d)
	}
	return dirs
}

// List returns the images in dirs and in the folders right below them, by
// path: every file whose name ends in .fd, each once however many names it
// has. Folders that do not exist hold none.
func List(dirs []string) ([]Entry, error) {
	var found []string
	for _, dir := range dirs {
		for _, pattern := range []string{"*.fd", "*/*.fd"} {
			files, err := filepath.Glob(filepath.Join(dir, pattern))
			if err != nil {
				return nil, fmt.Errorf("listing firmware in %s: %w", dir, err)
			}
			for _, file := range files {
				path, err := filepath.EvalSymlinks(file)
				if errors.Is(err, fs.ErrNotExist) {
					continue // removed meanwhile, or a link that leads nowhere
				}
				if err != nil {
					return nil, fmt.Errorf("listing firmware: %w", err)
				}
				found = append(found, path)
			}
		}
	}
	slices.Sort(found)
	entries := []Entry{}
	for _, path := range slices.Compact(found) {
		e, err := Inspect(path)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// Inspect reads one file. That it is no firmware is a finding, not an error.
func Inspect(path string) (Entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return Entry{}, fmt.Errorf("reading firmware: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return Entry{}, fmt.Errorf("reading firmware: %w", err)
	}
	if !info.Mode().IsRegular() {
		return Entry{}, fmt.Errorf("reading firmware: %s is not a regular file", path)
	}
	sum := sha256.New()
	image, err := readImage(io.TeeReader(f, sum), info.Size())
	if err != nil {
		return Entry{}, fmt.Errorf("reading firmware %s: %w", path, err)
	}
	rest, err := io.Copy(sum, f)
	if err != nil {
		return Entry{}, fmt.Errorf("reading firmware %s: %w", path, err)
	}
	e := Entry{Path: path, Size: int64(len(image)) + rest, SHA256: [sha256.Size]byte(sum.Sum(nil))}
	e.Build, e.Firmware, e.Refusal = ovmf.Describe(image)
	return e, nil
}

// Read reads an image whole; of one that is larger than any firmware, the
// beginning that shows it.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading firmware: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading firmware: %w", err)
	}
	image, err := readImage(f, info.Size())
	if err != nil {
		return nil, fmt.Errorf("reading firmware: %w", err)
	}
	return image, nil
}

// readImage reads at most one byte more than the largest image into memory
// that is taken once: the agent looks at images of several MiB again and again.
func readImage(r io.Reader, size int64) ([]byte, error) {
	image := bytes.NewBuffer(make([]byte, 0, min(size, ovmf.MaxSize+1)+bytes.MinRead))
	_, err := image.ReadFrom(io.LimitReader(r, ovmf.MaxSize+1))
	return image.Bytes(), err
}
