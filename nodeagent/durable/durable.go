// Package durable makes changes of folders survive a power failure. It owns the
// sync of a folder and nothing else: files are replaced with renameio, which
// leaves that sync to its caller. Safe for concurrent use; it keeps nothing.
package durable

import (
	"errors"
	"os"
)

// SyncDir returns when what was created, renamed or removed in the folder is
// on disk (fsync(2): a file's sync does not cover its name).
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
