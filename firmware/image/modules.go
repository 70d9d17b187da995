package image

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"
)

// maxModule bounds an unpacked module; the largest of Debian's cloud kernel
// has about 6 MiB.
const maxModule = 64 << 20

// module is one kernel module, unpacked. The signature at its end survives.
type module struct {
	name string // with underscores, as the kernel says it
	data []byte
}

func (m module) file() string { return m.name + ".ko" }

// canonicalName maps sev-guest.ko.xz to sev_guest.
func canonicalName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(name, "-", "_")
}

// loadModules reads the named modules and what they depend on, dependencies
// first. A package's modules.dep does not exist before depmod ran, so the
// dependencies are read from the modules themselves.
func loadModules(ctx context.Context, dir string, names []string) ([]module, error) {
	paths, builtin, err := indexModules(dir)
	if err != nil {
		return nil, err
	}
	var out []module
	done := map[string]bool{}
	var load func(name string, chain []string) error
	load = func(name string, chain []string) error {
		if done[name] || builtin[name] {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if slices.Contains(chain, name) {
			return fmt.Errorf("loading module %s: it depends on itself", name)
		}
		file, ok := paths[name]
		if !ok {
			return fmt.Errorf("loading module %s: neither in %s nor built into the kernel", name, dir)
		}
		data, err := readModule(file)
		if err != nil {
			return fmt.Errorf("loading module %s: %w", name, err)
		}
		needs, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("loading module %s: %w", name, err)
		}
		for _, need := range needs {
			if err := load(need, append(chain, name)); err != nil {
				return err
			}
		}
		done[name] = true
		out = append(out, module{name, data})
		return nil
	}
	for _, name := range names {
		if err := load(name, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func indexModules(dir string) (paths map[string]string, builtin map[string]bool, err error) {
	paths, builtin = map[string]string{}, map[string]bool{}
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(file string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.Contains(d.Name(), ".ko") {
			paths[canonicalName(file)] = file
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("listing modules: %w", err)
	}
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, nil, fmt.Errorf("listing built-in modules: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		builtin[canonicalName(strings.TrimSpace(line))] = true
	}
	return paths, builtin, nil
}

func readModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	var in io.Reader
	switch path.Ext(file) {
	case ".ko":
		in = f
	case ".xz":
		if in, err = xz.NewReader(f); err != nil {
			return nil, fmt.Errorf("unpacking: %w", err)
		}
	default:
		return nil, fmt.Errorf("unknown compression %q", path.Ext(file))
	}
	data, err := io.ReadAll(io.LimitReader(in, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("unpacking: %w", err)
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("larger than %d bytes", maxModule)
	}
	return data, nil
}

// dependencies reads "depends=" from a module's .modinfo section: strings
// separated by NUL (Linux include/linux/module.h, MODULE_INFO).
func dependencies(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("reading ELF: %w", err)
	}
	section := f.Section(".modinfo")
	if section == nil || section.Type == elf.SHT_NOBITS || section.Size > uint64(len(data)) {
		return nil, errors.New("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("reading .modinfo: %w", err)
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		list, ok := strings.CutPrefix(field, "depends=")
		if !ok {
			continue
		}
		var names []string
		for name := range strings.SplitSeq(list, ",") {
			if name != "" {
				names = append(names, canonicalName(name))
			}
		}
		return names, nil
	}
	return nil, errors.New(".modinfo says nothing about dependencies")
}
