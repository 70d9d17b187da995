package image

import (
	"bytes"
	"fmt"
	"strings"
)

// The initrd's layout, as the init expects it.
const (
	initPath = "init"
	// ModulesFolder holds the kernel modules; ModulesList names them in load
	// order, one per line, and GPUModulesList those of the GPUs' driver and
	// of what it needs, which come after them and need not load: without a GPU they do not.
	ModulesFolder  = "modules"
	ModulesList    = ModulesFolder + "/list"
	GPUModulesList = ModulesFolder + "/gpu"
)

// File types and device numbers of what the initrd contains (cpio(5), newc
// format; Linux Documentation/admin-guide/devices.txt).
const (
	typeDir, typeFile, typeChar = 0o040000, 0o100000, 0o020000

	majorMemory, minorNull    = 1, 3
	majorTTY, minorTTYConsole = 5, 1
)

// packInitrd makes the initrd: a newc archive, not compressed. Measured with
// 10 MB under software emulation: the firmware hashes them in 0.2 s and the
// kernel unpacks them in 0.16 s; with zstd (3.4 MB) unpacking takes 0.3 s, so
// nothing would be gained, and no compressor's version has to be reproduced.
func packInitrd(init []byte, modules []module, gpus *gpuPart) ([]byte, error) {
	var a archive
	for _, dir := range []string{"dev", ModulesFolder} {
		a.add(entry{name: dir, mode: typeDir | 0o755})
	}
	// The kernel opens the console before the init mounts anything, and Go's
	// runtime opens /dev/null for every standard descriptor that is missing.
	a.add(entry{name: "dev/console", mode: typeChar | 0o600, major: majorTTY, minor: minorTTYConsole})
	a.add(entry{name: "dev/null", mode: typeChar | 0o666, major: majorMemory, minor: minorNull})
	a.add(entry{name: initPath, mode: typeFile | 0o755, data: init})
	a.addModules(ModulesList, modules)
	if len(gpus.modules) > 0 {
		a.addModules(GPUModulesList, gpus.modules)
	}
	for _, e := range gpus.entries {
		a.add(e)
	}
	return a.close()
}

type entry struct {
	name         string
	mode         uint32
	major, minor uint32
	data         []byte
}

// archive writes cpio's newc format with everything fixed that could differ
// between two builds: inodes count up, times, owners and links are constant.
type archive struct {
	out   bytes.Buffer
	inode uint32
	err   error
}

const cpioAlign = 4

func (a *archive) add(e entry) {
	a.inode++
	links := uint32(1)
	if e.mode&typeDir != 0 {
		links = 2
	}
	if uint64(len(e.data)) > 1<<32-1 {
		a.err = fmt.Errorf("packing initrd: %s is larger than 4 GiB", e.name)
		return
	}
	fmt.Fprintf(&a.out, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.inode, e.mode, 0, 0, links, 0, len(e.data), 0, 0, e.major, e.minor, len(e.name)+1, 0)
	a.out.WriteString(e.name + "\x00")
	a.pad()
	a.out.Write(e.data)
	a.pad()
}

func (a *archive) addModules(listName string, modules []module) {
	var list strings.Builder
	for _, m := range modules {
		a.add(entry{name: ModulesFolder + "/" + m.file(), mode: typeFile | 0o644, data: m.data})
		list.WriteString(m.file() + "\n")
	}
	a.add(entry{name: listName, mode: typeFile | 0o644, data: []byte(list.String())})
}

func (a *archive) pad() {
	for a.out.Len()%cpioAlign != 0 {
		a.out.WriteByte(0)
	}
}

func (a *archive) close() ([]byte, error) {
	a.inode = 0
	a.add(entry{name: "TRAILER!!!"})
	return a.out.Bytes(), a.err
}
