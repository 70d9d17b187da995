// Package platform knows which TEE this build can start guests with. The
// emulated one exists only under the build tag "emulated"; without the tag
// this package holds no path to it and refuses such a configuration.
package platform

import (
	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/vm"
)

// Launch is what a guest's TEE must be told.
type Launch struct {
	// Policy is the SNP guest policy.
	Policy uint64
	// HostData is the SHA-256 of the manifest.
	HostData [32]byte
	// IDBlock and IDAuth: both or neither.
	IDBlock, IDAuth []byte
	// Dir is the guest's own folder of boot copies. HashTable is written
	// there when the TEE cannot build it itself.
	Dir       string
	HashTable []byte
	// HashTableGPA is where the firmware looks for it.
	HashTableGPA uint64
}

// TEE turns a launch into the domain's TEE.
type TEE func(Launch) (vm.TEE, error)

// Select returns the TEE the configuration names, or a refusal when this
// build does not have it.
func Select(cfg config.Config) (TEE, error) {
	switch cfg.TEE {
	case config.TEESNP:
		return snp, nil
	case config.TEEEmulated:
		return emulated(cfg.Emulated.PSPSocket)
	}
	return nil, contract.Refuse("platform.unknown-tee", "set tee to sev-snp", "TEE %q is not known", cfg.TEE)
}

func snp(l Launch) (vm.TEE, error) {
	return vm.TEE{SNP: &vm.SNP{Policy: l.Policy, HostData: l.HostData[:], IDBlock: l.IDBlock, IDAuth: l.IDAuth}}, nil
}
