package libvirt

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/diagnosis"
)

const (
	// domainLogs is where the system's libvirtd logs each domain's QEMU.
	domainLogs = "/var/log/libvirt/qemu"
	// lastWordsBytes bounds what is read of a log's end.
	lastWordsBytes = 64 << 10
	// logStart is in the line libvirt writes before each start of a domain.
	logStart = ": starting up libvirt version"
)

// startError is a refusal when libvirt answered, and only then. What libvirt
// and QEMU said is its cause, which stays on this host.
//
// libvirt hands on what QEMU writes only until the monitor is up. The security
// processor is asked for pages, CPUID and the ID block after that, when the
// guest is set going; QEMU's words on it are in the domain's log alone.
func (d *Driver) startError(guestID string, began time.Time, err error) error {
	if isTransport(err) {
		return fmt.Errorf("starting guest %s: %w", guestID, err)
	}
	if r, known := diagnosis.Start(err.Error()); known {
		return r.Because(err)
	}
	said, logErr := lastWords(filepath.Join(d.logs, vm.NamePrefix+guestID+".log"), began)
	if said != "" {
		logErr = errors.New(said)
	}
	err = errors.Join(err, logErr)
	if r, known := diagnosis.Start(said); known {
		return r.Because(err)
	}
	return contract.Refuse("vm.start-failed", "look at the agent's log and at libvirt's log of the domain on the host",
		"libvirt could not start guest %s", guestID).Because(err)
}

// lastWords is the end of a log since the domain's last start, empty when
// nothing was written since then.
func lastWords(path string, since time.Time) (string, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("reading QEMU's log: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("reading QEMU's log: %w", err)
	}
	// File systems keep coarser times than the clock.
	if info.ModTime().Before(since.Truncate(time.Second)) {
		return "", nil
	}
	size := min(info.Size(), lastWordsBytes)
	text, err := io.ReadAll(io.NewSectionReader(f, info.Size()-size, size))
	if err != nil {
		return "", fmt.Errorf("reading QEMU's log: %w", err)
	}
	said := string(text)
	if i := strings.LastIndex(said, logStart); i >= 0 {
		said = said[i+len(logStart):]
	}
	return strings.TrimSpace(said), nil
}
