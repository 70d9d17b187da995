package tee

import (
	"testing"

	"github.com/confidential-node/agent/tests/skip"
)

func TestHostDataIsReadFromTheAnswerToOurOwnRequest(t *testing.T) {
	t.Parallel()
	report := make([]byte, reportSize)
	var asked [64]byte
	asked[3] = 9
	copy(report[offReportData:], asked[:])
	report[offHostData], report[offHostData+31] = 1, 2
	got, err := HostData(report, asked)
	if err != nil || got[0] != 1 || got[31] != 2 {
		t.Errorf("%x %v", got, err)
	}
	if _, err := HostData(report, [64]byte{}); err == nil {
		t.Error("a report of another request is accepted")
	}
	if _, err := HostData(report[:reportSize-1], asked); err == nil {
		t.Error("a short report is accepted")
	}
}

func TestAMachineWithoutReportsSaysSo(t *testing.T) {
	t.Parallel()
	if _, err := Open(); err == nil {
		skip.Missing(t, "a machine without attestation reports")
	}
}
