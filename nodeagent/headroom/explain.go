package headroom

import (
	"errors"
	"syscall"

	"github.com/confidential-node/agent/firmware/contract"
)

// Codes of what a host has no more of. They never change.
const (
	CodeDiskFull     = "host.disk-full"
	CodeInodes       = "host.inodes-exhausted"
	CodeDiskQuota    = "host.disk-quota"
	CodeDiskReadOnly = "host.disk-read-only"
	CodeDiskFailing  = "host.disk-failing"
	CodeDiskSilent   = "host.disk-silent"
	CodeDescriptors  = "host.descriptors"
	CodeFileTable    = "host.file-table-full"
	CodeMemory       = "host.memory-low"
	CodeUnknown      = "host.headroom-unknown"
)

const (
	remedyFull        = "free space on the host (run_dir, state_dir, cache_dir), then launch again"
	remedyReadOnly    = "look in the host's kernel log for why the file system became read-only, repair it, and mount it read-write; the agent goes on by itself"
	remedyDescriptors = "raise LimitNOFILE of the agent's unit, or let guests end; if few guests run, report it with the agent's log"
)

// Explain returns what an error of the operating system says about the host
// to somebody who cannot see it, and nil when it says nothing of that kind.
func Explain(err error) *contract.Refusal {
	for _, known := range []struct {
		errno                 syscall.Errno
		code, message, remedy string
	}{
		{syscall.ENOSPC, CodeDiskFull, "a disk of the host is full", remedyFull},
		{syscall.EDQUOT, CodeDiskQuota, "the agent's quota on a disk of the host is used up", "raise the quota, or free space on the host (run_dir, state_dir, cache_dir), then launch again"},
		{syscall.EROFS, CodeDiskReadOnly, "a file system of the host is read-only", remedyReadOnly},
		{syscall.EIO, CodeDiskFailing, "a disk of the host fails", "look in the host's kernel log for the disk, and replace it; launch on another host meanwhile"},
		{syscall.EMFILE, CodeDescriptors, "the agent has no file descriptor left", remedyDescriptors},
		{syscall.ENFILE, CodeFileTable, "the host has no file descriptor left", "find the program that holds the host's files open (lsof), or raise fs.file-max"},
		{syscall.ENOMEM, CodeMemory, "the host has no memory left", "let guests end, or end other programs on the host"},
	} {
		if errors.Is(err, known.errno) {
			return contract.Refuse(known.code, known.remedy, "%s", known.message).Because(err)
		}
	}
	return nil
}

// Typed returns err as a refusal where Explain knows it. A refusal stays what
// it is.
func Typed(err error) error {
	if _, refused := errors.AsType[*contract.Refusal](err); refused {
		return err
	}
	if r := Explain(err); r != nil {
		return r
	}
	return err
}
