//go:build !emulated

package tee

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"
	"github.com/google/go-sev-guest/client"

	"github.com/confidential-node/agent/firmware/contract"
)

// Emulated says whether this build talks to an emulated processor.
const Emulated = false

// provider is what the kernel calls SEV-SNP in configfs-tsm.
const provider = "sev_guest"

// retryPause is waited between attempts; the host may throttle a guest's
// requests to about two per second.
const (
	retryPause = 500 * time.Millisecond
	attempts   = 10
)

// Open finds the platform's report interface: configfs-tsm, else
// /dev/sev-guest.
func Open() (Reporter, error) {
	if tsm, err := linuxtsm.MakeClient(); err == nil {
		return &hardware{get: func(data [contract.ReportDataSize]byte) ([]byte, error) {
			r, err := report.Get(tsm, &report.Request{InBlob: data[:]})
			if err != nil {
				return nil, err
			}
			if strings.TrimSpace(r.Provider) != provider {
				return nil, fmt.Errorf("provider is %q, want %q", r.Provider, provider)
			}
			return r.OutBlob, nil
		}}, nil
	}
	device := &client.LinuxIoctlQuoteProvider{}
	if !device.IsSupported() {
		return nil, fmt.Errorf("%w: neither configfs-tsm nor /dev/sev-guest", ErrUnavailable)
	}
	return &hardware{get: device.GetRawQuote}, nil
}

type hardware struct {
	mu  sync.Mutex
	get func([contract.ReportDataSize]byte) ([]byte, error)
}

// Report asks again while the processor is busy. Neither library says so in a
// form one could branch on, so every error is tried a few times.
func (h *hardware) Report(ctx context.Context, data [contract.ReportDataSize]byte) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var last error
	for range attempts {
		out, err := h.get(data)
		if err == nil && len(out) >= reportSize {
			return out[:reportSize], nil
		}
		if last = err; err == nil {
			last = fmt.Errorf("report has %d bytes, want %d", len(out), reportSize)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("getting report: %w", errors.Join(ctx.Err(), last))
		case <-time.After(retryPause):
		}
	}
	return nil, fmt.Errorf("getting report: %w", last)
}
