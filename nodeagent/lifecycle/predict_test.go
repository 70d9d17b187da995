package lifecycle_test

import (
	"context"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/ovmf"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
)

// The fake image's firmware is not even OVMF, which nobody but Predict minds.
func TestFirmwareThatIsNotAmdSevIsRefusedByName(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.measure = lifecycle.Predict
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m := h.life(ctx, nil)
	if err := h.execute(ctx, m, h.command(nil)); err != nil {
		t.Fatal(err)
	}
	s := h.ended(ctx)
	r := s.GetRefusal()
	if s.GetStatus() != api.GuestStatus_GUEST_STATUS_FAILED || r.GetCode() != ovmf.CodeNotAmdSev || !strings.Contains(r.GetRemedy(), "ovmf-amdsev") {
		t.Errorf("ended as %v", s)
	}
	h.clean()
}
