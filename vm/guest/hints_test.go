package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

func TestTheHostIsAskedAgainWhenItsCertificatesNoLongerFit(t *testing.T) {
	t.Parallel()
	report := func(tcb uint64, chip byte) signer {
		return signerOf((&snp.Report{Version: 3, SigAlgo: 1, Family: 0x19, Model: 0x11, ReportedTCB: tcb, ChipID: [64]byte{chip}}).Marshal())
	}
	start := time.Unix(1e9, 0)
	away := errors.New("no answer")
	var h hints
	for i, c := range []struct {
		of     signer
		after  time.Duration
		serves string
		fails  error
		want   string
		asked  bool
	}{
		{report(1, 1), 0, "", nil, "", true},
		{report(1, 1), time.Second, "old", nil, "old", true}, // nothing was kept
		{report(1, 1), time.Minute, "x", nil, "old", false},
		{report(2, 1), time.Minute, "new TCB", nil, "new TCB", true},
		{report(2, 1), 2 * time.Minute, "x", nil, "new TCB", false},
		{report(2, 2), 2 * time.Minute, "", away, "new TCB", true},
		{report(2, 1), 3 * time.Hour, "renewed", nil, "renewed", true},
	} {
		asked := false
		got, err := h.get(t.Context(), c.of, start.Add(c.after), func(context.Context) (contract.Endorsements, error) {
			asked = true
			return contract.Endorsements{VCEK: []byte(c.serves)}, c.fails
		})
		if string(got.VCEK) != c.want || asked != c.asked || !errors.Is(err, c.fails) {
			t.Errorf("row %d: %q (asked %v, %v), want %q", i, got.VCEK, asked, err, c.want)
		}
	}
	if signerOf([]byte("no report")) != (signer{}) || report(1, 1) == report(1, 2) || report(1, 1) == report(2, 1) {
		t.Error("signers are not told apart")
	}
}
