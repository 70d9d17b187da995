package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// What a folder for GPUs holds; whoever builds an image fills it.
const (
	// GPUFolder is where it goes in the initrd.
	GPUFolder = "gpu"
	// gpuHelper is the program vm/guest/gpuhelper, dynamically linked; lib/
	// has its loader, its libraries and NVIDIA's, and whatever of the driver's
	// user space workloads are to have.
	gpuHelper = "helper"
	// gpuModules has the driver's kernel modules (.ko, signed for the image's
	// kernel) and their order in gpuModulesList, a name a line.
	gpuModules     = "modules"
	gpuModulesList = gpuModules + "/list"
	// gpuFirmware is what the driver loads into the GPUs' own processors.
	gpuFirmware = "firmware"
)

// paramFirmware tells the kernel where drivers' firmware is.
const paramFirmware = "firmware_class.path=/" + GPUFolder + "/" + gpuFirmware

// kernelCrypto is what NVIDIA's driver asks the kernel for by name when it
// opens its session with a GPU. Nothing is loaded by then any more.
var kernelCrypto = []string{"ecdh_generic", "ecdsa_generic", "gcm", "ghash_generic"}

// gpuPart is the image's part that knows GPUs.
type gpuPart struct {
	entries []entry
	modules []module
	needs   []string // of the kernel's own modules
}

// loadGPUPart reads a folder for GPUs, in the order of its names. Links are
// refused: what they lead to would not be in the image.
func loadGPUPart(dir string) (*gpuPart, error) {
	if dir == "" {
		return &gpuPart{}, nil
	}
	p := &gpuPart{}
	var list string
	ko := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == gpuModules || strings.HasPrefix(name, gpuModules+"/")):
			return nil
		case d.IsDir():
			p.entries = append(p.entries, entry{name: filepath.Join(GPUFolder, name), mode: typeDir | 0o755})
			return nil
		case !info.Mode().IsRegular():
			return fmt.Errorf("%s is no regular file; copy what it leads to (cp -L)", path)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		switch {
		case name == gpuModulesList:
			list = string(data)
		case filepath.Dir(name) == gpuModules:
			ko[filepath.Base(name)] = data
		default:
			p.entries = append(p.entries, entry{name: filepath.Join(GPUFolder, name), mode: typeFile | 0o644 | uint32(info.Mode().Perm()&0o111), data: data})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading folder for GPUs: %w", err)
	}
	if info, err := os.Stat(filepath.Join(dir, gpuHelper)); err != nil || info.Mode()&0o111 == 0 {
		return nil, errors.Join(fmt.Errorf("folder for GPUs: no program %s", gpuHelper), err)
	}
	return p, p.order(list, ko)
}

// order puts the modules in the list's order and finds out which of the
// kernel's own they need.
func (p *gpuPart) order(list string, ko map[string][]byte) error {
	own, loaded := map[string]bool{}, map[string]bool{}
	for file := range ko {
		own[canonicalName(file)] = true
	}
	p.needs = slices.Clone(kernelCrypto)
	for file := range strings.FieldsSeq(list) {
		data, ok := ko[file]
		if !ok {
			return fmt.Errorf("folder for GPUs: %s names %s, which is not there", gpuModulesList, file)
		}
		delete(ko, file)
		needs, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("folder for GPUs: module %s: %w", file, err)
		}
		for _, need := range needs {
			switch {
			case !own[need]:
				p.needs = append(p.needs, need)
			case !loaded[need]:
				return fmt.Errorf("folder for GPUs: %s has %s before %s, which it needs", gpuModulesList, file, need)
			}
		}
		m := module{name: canonicalName(file), data: data}
		loaded[m.name] = true
		p.modules = append(p.modules, m)
	}
	for file := range ko {
		return fmt.Errorf("folder for GPUs: %s does not name %s", gpuModulesList, file)
	}
	return nil
}
