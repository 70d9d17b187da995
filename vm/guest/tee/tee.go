// Package tee asks the platform for attestation reports: through the kernel's
// sev-guest driver, or, only in builds with the tag "emulated", through a
// channel to a process that plays the security processor. A build has one of
// the two, never both. A Reporter is safe for concurrent use; requests are
// answered one after the other.
package tee

import (
	"context"
	"errors"
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
)

// Where things lie in a report (AMD 56860, table ATTESTATION_REPORT).
const (
	reportSize    = 0x4A0
	offReportData = 0x50
	offHostData   = 0xC0
	hostDataSize  = 32
)

// ErrUnavailable means that this machine gives no reports.
var ErrUnavailable = errors.New("no attestation reports on this machine")

// Attestation is what the platform answers.
type Attestation struct {
	// Report is the attestation report.
	Report []byte
	// Table is the certificate table that the host put beside it, usually
	// empty: a hint, see ParseTable.
	Table []byte
}

// Reporter gets a report with 64 bytes of the caller's in it.
type Reporter interface {
	Report(ctx context.Context, reportData [contract.ReportDataSize]byte) (Attestation, error)
}

// HostData returns HOST_DATA of a report that answers reportData. It does not
// verify the signature: the guest got the report from its own processor over
// a channel the host cannot enter, and it is the broker that must be convinced.
func HostData(report []byte, reportData [contract.ReportDataSize]byte) ([hostDataSize]byte, error) {
	if len(report) != reportSize {
		return [hostDataSize]byte{}, fmt.Errorf("reading report: %d bytes, want %d", len(report), reportSize)
	}
	if [contract.ReportDataSize]byte(report[offReportData:]) != reportData {
		return [hostDataSize]byte{}, errors.New("reading report: it answers another request")
	}
	return [hostDataSize]byte(report[offHostData:]), nil
}
