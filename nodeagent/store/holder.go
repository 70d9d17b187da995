package store

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// kernelLocks lists every lock on a file and who has it (proc_locks(5)).
const kernelLocks = "/proc/locks"

// holder names the process that holds the lock of a file, as well as the
// kernel tells; a lock across namespaces or networks has no process here.
func holder(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return "another agent"
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	locks, err := os.Open(kernelLocks)
	if !ok || err != nil {
		return "another agent"
	}
	defer locks.Close() //nolint:errcheck // read only
	if pid := parseHolder(locks, stat.Ino); pid > 0 {
		return fmt.Sprintf("another agent (process %d)", pid)
	}
	return "another agent"
}

// parseHolder returns the only process that has a flock on the inode, 0 when
// there is none, or several on inodes of that number. Device numbers differ
// from stat's where file systems have several, so they are not compared.
func parseHolder(locks io.Reader, inode uint64) (pid int) {
	lines := bufio.NewScanner(locks)
	for lines.Scan() {
		// 1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF
		f := strings.Fields(lines.Text())
		if len(f) < 6 || f[1] != "FLOCK" || f[3] != "WRITE" {
			continue
		}
		n, err := strconv.Atoi(f[4])
		if err != nil || n <= 0 || !strings.HasSuffix(f[5], ":"+strconv.FormatUint(inode, 10)) {
			continue
		}
		if pid != 0 && pid != n {
			return 0
		}
		pid = n
	}
	return pid
}
