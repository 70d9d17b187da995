package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Holder is a process that has a device open.
type Holder struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
	Path    string `json:"path"` // what it has open
}

// Holders finds the processes that have the function open: through VFIO, the
// nvidia driver, a DRM node, or its registers in sysfs. Processes that end
// meanwhile are no holders. It needs root to see other users' files.
func (h Host) Holders(f Function) ([]Holder, error) {
	open, err := h.nodes(f)
	if err != nil {
		return nil, err
	}
	processes, err := os.ReadDir(h.Proc)
	if err != nil {
		return nil, fmt.Errorf("who holds %s cannot be seen: %w", f.Address, err)
	}
	var holders []Holder
	for _, process := range processes {
		pid, err := strconv.Atoi(process.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join(h.Proc, process.Name(), "fd")
		descriptors, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrPermission) {
			return nil, contract.Refuse("vfio.not-root", "run as root", "who holds %s cannot be seen", f.Address).Because(err)
		}
		for _, d := range descriptors {
			target, err := os.Readlink(filepath.Join(dir, d.Name()))
			if err == nil && open(target) {
				command, _ := readAttribute(filepath.Join(h.Proc, process.Name(), "comm"))
				holders = append(holders, Holder{PID: pid, Command: command, Path: target})
				break
			}
		}
	}
	return holders, nil
}

// nodes returns a test for the files that mean this function.
func (h Host) nodes(f Function) (func(path string) bool, error) {
	exact := map[string]bool{}
	add := func(parts ...string) { exact[filepath.Join(parts...)] = true }
	if f.Group != "" {
		add(h.Dev, "vfio", f.Group)
	}
	if f.VFIODevice != "" {
		add(h.Dev, "vfio/devices", f.VFIODevice)
	}
	drm, err := os.ReadDir(h.path(f.Address, "drm"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, node := range drm {
		add(h.Dev, "dri", node.Name())
	}
	anyGPU := false
	if f.Driver == "nvidia" {
		minor, known := h.nvidiaMinor(f.Address)
		if known {
			add(h.Dev, "nvidia"+minor)
		}
		anyGPU = !known
	}
	place, err := filepath.EvalSymlinks(h.path(f.Address, ""))
	if err != nil {
		return nil, err
	}
	gpuNode := regexp.MustCompile("^" + regexp.QuoteMeta(filepath.Join(h.Dev, "nvidia")) + "[0-9]+$")
	return func(path string) bool {
		return exact[path] || strings.HasPrefix(path, filepath.Join(place, "resource")) || (anyGPU && gpuNode.MatchString(path))
	}, nil
}

// nvidiaMinor asks the nvidia driver which /dev/nvidiaN a function is.
func (h Host) nvidiaMinor(a Address) (string, bool) {
	text, err := readAttribute(filepath.Join(h.Proc, "driver/nvidia/gpus", string(a), "information"))
	if err != nil {
		return "", false
	}
	match := regexp.MustCompile(`(?m)^Device Minor:\s*(\d+)\s*$`).FindStringSubmatch(text)
	if match == nil {
		return "", false
	}
	return match[1], true
}

// inUse refuses a function that somebody holds.
func (h Host) inUse(f Function) error {
	holders, err := h.Holders(f)
	if err != nil || len(holders) == 0 {
		return err
	}
	var names []string
	for _, holder := range holders {
		names = append(names, fmt.Sprintf("%s (pid %d, %s)", holder.Command, holder.PID, holder.Path))
	}
	return contract.Refuse("vfio.in-use",
		"stop these processes first; with the nvidia driver also nvidia-persistenced, nvidia-fabricmanager and DCGM",
		"%s is in use by %s", f.Address, strings.Join(names, ", "))
}
