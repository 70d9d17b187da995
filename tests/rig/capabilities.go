package rig

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// capabilitiesDir is where libvirtd keeps what it learnt from QEMU. Asking
	// QEMU takes seconds; libvirtd checks that a file still fits the binary,
	// the kernel and itself before it believes it.
	capabilitiesDir = "/var/cache/libvirt/qemu/capabilities"
	// keptCapabilities is where a host that ends leaves them for the next.
	keptCapabilities = ScratchDir + "/qemu-capabilities"
)

func (h *Host) recallCapabilities() error {
	return copyFolder(keptCapabilities, h.Path(capabilitiesDir))
}

func (h *Host) keepCapabilities() error {
	return copyFolder(h.Path(capabilitiesDir), keptCapabilities)
}

// copyFolder copies the plain files of a folder; none is fine.
func copyFolder(from, to string) error {
	entries, err := os.ReadDir(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = os.MkdirAll(to, 0o755) //nolint:gosec // as libvirtd makes it
	}
	for _, e := range entries {
		if err != nil {
			break
		}
		var data []byte
		if data, err = os.ReadFile(filepath.Join(from, e.Name())); err == nil {
			err = os.WriteFile(filepath.Join(to, e.Name()), data, 0o600)
		}
	}
	if err != nil {
		return fmt.Errorf("copying QEMU's capabilities: %w", err)
	}
	return nil
}
