package main

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// hintsAge is how long certificates of the host are used before it is asked
// for newer ones: revocation lists are renewed while a guest runs.
const hintsAge = time.Hour

// signer tells whose certificate a report needs: the chip's at the TCB that
// the report states. An operator may change the latter under a running guest.
type signer [72]byte

// signerOf returns the zero signer for a report that cannot be read.
func signerOf(report []byte) (s signer) {
	r, err := snp.ParseReport(report)
	if err != nil {
		return s
	}
	copy(s[:], r.ChipID[:])
	binary.LittleEndian.PutUint64(s[64:], r.ReportedTCB)
	return s
}

// hints are the host's certificates, kept for the signer they were fetched for.
type hints struct {
	mu   sync.Mutex
	kept contract.Endorsements
	of   signer
	at   time.Time
}

// get returns certificates for a signer. The host is asked when there are
// none, when they were fetched for another signer, and when they are old; when
// it has no answer, what is there stays.
func (h *hints) get(ctx context.Context, of signer, now time.Time, fetch func(context.Context) (contract.Endorsements, error)) (contract.Endorsements, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.kept.VCEK) > 0 && h.of == of && now.Sub(h.at) < hintsAge {
		return h.kept, nil
	}
	e, err := fetch(ctx)
	if err != nil {
		return h.kept, err
	}
	h.kept, h.of, h.at = e, of, now
	return e, nil
}
