//go:build !emulated

package domain

import (
	"libvirt.org/go/libvirtxml"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

func emulated(*vm.Emulated, *libvirtxml.Domain) error {
	return contract.Refuse("vm.emulation-not-built", `set tee = "sev-snp", or use a build with the tag "emulated" for trials`,
		"this build cannot start a guest without silicon")
}
