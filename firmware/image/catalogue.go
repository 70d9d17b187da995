package image

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

	"github.com/confidential-node/agent/firmware/contract"
)

// ErrChanged means that a file is not the one image.json describes.
var ErrChanged = errors.New("file differs from image.json")

// Entry is one image of a catalogue.
type Entry struct {
	// Dir is the image's folder, Description its image.json, Raw the bytes of
	// that.
	Dir         string
	Description *contract.ImageDescription
	Raw         []byte
}

// LoadCatalogue reads the description of every image in dirs: folders with an
// image.json, or folders of such folders. The files themselves are compared
// when they are read. A folder that does not exist holds no images; a
// description that cannot be read is an error.
func LoadCatalogue(dirs []string) ([]Entry, error) {
	var out []Entry
	for _, dir := range dirs {
		found := []string{filepath.Join(dir, contract.ImageDescriptionName)}
		below, err := filepath.Glob(filepath.Join(dir, "*", contract.ImageDescriptionName))
		if err != nil {
			return nil, fmt.Errorf("listing images in %s: %w", dir, err)
		}
		for _, file := range append(found, below...) {
			e, err := load(file)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			out = append(out, e)
		}
	}
	return out, nil
}

func load(file string) (Entry, error) {
	f, err := os.Open(file)
	if err != nil {
		return Entry{}, fmt.Errorf("reading image description: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	raw, err := io.ReadAll(io.LimitReader(f, contract.MaxImageDescriptionBytes+1))
	if err != nil {
		return Entry{}, fmt.Errorf("reading image description: %w", err)
	}
	d, err := contract.ParseImageDescription(raw)
	if err != nil {
		return Entry{}, fmt.Errorf("reading %s: %w", file, err)
	}
	return Entry{filepath.Dir(file), d, raw}, nil
}

// Find returns the image that consists of exactly these parts. Digests are
// hexadecimal.
func Find(list []Entry, firmware, kernel, initrd, cmdline string) (Entry, bool) {
	for _, e := range list {
		d := e.Description
		if d.Firmware.SHA256 == firmware && d.Kernel.SHA256 == kernel && d.Initrd.SHA256 == initrd && d.Cmdline == cmdline {
			return e, true
		}
	}
	return Entry{}, false
}

// Open opens one of the image's files. Reading it to its end fails with
// ErrChanged unless size and digest are the description's; what was read
// before is not to be used.
func (e Entry) Open(f contract.ImageFile) (io.ReadCloser, error) {
	file, err := os.Open(filepath.Join(e.Dir, f.File))
	if err != nil {
		return nil, fmt.Errorf("opening image file: %w", err)
	}
	return &verified{file: file, want: f, sum: sha256.New()}, nil
}

// Verify reads every file of the image and compares it.
func (e Entry) Verify() error {
	for _, f := range []contract.ImageFile{e.Description.Firmware, e.Description.Kernel, e.Description.Initrd} {
		r, err := e.Open(f)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r)
		if err := errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	return nil
}

// verified compares size and digest at the end of a file.
type verified struct {
	file *os.File
	want contract.ImageFile
	sum  hash.Hash
	size int64
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.file.Read(p)
	v.sum.Write(p[:n])
	v.size += int64(n)
	if v.size > v.want.Size || (errors.Is(err, io.EOF) && (v.size != v.want.Size || hex.EncodeToString(v.sum.Sum(nil)) != v.want.SHA256)) {
		return 0, fmt.Errorf("%w: %s", ErrChanged, v.want.File)
	}
	return n, err
}

func (v *verified) Close() error { return v.file.Close() }
