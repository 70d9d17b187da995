package image_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/image"
	"github.com/confidential-node/agent/firmware/image/imagetest"
)

// The driver's modules: one needs a module of the kernel's, the other the first.
var (
	nvidia = string(imagetest.Object("nvidia", "drm"))
	uvm    = string(imagetest.Object("nvidia_uvm", "nvidia"))
)

// gpuFolder is what an image for GPUs is built with.
func gpuFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"helper": "the helper", "lib/ld-linux-x86-64.so.2": "the loader", "lib/libnvidia-ml.so.1": "NVML",
		"modules/list": "nvidia.ko\nnvidia-uvm.ko\n", "modules/nvidia.ko": nvidia, "modules/nvidia-uvm.ko": uvm,
		"firmware/nvidia/gsp.bin": "firmware",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestAnImageForGPUsHoldsTheirPartAndSaysSo(t *testing.T) {
	t.Parallel()
	plain, _ := build(t, nil)
	d, out := build(t, func(o *image.Options) { o.GPUDir = gpuFolder(t) })
	if plain.GPUEvidence || !d.GPUEvidence {
		t.Errorf("gpu_evidence is %t without and %t with the part for GPUs", plain.GPUEvidence, d.GPUEvidence)
	}
	if !strings.HasSuffix(d.Cmdline, " firmware_class.path=/gpu/firmware") || strings.Contains(plain.Cmdline, "firmware_class") {
		t.Errorf("command lines %q and %q", plain.Cmdline, d.Cmdline)
	}
	initrd, err := os.ReadFile(filepath.Join(out, image.InitrdName))
	if err != nil {
		t.Fatal(err)
	}
	files := imagetest.Unpack(t, initrd)
	for name, want := range map[string]string{
		"gpu/helper": "the helper", "gpu/lib/libnvidia-ml.so.1": "NVML", "gpu/firmware/nvidia/gsp.bin": "firmware",
		"modules/nvidia.ko": nvidia, "modules/nvidia_uvm.ko": uvm, image.GPUModulesList: "ecdh_generic.ko\ngcm.ko\nghash_generic.ko\ndrm.ko\nnvidia.ko\nnvidia_uvm.ko\n",
	} {
		if string(files[name]) != want {
			t.Errorf("%s is %q", name, files[name])
		}
	}
	if list := string(files[image.ModulesList]); !strings.HasSuffix(list, "sev_guest.ko\n") {
		t.Errorf("modules %q", list)
	}
	if n := len(d.Modules); d.Modules[n-1].File != "nvidia_uvm.ko" {
		t.Errorf("described modules end with %s", d.Modules[n-1].File)
	}
	again, _ := build(t, func(o *image.Options) { o.GPUDir = gpuFolder(t) })
	if again.Initrd.SHA256 != d.Initrd.SHA256 {
		t.Error("two builds differ")
	}
}

func TestAFolderForGPUsThatCannotBeRightIsRefused(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(dir string) error{
		"no helper":            func(dir string) error { return os.Remove(filepath.Join(dir, "helper")) },
		"helper is no program": func(dir string) error { return os.Chmod(filepath.Join(dir, "helper"), 0o644) },
		"a link": func(dir string) error {
			return os.Symlink("libnvidia-ml.so.1", filepath.Join(dir, "lib/libnvidia-ml.so"))
		},
		"a module is missing": func(dir string) error { return os.Remove(filepath.Join(dir, "modules/nvidia.ko")) },
		"a module nobody loads": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "modules/list"), []byte("nvidia.ko"), 0o600)
		},
		"a module before what it needs": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "modules/list"), []byte("nvidia-uvm.ko\nnvidia.ko"), 0o600)
		},
		"a module needs what is nowhere": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "modules/nvidia.ko"), imagetest.Object("nvidia", "ipmi"), 0o600)
		},
		"what is no module": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "modules/nvidia.ko"), []byte("driver"), 0o600)
		},
		"no folder": os.RemoveAll,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := imagetest.Inputs(t)
			o.OutDir, o.GPUDir = filepath.Join(t.TempDir(), "out"), gpuFolder(t)
			if err := spoil(o.GPUDir); err != nil {
				t.Fatal(err)
			}
			if _, err := image.Build(t.Context(), o); err == nil {
				t.Error("built")
			}
		})
	}
}
