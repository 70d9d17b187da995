package teetest

import (
	"github.com/google/go-sev-guest/client/linuxabi"
	"golang.org/x/sys/unix"
)

// What the host answers in the upper half of a guest request's error, and the
// kernel's bounds of a certificate buffer.
const (
	hostTooShort = 1 << 32
	hostBusy     = 2 << 32
	pageSize     = 4096
	maxBuffer    = 0x4000
)

// Device is the Platform's /dev/sev-guest, open.
type Device struct {
	*Platform
	closed bool
}

// Close closes it, once.
func (d *Device) Close() error {
	if d.closed {
		return unix.EBADF
	}
	d.closed = true
	return nil
}

// Ioctl answers GET_REPORT and GET_EXT_REPORT.
func (d *Device) Ioctl(command uintptr, argument any) (uintptr, error) {
	req, ok := argument.(*linuxabi.SnpUserGuestRequest)
	if d.closed || !ok {
		return 0, unix.EBADF
	}
	answer, ok := req.RespData.(*linuxabi.SnpReportRespABI)
	if !ok {
		return 0, unix.EFAULT
	}
	if d.Wiped {
		return 0, unix.ENOTTY
	}
	switch what := req.ReqData.(type) {
	case *linuxabi.SnpReportReqABI:
		if command != linuxabi.IocSnpGetReport {
			return 0, unix.ENOTTY
		}
		return d.give(req, answer, what)
	case *linuxabi.SnpExtendedReportReq:
		if command != linuxabi.IocSnpGetExtendedReport {
			return 0, unix.ENOTTY
		}
		if what.CertsLength > maxBuffer || what.CertsLength%pageSize != 0 {
			return 0, unix.EINVAL
		}
		if len(what.Certs) < int(what.CertsLength) {
			return 0, unix.EFAULT
		}
		if len(d.Table) > int(what.CertsLength) {
			what.CertsLength = uint32((len(d.Table) + pageSize - 1) / pageSize * pageSize)
			req.FwErr = hostTooShort
			return 0, unix.EIO
		}
		clear(what.Certs)
		copy(what.Certs, d.Table)
		return d.give(req, answer, &what.Data)
	}
	return 0, unix.ENOTTY
}

func (d *Device) give(req *linuxabi.SnpUserGuestRequest, answer *linuxabi.SnpReportRespABI, what *linuxabi.SnpReportReqABI) (uintptr, error) {
	if d.Busy > 0 {
		d.Busy--
		req.FwErr = hostBusy
		return 0, unix.EIO
	}
	d.Asked++
	if what.Vmpl < d.VMPL || what.Vmpl > maxVMPL {
		answer.Status = 0x16 // invalid parameter (AMD 56860, MSG_REPORT_RSP)
		return 0, answer.Finish(req.RespData)
	}
	answer.ReportSize = reportSize
	copy(answer.Data[:], d.report(what.ReportData[:], what.Vmpl))
	return 0, nil //nolint:nilnil // zero is an ioctl's success
}
