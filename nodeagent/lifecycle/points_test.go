//go:build emulated

package lifecycle_test

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
)

// A step without its points would be left out of the crash matrix.
func TestEveryStepHasItsPoints(t *testing.T) {
	t.Parallel()
	own := func(p string) bool { return strings.HasPrefix(p, "sending:") || strings.HasPrefix(p, "settled:") }
	for name, c := range map[string]struct{ seen, want []string }{
		"without GPUs": {points(t, nil), lifecycle.Points()},
		"with GPUs":    {pointsOf(newGPUHost(t).ready(), withGPU(t, "H100", 1)), lifecycle.GPUPoints()},
	} {
		if seen := slices.DeleteFunc(c.seen, own); !slices.Equal(seen, c.want) {
			t.Errorf("a guest's life %s passes\n%v\nby the list of steps it should pass\n%v", name, seen, c.want)
		}
	}
}

// The delivery of a result in parts, broken at each of its points.
func TestAnUploadInPartsOutlivesTheAgent(t *testing.T) {
	t.Parallel()
	for _, point := range lifecycle.UploadPoints("out") {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			uploadOutlives(t, point)
		})
	}
}

// uploadOutlives ends the agent at a point of the delivery of "out".
func uploadOutlives(t *testing.T, point string) {
	t.Helper()
	h := newHost(t)
	ctx, die := context.WithCancel(t.Context())
	var m atomic.Pointer[lifecycle.Manager]
	first, over := h.lifeUntil(ctx, func(p string) {
		if p == point {
			die()
		}
	})
	m.Store(first)
	next := make(chan struct{})
	go func() {
		defer close(next)
		<-over
		h.world.ProcessDied()
		m.Store(h.life(t.Context(), nil))
	}()
	go h.guest(t.Context())
	if err := h.execute(ctx, first, h.command(inParts(2))); err != nil {
		t.Fatal(err)
	}
	nth(h, 1, (*api.Event).GetUploadGrantWanted)
	again := func(cmd *api.Command) { // as the inbox does with what was not finished
		for range 2 {
			if ctx.Err() != nil {
				<-next
			}
			if err := h.execute(t.Context(), m.Load(), cmd); err != nil {
				t.Fatal(err)
			}
		}
	}
	again(granting(grantOf("u-1", 3, 128, "")))
	ready := nth(h, 1, (*api.Event).GetUploadReady)
	if err := h.world.Complete(ready.GetUploadId(), outURL, ready.GetEtags()); err != nil {
		t.Fatal(err)
	}
	again(settling("out", "u-1"))
	h.ends(t.Context(), finished, "")
	if n := len(bodies(h, (*api.Event).GetResultUploaded)); n != 2 {
		t.Errorf("%d results were told", n)
	}
	if ctx.Err() == nil {
		t.Error("the agent never died")
	}
}
