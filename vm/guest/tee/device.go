//go:build !emulated

package tee

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/client/linuxabi"

	"github.com/confidential-node/agent/firmware/contract"
)

// ioctler is an open /dev/sev-guest.
type ioctler interface {
	Ioctl(command uintptr, argument any) (uintptr, error)
	Close() error
}

// device asks through the ioctls of /dev/sev-guest.
type device struct {
	open func() (ioctler, error)
	// level is the file with the VMPL the kernel runs at (Linux 6.11). The
	// device does not tell, and a level that is not known is not guessed.
	level string
}

func (d *device) probe() error {
	if _, err := d.vmpl(); err != nil {
		return err
	}
	dev, err := d.open()
	if err != nil {
		return err
	}
	return dev.Close()
}

func (d *device) vmpl() (uint32, error) {
	text, err := os.ReadFile(d.level)
	if err != nil {
		return 0, fmt.Errorf("reading the kernel's VMPL: %w", err)
	}
	v, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32)
	if err != nil || v > maxVMPL {
		return 0, fmt.Errorf("reading the kernel's VMPL: %.20q is none", text)
	}
	return uint32(v), nil
}

// get asks for a report with certificates, and without them when the host has
// more than the kernel takes.
func (d *device) get(data [contract.ReportDataSize]byte) (a Attestation, level uint32, err error) {
	if level, err = d.vmpl(); err != nil {
		return a, 0, err
	}
	dev, err := d.open()
	if err != nil {
		return a, 0, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	plain := linuxabi.SnpReportReqABI{ReportData: data, Vmpl: level}
	table := make([]byte, MaxTableBytes)
	report, err := request(dev, linuxabi.IocSnpGetExtendedReport, &linuxabi.SnpExtendedReportReq{Data: plain, Certs: table, CertsLength: MaxTableBytes})
	if firmware, ok := errors.AsType[*abi.SevFirmwareErr](err); ok && firmware.Status == abi.GuestRequestInvalidLength {
		table = nil
		report, err = request(dev, linuxabi.IocSnpGetReport, &plain)
	}
	if err != nil {
		return a, 0, err
	}
	return Attestation{Report: report, Table: table}, level, nil
}

func request(dev ioctler, command uintptr, what linuxabi.BinaryConvertible) ([]byte, error) {
	var answer linuxabi.SnpReportRespABI
	req := linuxabi.SnpUserGuestRequest{ReqData: what, RespData: &answer}
	result, err := dev.Ioctl(command, &req)
	if err != nil && req.FwErr != 0 {
		err = fmt.Errorf("%w: %w", err, &abi.SevFirmwareErr{Status: abi.SevFirmwareStatus(req.FwErr)})
	}
	if err != nil {
		return nil, fmt.Errorf("asking sev-guest: %w", err)
	}
	if result != 0 || answer.Status != 0 || answer.ReportSize != reportSize {
		return nil, fmt.Errorf("asking sev-guest: result %d, status %#x, a report of %d bytes", result, answer.Status, answer.ReportSize)
	}
	return answer.Data[:reportSize], nil
}
