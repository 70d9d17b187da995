package workload_test

import (
	"archive/tar"
	"io"
	"slices"
	"testing"

	"github.com/confidential-node/agent/tests/workload"
)

func TestTheSameBinaryIsAlwaysTheSameImage(t *testing.T) {
	t.Parallel()
	digest := func(binary string) string {
		image, err := workload.BuildImage([]byte(binary))
		if err != nil {
			t.Fatal(err)
		}
		d, err := image.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d.String()
	}
	if first, second := digest("program"), digest("program"); first != second || first == digest("other") {
		t.Error("an image does not stand for its binary")
	}
}

func TestTheImageRunsTheBinary(t *testing.T) {
	t.Parallel()
	image, err := workload.BuildImage([]byte("program"))
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil || !slices.Equal(config.Config.Entrypoint, []string{"/workload"}) || !slices.Equal(config.Config.Cmd, []string{"batch"}) {
		t.Fatalf("%+v %v", config, err)
	}
	layers, err := image.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close() //nolint:errcheck // only read from
	archive := tar.NewReader(content)
	entry, err := archive.Next()
	if err != nil || entry.Name != "workload" || entry.Mode != 0o755 {
		t.Fatalf("%+v %v", entry, err)
	}
	if binary, err := io.ReadAll(archive); err != nil || string(binary) != "program" {
		t.Errorf("%q %v", binary, err)
	}
}
