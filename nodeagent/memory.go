package main

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// memoryEvery is how often the heap is looked at, grownLimit how much it
	// may have grown since it was last cleared.
	memoryEvery = 5 * time.Second
	grownLimit  = 4 << 20
)

// returnMemory gives the operating system back what a burst of work left
// behind: a firmware image that was measured is some megabytes, an agent at
// rest needs two. Go would collect it after two minutes without work, and
// return it later still; the host's memory is for guests.
func returnMemory(ctx context.Context) error {
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	var h heap
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			h.clear()
		}
	}
}

// heap knows how much the process held when it was last cleared. Growth that
// is alive is asked for once and then known.
type heap struct{ known uint64 }

// clear collects garbage and returns free memory, if the heap has grown.
func (h *heap) clear() {
	if held := heldMemory(); held <= h.known+grownLimit {
		h.known = min(h.known, held)
		return
	}
	debug.FreeOSMemory()
	h.known = heldMemory()
}

// heldMemory is what objects, dead ones too, and free spans take, in bytes.
func heldMemory() uint64 {
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	metrics.Read(samples)
	return samples[0].Value.Uint64() + samples[1].Value.Uint64()
}
