//go:build !emulated

package tee

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"
	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/client"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// Emulated says whether this build talks to an emulated processor.
const Emulated = false

// retryPause is waited between attempts; the host may throttle a guest's
// requests to about two per second.
const (
	retryPause = 500 * time.Millisecond
	attempts   = 20
)

// offVMPL is where a report says at which level it was asked for, and maxVMPL
// the least privileged level there is (AMD 56860).
const (
	offVMPL = 0x30
	maxVMPL = 3
)

// vmmBusy is the host's answer "later" in the upper half of a guest request's
// error (GHCB specification, SNP_GUEST_VMM_ERR_BUSY).
const vmmBusy abi.SevFirmwareStatus = 2 << 32

// source is one of the kernel's two interfaces. get asks for a report at the
// level the kernel runs at, and says which one that is.
type source interface {
	probe() error
	get(data [contract.ReportDataSize]byte) (Attestation, uint32, error)
}

// Open finds the platform's report interface: configfs-tsm, else
// /dev/sev-guest.
func Open() (Reporter, error) {
	device := &device{
		open:  func() (ioctler, error) { return client.OpenDevice() },
		level: "/sys/devices/system/cpu/sev/vmpl",
	}
	files, err := linuxtsm.MakeClient()
	if err != nil {
		return choose(device)
	}
	return choose(&configfs{files: files}, device)
}

// choose takes the first interface that answers.
func choose(sources ...source) (Reporter, error) {
	var why error
	for _, s := range sources {
		err := s.probe()
		if err == nil {
			return &hardware{source: s}, nil
		}
		why = errors.Join(why, err)
	}
	return nil, fmt.Errorf("%w: %w", ErrUnavailable, why)
}

type hardware struct {
	mu     sync.Mutex
	source source
}

// Report asks again while the processor or the host is busy, or when somebody
// else changed the request on its way. Any other error is final.
func (h *hardware) Report(ctx context.Context, data [contract.ReportDataSize]byte) (Attestation, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var last error
	for range attempts {
		a, level, err := h.source.get(data)
		if err == nil {
			err = checkLevel(a.Report, level)
		}
		if err == nil {
			return a, nil
		}
		if last = err; !transient(err) {
			break
		}
		select {
		case <-ctx.Done():
			return Attestation{}, fmt.Errorf("getting report: %w", errors.Join(ctx.Err(), last))
		case <-time.After(retryPause):
		}
	}
	return Attestation{}, fmt.Errorf("getting report: %w", last)
}

// checkLevel holds a report against the level it was asked for at. Verifiers
// take VMPL 0 only; a report that names another level than the kernel's own
// was made for somebody else.
func checkLevel(r []byte, level uint32) error {
	if len(r) != reportSize {
		return fmt.Errorf("the report has %d bytes, want %d", len(r), reportSize)
	}
	if got := binary.LittleEndian.Uint32(r[offVMPL:]); got != level {
		return fmt.Errorf("the report names VMPL %d, this kernel runs at %d", got, level)
	}
	return nil
}

// transient tells errors that pass. A request that timed out does not: the
// kernel gives up the key to the processor with it.
func transient(err error) bool {
	if _, changed := errors.AsType[*report.GenerationErr](err); changed {
		return true
	}
	if firmware, ok := errors.AsType[*abi.SevFirmwareErr](err); ok {
		return firmware.Status == vmmBusy
	}
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EINTR)
}
