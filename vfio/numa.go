package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// maxCPU is the highest CPU number a list may name: x86 kernels stop at 8192
// CPUs (CONFIG_NR_CPUS).
const maxCPU = 8191

// NodeCPUs returns the CPUs of each NUMA node that the scheduler gives threads
// to: online and not isolated by the kernel's command line. Nodes of memory
// alone are left out. A kernel without NUMA has none.
func (h Host) NodeCPUs() (map[int][]int, error) {
	system := filepath.Join(h.Sysfs, "devices/system")
	entries, err := os.ReadDir(filepath.Join(system, "node"))
	if errors.Is(err, fs.ErrNotExist) {
		return map[int][]int{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing NUMA nodes: %w", err)
	}
	isolated, err := readCPUList(filepath.Join(system, "cpu/isolated"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	nodes := map[int][]int{}
	for _, entry := range entries {
		digits, found := strings.CutPrefix(entry.Name(), "node")
		node, err := strconv.Atoi(digits)
		if !found || err != nil {
			continue // the kernel's files beside the nodes
		}
		cpus, err := readCPUList(filepath.Join(system, "node", entry.Name(), "cpulist"))
		if err != nil {
			return nil, err
		}
		cpus = slices.DeleteFunc(cpus, func(cpu int) bool { return slices.Contains(isolated, cpu) })
		if len(cpus) > 0 {
			nodes[node] = cpus
		}
	}
	return nodes, nil
}

func readCPUList(path string) ([]int, error) {
	text, err := readAttribute(path)
	if err != nil {
		return nil, err
	}
	cpus, err := parseCPUList(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cpus, nil
}

// parseCPUList reads the kernel's "0-3,8", ascending; empty is no CPU.
func parseCPUList(text string) (cpus []int, err error) {
	if text == "" {
		return nil, nil
	}
	last := -1
	for part := range strings.SplitSeq(text, ",") {
		low, high, isRange := strings.Cut(part, "-")
		if !isRange {
			high = low
		}
		from, fromErr := strconv.Atoi(low)
		to, toErr := strconv.Atoi(high)
		if err := errors.Join(fromErr, toErr); err != nil {
			return nil, fmt.Errorf("CPU list %.100q: %w", text, err)
		}
		if from <= last || to < from || to > maxCPU {
			return nil, fmt.Errorf("CPU list %.100q is not ascending within 0..%d", text, maxCPU)
		}
		for cpu := from; cpu <= to; cpu++ {
			cpus = append(cpus, cpu)
		}
		last = to
	}
	return cpus, nil
}
