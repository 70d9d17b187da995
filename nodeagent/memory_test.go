package main

import "testing"

func TestWhatABurstLeavesIsReturned(t *testing.T) {
	var h heap
	h.clear()
	rest := h.known
	burst := make([]byte, 64<<20)
	for i := range burst {
		burst[i] = 1
	}
	h.clear()
	if h.known < rest+32<<20 {
		t.Errorf("%d bytes held while 64 MiB are in use, %d before", h.known, rest)
	}
	if burst[len(burst)-1] != 1 {
		t.Fatal("the burst was not kept")
	}
	// The burst is garbage from here on.
	h.known = rest // as after a collection of Go's own
	h.clear()
	if h.known > rest+32<<20 {
		t.Errorf("%d bytes held after the burst, %d before", h.known, rest)
	}
}
