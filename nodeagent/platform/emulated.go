//go:build emulated

package platform

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/confidential-node/agent/vm"
)

// EmulatedBuild says that this build can emulate a TEE.
const EmulatedBuild = true

// emulated writes the hash table to a file, because no silicon's QEMU object
// places it in the guest's memory.
func emulated(socket string) (TEE, error) {
	return func(l Launch) (vm.TEE, error) {
		file := filepath.Join(l.Dir, "hash-table")
		if err := os.Remove(file); err != nil && !os.IsNotExist(err) {
			return vm.TEE{}, fmt.Errorf("replacing hash table: %w", err)
		}
		if err := os.WriteFile(file, l.HashTable, 0o444); err != nil { //nolint:gosec // public, and QEMU runs as another user
			return vm.TEE{}, fmt.Errorf("writing hash table: %w", err)
		}
		return vm.TEE{Emulated: &vm.Emulated{
			Policy: l.Policy, HostData: l.HostData[:], HashTable: file, HashTableGPA: l.HashTableGPA, PSPSocket: socket,
		}}, nil
	}, nil
}
