package tee

import (
	"bytes"
	"testing"
)

func FuzzHostData(f *testing.F) {
	f.Add(make([]byte, reportSize), make([]byte, 64))
	f.Add([]byte{}, bytes.Repeat([]byte{1}, 64))
	f.Fuzz(func(t *testing.T, report, asked []byte) {
		var data [64]byte
		copy(data[:], asked)
		if _, err := HostData(report, data); err == nil && (len(report) != reportSize || !bytes.Contains(report, data[:])) {
			t.Errorf("a report of %d bytes answers another request", len(report))
		}
	})
}
