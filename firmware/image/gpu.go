package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// gpuPart is the image's part that knows GPUs.
type gpuPart struct {
	entries []entry
	modules []module
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
	for name := range strings.FieldsSeq(list) {
		data, ok := ko[name]
		if !ok {
			return nil, fmt.Errorf("folder for GPUs: %s names %s, which is not there", gpuModulesList, name)
		}
		delete(ko, name)
		p.modules = append(p.modules, module{name: canonicalName(name), data: data})
	}
	for name := range ko {
		return nil, fmt.Errorf("folder for GPUs: %s does not name %s", gpuModulesList, name)
	}
	return p, nil
}
