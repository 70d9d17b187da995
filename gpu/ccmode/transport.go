package ccmode

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// transport carries packets, of dwords, between host and FSP.
type transport interface {
	// open makes the mailbox empty in both directions.
	open(ctx context.Context) error
	// exchange sends a packet and returns the answer. A time-out is silentError.
	exchange(ctx context.Context, packet []uint32) ([]uint32, error)
}

// silentError says what the FSP did not do in time.
type silentError struct{ what string }

func (e silentError) Error() string { return e.what }

// Limits are twice those of NVIDIA's tools.
const (
	idleLimit   = 2 * time.Second  // FSP takes a request
	answerLimit = 10 * time.Second // FSP answers
	staleLimit  = 5 * time.Second  // an answer to somebody before us arrives
	creditLimit = 2 * time.Second
	fastPoll    = time.Millisecond
	slowPoll    = 10 * time.Millisecond
)

// call sends one message and returns the checked answer. After a time-out the
// late answer to this message could be taken for the answer to the next, which
// carries no number of its own, so nothing more is sent before a reset.
func (d *Device) call(ctx context.Context, nvdm uint32, body ...uint32) (reply, error) {
	if d.silent != nil {
		return reply{}, d.silent
	}
	if !d.opened {
		if err := d.fsp.open(ctx); err != nil {
			return reply{}, d.transportError(err)
		}
		d.opened = true
	}
	packet, err := d.fsp.exchange(ctx, request(nvdm, body...))
	if err != nil {
		return reply{}, d.transportError(err)
	}
	r, err := parseReply(nvdm, packet)
	if err != nil {
		return reply{}, d.transportError(d.garbled(err))
	}
	return r, nil
}

func (d *Device) transportError(err error) error {
	if boot0, gone := d.readRaw(registerBoot0); gone != nil || boot0 == allOnes {
		return d.lost(gone)
	}
	if _, silent := errors.AsType[silentError](err); !silent {
		return err
	}
	refusal := contract.Refuse("gpu.fsp-silent",
		"reset the device; if it stays silent, power the host off and on",
		"%s: its boot processor (FSP) is silent: %v%s", d.name, err, d.fspStatus())
	d.silent = refusal
	return refusal
}

// fspStatus gives the FSP's own words for a report, "" when they cannot be read.
func (d *Device) fspStatus() string {
	var words [4]uint32
	for i := range words {
		var err error
		if words[i], err = d.readRaw(0x8f0320 + 4*uint32(i)); err != nil {
			return ""
		}
	}
	return fmt.Sprintf(" (FSP status %08x)", words)
}
