//go:build emulated

package domain

import (
	"encoding/hex"
	"fmt"

	"libvirt.org/go/libvirtxml"

	"github.com/confidential-node/agent/vm"
)

// pspPort names the virtio-serial port that leads to the process playing the
// PSP; launchItem the fw_cfg item that tells that process policy and
// HOST_DATA, which under SNP are arguments of sev-snp-guest.
const (
	pspPort    = "org.confidential-node.psp"
	launchItem = "opt/org.confidential-node/emulated-launch"
)

// emulated runs the same firmware in software. The hash table, which QEMU
// itself places in memory under SNP, is loaded from a file.
func emulated(t *vm.Emulated, d *libvirtxml.Domain) error {
	d.Type = "qemu"
	d.Devices.Channels = []libvirtxml.DomainChannel{{
		Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "connect", Path: t.PSPSocket}},
		Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: pspPort}},
	}}
	launch := fmt.Sprintf("policy=%#x;host-data=%s", t.Policy, hex.EncodeToString(t.HostData))
	argument(d,
		"-device", fmt.Sprintf("loader,file=%s,addr=%#x,force-raw=on", t.HashTable, t.HashTableGPA),
		"-fw_cfg", "name="+launchItem+",string="+launch)
	return nil
}
