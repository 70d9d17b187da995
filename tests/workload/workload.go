// Package workload packs the program of cmd/workload as an OCI image, the
// same bytes from the same binary. For demo and tests only; it owns no state.
package workload

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// BuildImage returns an image of one layer with the binary as its entrypoint.
func BuildImage(binary []byte) (v1.Image, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "workload", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(binary))}); err != nil {
		return nil, fmt.Errorf("packing workload: %w", err)
	}
	if _, err := w.Write(binary); err != nil {
		return nil, fmt.Errorf("packing workload: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("packing workload: %w", err)
	}
	packed, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return nil, fmt.Errorf("packing workload: %w", err)
	}
	image, err := mutate.AppendLayers(empty.Image, packed)
	if err != nil {
		return nil, fmt.Errorf("packing workload: %w", err)
	}
	return mutate.Config(image, v1.Config{Entrypoint: []string{"/workload"}, Cmd: []string{"batch"}})
}
