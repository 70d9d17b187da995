// Package image builds guest images and reads them back. An image is a folder:
// AmdSev OVMF, a distribution's kernel, an initrd with the guest's init, and
// image.json (contract.ImageDescription), which says what each was made from.
//
// Building is reproducible: the same inputs give the same bytes, whoever
// builds, so that anybody can compute the launch digest from sources. The init
// is an input file; this package knows nothing of what it does. Functions keep
// no state and are safe for concurrent use on different folders.
package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/confidential-node/agent/firmware/contract"
)

// File names in an image's folder.
const (
	FirmwareName = "OVMF.fd"
	KernelName   = "vmlinuz"
	InitrdName   = "initrd.img"
)

// ParamVariant is the kernel parameter that tells the init its variant. It is
// measured with the command line, so a host can neither add nor remove it.
const ParamVariant = "nodeagent.variant"

// Options are the inputs of one image.
type Options struct {
	// Init is the init: one static binary.
	Init string
	// Kernel is a bzImage; ModulesDir the lib/modules/VERSION folder of the
	// same package. KernelSource names package and version.
	Kernel, ModulesDir, KernelSource string
	// Firmware is an AmdSev OVMF; FirmwareSource names package and version.
	Firmware, FirmwareSource string
	// Variant is contract.VariantProduction or contract.VariantDebug.
	Variant string
	// Emulated says that Init was built with the tag "emulated".
	Emulated bool
	// GPUDir is a folder with the part that knows GPUs; "" builds an image that
	// refuses manifests with GPUs. See GPUFolder.
	GPUDir string
	// Name identifies the build, for people.
	Name string
	// OutDir receives the image; it is made when missing.
	OutDir string
}

// Cmdline is the kernel command line of a variant.
//
// No image takes code from the host: unsigned modules, kexec, /dev/mem and
// the like are locked, and a panic ends the guest at once. "console=null" names
// a console that does not exist: without it the kernel falls back to the first
// serial port it finds, and the host decides whether there is one. Randomness
// starts with the processor's; a seed that firmware hands over comes from
// devices of the host and is mixed in without being counted.
func Cmdline(variant string) (string, error) {
	words := []string{"panic=-1", "oops=panic", "module.sig_enforce=1", "lockdown=confidentiality", "random.trust_cpu=on", "random.trust_bootloader=off", ParamVariant + "=" + variant}
	switch variant {
	case contract.VariantProduction:
		words = append([]string{"console=null", "quiet", "loglevel=0"}, words...)
	case contract.VariantDebug:
		words = append([]string{"console=ttyS0"}, words...)
	default:
		return "", fmt.Errorf("building image: unknown variant %q", variant)
	}
	return strings.Join(words, " "), nil
}

// moduleNames are what the init needs beyond the kernel's built-ins.
// Dependencies are found by themselves.
func moduleNames(emulated bool) []string {
	// button turns the host's power button into an event, which is how a
	// guest is asked to end by itself.
	names := []string{"virtio_net", "virtio_blk", "button"}
	if !emulated {
		names = append(names, "sev_guest")
	}
	return names
}

// Build makes an image folder. On an error OutDir may hold some of the files
// but no image.json.
func Build(ctx context.Context, o Options) (*contract.ImageDescription, error) {
	cmdline, err := Cmdline(o.Variant)
	if err != nil {
		return nil, err
	}
	gpus, err := loadGPUPart(o.GPUDir)
	if err != nil {
		return nil, err
	}
	if o.GPUDir != "" {
		cmdline += " " + paramFirmware
	}
	modules, err := loadModules(ctx, o.ModulesDir, moduleNames(o.Emulated))
	if err != nil {
		return nil, err
	}
	// The same and, after them, what only the GPUs' driver needs.
	all, err := loadModules(ctx, o.ModulesDir, append(moduleNames(o.Emulated), gpus.needs...))
	if err != nil {
		return nil, err
	}
	gpus.modules = append(all[len(modules):], gpus.modules...)
	init, err := os.ReadFile(o.Init)
	if err != nil {
		return nil, fmt.Errorf("reading init: %w", err)
	}
	d := &contract.ImageDescription{
		Version: contract.ImageVersion, Name: o.Name, Variant: o.Variant, Emulated: o.Emulated,
		// A stock kernel interprets ACPI code from the host.
		AMLDefence:  false,
		GPUEvidence: o.GPUDir != "",
		Cmdline:     cmdline,
	}
	for _, m := range slices.Concat(modules, gpus.modules) {
		d.Modules = append(d.Modules, describe(m.file(), m.data, o.KernelSource))
	}
	initrd, err := packInitrd(init, modules, gpus)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.OutDir, 0o755); err != nil {
		return nil, fmt.Errorf("making image folder: %w", err)
	}
	description := filepath.Join(o.OutDir, contract.ImageDescriptionName)
	if err := os.Remove(description); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("removing old description: %w", err)
	}
	if d.Firmware, err = copyIn(o.OutDir, FirmwareName, o.Firmware, o.FirmwareSource); err != nil {
		return nil, err
	}
	if d.Kernel, err = copyIn(o.OutDir, KernelName, o.Kernel, o.KernelSource); err != nil {
		return nil, err
	}
	if d.Initrd, err = write(o.OutDir, InitrdName, initrd, "built from the init and the kernel's modules"); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encoding description: %w", err)
	}
	if _, err := write(o.OutDir, contract.ImageDescriptionName, append(text, '\n'), ""); err != nil {
		return nil, err
	}
	return d, nil
}

func describe(name string, data []byte, source string) contract.ImageFile {
	sum := sha256.Sum256(data)
	return contract.ImageFile{File: name, SHA256: hex.EncodeToString(sum[:]), Size: int64(len(data)), Source: source}
}

func copyIn(dir, name, path, source string) (contract.ImageFile, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return contract.ImageFile{}, fmt.Errorf("reading %s: %w", name, err)
	}
	return write(dir, name, data, source)
}

func write(dir, name string, data []byte, source string) (contract.ImageFile, error) {
	if err := renameio.WriteFile(filepath.Join(dir, name), data, 0o644, renameio.IgnoreUmask()); err != nil {
		return contract.ImageFile{}, fmt.Errorf("writing %s: %w", name, err)
	}
	return describe(name, data, source), nil
}
