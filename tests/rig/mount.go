package rig

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// privateMounts cuts mount propagation: nothing mounted from here on is seen
// by the machine, or the other way round.
func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private (in a chroot, bind its folder onto itself first: / must be a mount point): %w", err)
	}
	return nil
}

// mountTmpfs covers a folder that exists.
func mountTmpfs(dir string) error {
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mounting tmpfs on %s: %w", dir, err)
	}
	return nil
}

// mountOverlay makes a folder writable for this mount namespace alone: what is
// written goes below upper, and the machine's folder stays as it is. Covering
// single folders with tmpfs instead would need mount points on the machine.
func mountOverlay(dir, upper string) error {
	data, work := filepath.Join(upper, "data"), filepath.Join(upper, "work")
	for _, d := range []string{data, work} {
		if err := os.MkdirAll(d, 0o755); err != nil { //nolint:gosec // the mode the covered folder has
			return fmt.Errorf("preparing overlay of %s: %w", dir, err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", dir, data, work)
	if err := unix.Mount("overlay", dir, "overlay", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mounting overlay on %s (does the kernel have overlayfs?): %w", dir, err)
	}
	return nil
}

// bind shows the file or folder from at to.
func bind(from, to string) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s to %s: %w", from, to, err)
	}
	return nil
}
