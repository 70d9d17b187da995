package rootfs

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds what a zstd stream makes its reader keep; 128 MiB is what
// the tool's long mode asks for by default (RFC 8878, section 3.1.1.1.2, asks
// for 8 MiB at least).
const maxWindow = 128 << 20

// sourceError is an error of the registry's bytes, not of what is in them.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// source marks errors of the registry.
type source struct{ io.Reader }

func (s source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = &sourceError{err}
	}
	return n, err
}

// bounded ends a stream that is longer than what remains of all layers'
// budget: it counts what an archive makes its reader go through, files or not.
type bounded struct {
	io.Reader
	left *int64
}

func (b bounded) Read(p []byte) (int, error) {
	if *b.left <= 0 {
		return 0, fmt.Errorf("%w: it is many times larger unpacked than the image's files", errMalformed)
	}
	n, err := b.Reader.Read(p[:min(int64(len(p)), *b.left)])
	*b.left -= int64(n)
	return n, err
}

// decompress reads a layer as what its first bytes say it is: media types of
// registries are not reliable, and the digest is the compressed bytes'.
func decompress(r io.Reader) (io.Reader, func(), error) {
	in := bufio.NewReader(source{r})
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}): // RFC 1952
		z, err := gzip.NewReader(in)
		return z, func() {}, err
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}): // RFC 8878
		z, err := zstd.NewReader(in, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return in, func() {}, nil
}
