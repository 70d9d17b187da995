//go:build !emulated

package platform

import "github.com/confidential-node/agent/firmware/contract"

// EmulatedBuild says that this build can emulate a TEE.
const EmulatedBuild = false

func emulated(string) (TEE, error) {
	return nil, contract.Refuse("platform.emulation-not-built", "set tee = \"sev-snp\"; for trials without silicon build with the tag \"emulated\"",
		"this build has no emulated TEE")
}
