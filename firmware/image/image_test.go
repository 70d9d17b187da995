package image_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image"
	"github.com/confidential-node/agent/firmware/image/imagetest"
)

func build(t *testing.T, change func(*image.Options)) (*contract.ImageDescription, string) {
	t.Helper()
	o := imagetest.Inputs(t)
	o.OutDir = filepath.Join(t.TempDir(), "out")
	if change != nil {
		change(&o)
	}
	d, err := image.Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return d, o.OutDir
}

func TestTwoBuildsGiveTheSameBytes(t *testing.T) {
	t.Parallel()
	_, a := build(t, nil)
	_, b := build(t, nil)
	for _, name := range []string{image.FirmwareName, image.KernelName, image.InitrdName, contract.ImageDescriptionName} {
		one, errA := os.ReadFile(filepath.Join(a, name))
		two, errB := os.ReadFile(filepath.Join(b, name))
		if err := errors.Join(errA, errB); err != nil {
			t.Fatal(err)
		}
		if len(one) == 0 || !bytes.Equal(one, two) {
			t.Errorf("%s differs between two builds", name)
		}
	}
}

func TestVariantsMeasureDifferently(t *testing.T) {
	t.Parallel()
	production, _ := build(t, nil)
	debug, _ := build(t, func(o *image.Options) { o.Variant = contract.VariantDebug })
	emulated, _ := build(t, func(o *image.Options) { o.Emulated = true })
	if production.Cmdline == debug.Cmdline {
		t.Error("the debug variant has production's command line")
	}
	if production.Initrd.SHA256 == emulated.Initrd.SHA256 {
		t.Error("the emulated image has the same modules as the real one")
	}
	if strings.Contains(production.Cmdline, "ttyS") || !strings.Contains(production.Cmdline, "console=null") {
		t.Errorf("production has a console: %s", production.Cmdline)
	}
	for _, d := range []*contract.ImageDescription{production, debug, emulated} {
		if d.AMLDefence {
			t.Errorf("%s claims a defence against ACPI code that no kernel here has", d.Variant)
		}
		if d.AMLDefence {
			t.Error("a stock kernel is said to have an AML defence")
		}
	}
	if !emulated.Emulated || production.Emulated {
		t.Error("emulation is not told")
	}
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	t.Parallel()
	d, dir := build(t, nil)
	var order []string
	for _, m := range d.Modules {
		order = append(order, m.File)
	}
	want := []string{"failover.ko", "net_failover.ko", "virtio_net.ko", "virtio_blk.ko", "button.ko", "configfs.ko", "tsm.ko", "sev_guest.ko"}
	if !slices.Equal(order, want) {
		t.Errorf("modules %v, want %v", order, want)
	}
	initrd, err := os.ReadFile(filepath.Join(dir, image.InitrdName))
	if err != nil {
		t.Fatal(err)
	}
	files := imagetest.Unpack(t, initrd)
	if got := string(files[image.ModulesList]); got != strings.Join(want, "\n")+"\n" {
		t.Errorf("list %q", got)
	}
	if string(files["init"]) != "the init" || !bytes.HasPrefix(files["modules/tsm.ko"], []byte("\x7fELF")) {
		t.Error("init or modules are not in the initrd")
	}
	for _, node := range []string{"dev/console", "dev/null"} {
		if _, ok := files[node]; !ok {
			t.Errorf("no %s: the init could not even start", node)
		}
	}
}

func TestWhatCannotBeBuiltIsRefused(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*image.Options){
		"unknown variant": func(o *image.Options) { o.Variant = "other" },
		"no init":         func(o *image.Options) { o.Init += ".missing" },
		"no modules":      func(o *image.Options) { o.ModulesDir = t.TempDir() },
		"a module is missing": func(o *image.Options) {
			if err := os.Remove(filepath.Join(o.ModulesDir, "kernel/drivers/virt/tsm.ko.xz")); err != nil {
				t.Error(err)
			}
		},
		"a circle": func(o *image.Options) { imagetest.Module(t, o.ModulesDir, "net/failover", "virtio_net") },
		"no module information": func(o *image.Options) {
			if err := os.WriteFile(filepath.Join(o.ModulesDir, "kernel/drivers/block/virtio_blk.ko.xz"), []byte("no module"), 0o600); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := imagetest.Inputs(t)
			o.OutDir = t.TempDir()
			change(&o)
			if _, err := image.Build(t.Context(), o); err == nil {
				t.Error("built")
			}
			if _, err := os.Stat(filepath.Join(o.OutDir, contract.ImageDescriptionName)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a description is left: %v", err)
			}
		})
	}
}

func TestCatalogueFindsImagesByWhatTheyContain(t *testing.T) {
	t.Parallel()
	d, dir := build(t, nil)
	for _, dirs := range [][]string{{dir}, {filepath.Dir(dir)}, {"/nonexistent", dir}} {
		list, err := image.LoadCatalogue(dirs)
		if err != nil || len(list) != 1 {
			t.Fatalf("%v: %d images, %v", dirs, len(list), err)
		}
		e, ok := image.Find(list, d.Firmware.SHA256, d.Kernel.SHA256, d.Initrd.SHA256, d.Cmdline)
		if !ok || e.Dir != dir || e.Verify() != nil {
			t.Errorf("%+v %v", e, e.Verify())
		}
		if _, ok := image.Find(list, d.Firmware.SHA256, d.Kernel.SHA256, d.Initrd.SHA256, d.Cmdline+" "); ok {
			t.Error("found with another command line")
		}
	}
}

func TestChangedFilesAreNoticedAtTheirEnd(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func([]byte) []byte{
		"shorter": func(b []byte) []byte { return b[:len(b)-1] },
		"longer":  func(b []byte) []byte { return append(b, 0) },
		"other":   func(b []byte) []byte { b[0] ^= 1; return b },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, dir := build(t, nil)
			file := filepath.Join(dir, d.Kernel.File)
			data, err := os.ReadFile(file)
			if err := errors.Join(err, os.WriteFile(file, change(data), 0o600)); err != nil {
				t.Fatal(err)
			}
			list, err := image.LoadCatalogue([]string{dir})
			if err != nil {
				t.Fatal(err)
			}
			if err := list[0].Verify(); !errors.Is(err, image.ErrChanged) {
				t.Errorf("verify: %v", err)
			}
			r, err := list[0].Open(d.Initrd)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(r); errors.Join(err, r.Close()) != nil {
				t.Errorf("an unchanged file: %v", err)
			}
		})
	}
}

func TestABrokenDescriptionIsAnError(t *testing.T) {
	t.Parallel()
	_, dir := build(t, nil)
	if err := os.WriteFile(filepath.Join(dir, contract.ImageDescriptionName), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := image.LoadCatalogue([]string{dir}); err == nil {
		t.Error("loaded")
	}
}
