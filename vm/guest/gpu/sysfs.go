package gpu

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

const (
	vendorNVIDIA = 0x10de
	classDisplay = 0x03 // PCI Code and ID Assignment Specification 1.16
)

// countFunctions counts the display functions on the PCI bus below sysfs. One
// that is not NVIDIA's is refused: nobody proves anything for it, and it could
// reach what the others share.
func countFunctions(sysfs string) (int, error) {
	dir := filepath.Join(sysfs, "bus/pci/devices")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("listing PCI devices: %w", err)
	}
	count := 0
	for _, e := range entries {
		class, err := number(filepath.Join(dir, e.Name(), "class"))
		if err != nil {
			return 0, err
		}
		if class>>16 != classDisplay {
			continue
		}
		vendor, err := number(filepath.Join(dir, e.Name(), "vendor"))
		if err != nil {
			return 0, err
		}
		if vendor != vendorNVIDIA {
			return 0, contract.Refuse("guest.gpu-foreign", "launch without a display device that is not NVIDIA's",
				"the guest has a display device %s of vendor %#04x, which nobody can vouch for", e.Name(), vendor)
		}
		count++
	}
	return count, nil
}

func number(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	value, err := strconv.ParseUint(strings.TrimSpace(string(text)), 0, 32)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return value, nil
}
