package psp_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host/hosttest"
	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

func open(t *testing.T, m *hosttest.Machine) *psp.Device {
	t.Helper()
	d, err := psp.Open(m.Root, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func operator(t *testing.T, m *hosttest.Machine) *psp.Operator {
	t.Helper()
	o, err := psp.OpenOperator(m.Root, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.Close() })
	return o
}

func TestAskingTellsVersionStateAndChipIDs(t *testing.T) {
	t.Parallel()
	setup := hosttest.Turin()
	setup.Firmware.Guests, setup.ESGuests = 3, 2
	m := hosttest.Boot(t, setup)
	d := open(t, m)
	legacy, err := d.PlatformStatus()
	if err != nil || legacy.APIMajor != 1 || legacy.APIMinor != 58 || legacy.Build != 12 || legacy.Guests != 2 {
		t.Errorf("%+v %v", legacy, err)
	}
	status, err := d.SNPPlatformStatus()
	if err != nil || status != m.Firmware() || !status.RMPInitialized {
		t.Errorf("%+v %v, want %+v", status, err, m.Firmware())
	}
	ids, err := d.ChipIDs()
	if err != nil || len(ids) != 2 || ids[0] != setup.ChipIDs[0] || ids[1] != setup.ChipIDs[1] {
		t.Errorf("%x %v", ids, err)
	}
}

func TestAnUninitializedPlatformRefusesSNPButTellsItsVersion(t *testing.T) {
	t.Parallel()
	setup := hosttest.Genoa()
	setup.Cmdline += " iommu=pt"
	d := open(t, hosttest.Boot(t, setup))
	if _, err := d.SNPPlatformStatus(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v", err)
	}
	if legacy, err := d.PlatformStatus(); err != nil || legacy.APIMinor != 55 {
		t.Errorf("%+v %v", legacy, err)
	}
}

// What the firmware claims of its chip ids is bounded before memory is made.
func TestAbsurdChipIDLengthsAreRefused(t *testing.T) {
	t.Parallel()
	for _, sockets := range []int{0, 9} {
		setup := hosttest.Genoa()
		setup.ChipIDs = make([][psp.ChipIDSize]byte, sockets)
		if _, err := open(t, hosttest.Boot(t, setup)).ChipIDs(); err == nil || !strings.Contains(err.Error(), "chip ids") {
			t.Errorf("%d sockets: %v", sockets, err)
		}
	}
}

func TestAMissingDeviceIsRefusedWithARemedy(t *testing.T) {
	t.Parallel()
	m := hosttest.Boot(t, hosttest.Genoa())
	m.Remove(psp.DevicePath)
	_, err := psp.Open(m.Root, m)
	if r := contract.AsRefusal(err); r.Code != "psp.no-device" || !strings.Contains(r.Remedy, "modprobe ccp") {
		t.Errorf("%v", err)
	}
	if _, err := psp.OpenOperator(m.Root, m); err == nil {
		t.Error("an operator without a device")
	}
}

func TestTheOperatorCommitsConfiguresAndLoads(t *testing.T) {
	t.Parallel()
	setup := hosttest.Genoa()
	m := hosttest.Boot(t, setup)
	o := operator(t, m)
	if err := o.LoadVLEK(setup.VLEK); err != nil || !m.Firmware().VLEKLoaded {
		t.Errorf("loading the VLEK: %v, %+v", err, m.Firmware())
	}
	old := psp.Config{ReportedTCB: 0x541700000000000a, MaskChipID: true}
	if err := o.SetConfig(old); err != nil {
		t.Error(err)
	}
	if f := m.Firmware(); f.ReportedTCB != old.ReportedTCB || !f.MaskChipID || f.MaskChipKey || f.VLEKLoaded {
		t.Errorf("%+v: a VLEK for another TCB must be gone", f)
	}
	if m.Committed() {
		t.Error("committed without a command")
	}
	if err := o.Commit(); err != nil || !m.Committed() || m.Firmware().ReportedTCB != setup.Firmware.CurrentTCB {
		t.Errorf("%v %+v", err, m.Firmware())
	}
}

func TestTheFirmwareRefusesTheOperator(t *testing.T) {
	t.Parallel()
	m := hosttest.Boot(t, hosttest.Genoa())
	o := operator(t, m)
	for name, c := range map[string]struct {
		call func() error
		code string
	}{
		"a TCB above the current one": {func() error { return o.SetConfig(psp.Config{ReportedTCB: 0x571b00000000000a}) }, "psp.invalid-parameter"},
		"another chip's hashstick":    {func() error { return o.LoadVLEK(bytes.Repeat([]byte{'x'}, psp.HashstickSize)) }, "psp.bad-measurement"},
		"half a hashstick":            {func() error { return o.LoadVLEK(make([]byte, 216)) }, "psp.bad-hashstick"},
	} {
		err := c.call()
		if r := contract.AsRefusal(err); r.Code != c.code || r.Remedy == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if m.Firmware().VLEKLoaded || m.Firmware() != hosttest.Boot(t, hosttest.Genoa()).Firmware() {
		t.Errorf("a refused command changed something: %+v", m.Firmware())
	}
}

// answering is a kernel whose firmware answers every command with one code.
type answering struct {
	code  psp.Code
	errno error
}

func (a answering) Ioctl(_ *os.File, _ uint, arg uintptr) (int, error) {
	answer := psp.Issue{Error: uint32(a.code)}.Encode()
	local := []unix.Iovec{{Base: &answer[0]}}
	local[0].SetLen(len(answer))
	if _, err := unix.ProcessVMWritev(os.Getpid(), local, []unix.RemoteIovec{{Base: arg, Len: len(answer)}}, 0); err != nil {
		return 0, err
	}
	return 0, a.errno
}

// One row per code of AMD's table.
func TestEveryFirmwareCodeHasAWordAndARemedy(t *testing.T) {
	t.Parallel()
	words := map[psp.Code]string{
		0x01: "invalid-platform-state", 0x02: "invalid-guest-state", 0x03: "invalid-config", 0x04: "invalid-length", 0x05: "already-owned",
		0x06: "invalid-certificate", 0x07: "policy-failure", 0x08: "inactive", 0x09: "invalid-address", 0x0A: "bad-signature",
		0x0B: "bad-measurement", 0x0C: "asid-owned", 0x0D: "invalid-asid", 0x0E: "wbinvd-required", 0x0F: "df-flush-required",
		0x10: "invalid-guest", 0x11: "invalid-command", 0x12: "active", 0x13: "hardware-platform", 0x14: "hardware-unsafe",
		0x15: "unsupported", 0x16: "invalid-parameter", 0x17: "resource-limit", 0x18: "secure-data-invalid", 0x19: "invalid-page-size",
		0x1A: "invalid-page-state", 0x1B: "invalid-metadata-entry", 0x1C: "invalid-page-owner", 0x1D: "aead-overflow",
		0x1E: "unknown", 0x1F: "exit-ring-buffer", 0x20: "rmp-init-required", 0x21: "bad-svn", 0x22: "bad-version", 0x23: "shutdown-required",
		0x24: "update-failed", 0x25: "restore-required", 0x26: "rmp-initialization-failed", 0x27: "invalid-key", 0x28: "shutdown-incomplete",
		0x7777: "unknown", psp.NoFirmwareCall: "not-called",
	}
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "dev"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, psp.DevicePath), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for code, word := range words {
		o, err := psp.OpenOperator(root, answering{code, unix.EIO})
		if err != nil {
			t.Fatal(err)
		}
		err = o.Commit()
		_ = o.Close()
		refused, ok := errors.AsType[*psp.FirmwareError](err)
		if !ok || refused.Code != code || refused.Command != psp.SNPCommitCommand || !errors.Is(err, unix.EIO) {
			t.Errorf("%#x: %v", uint32(code), err)
			continue
		}
		if r := contract.AsRefusal(err); r.Code != "psp."+word || r.Remedy == "" || !strings.Contains(r.Message, "SNP_COMMIT") {
			t.Errorf("%#x: %+v, want psp.%s", uint32(code), r, word)
		}
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%#x: %q does not name it", uint32(code), err)
		}
	}
	// A kernel that reports success and a code at once is not believed.
	o, err := psp.OpenOperator(root, answering{0x21, nil})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close() //nolint:errcheck // a test's file
	if err := o.Commit(); contract.AsRefusal(err).Code != "psp.bad-svn" {
		t.Errorf("%v", err)
	}
}

func TestTheRealIoctlReportsErrno(t *testing.T) {
	t.Parallel()
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close() //nolint:errcheck // read only
	if _, err := (psp.Linux{}).Ioctl(file, psp.IssueCommand, 0); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("%v", err)
	}
}
