//go:build emulated

package tee

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"
	"time"
)

// replay is a port on which the other side says what it was given.
type replay struct{ io.Reader }

func (replay) Write(b []byte) (int, error) { return len(b), nil }
func (replay) SetDeadline(time.Time) error { return nil }

func FuzzChannel(f *testing.F) {
	answer := func(text string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
	}
	f.Add(answer(`{"report":"AAAA"}`))
	f.Add(answer(`{"error":"busy"}`))
	f.Add([]byte{0, 1, 0, 1, 0})
	f.Fuzz(func(t *testing.T, said []byte) {
		c := &channel{port: replay{bytes.NewReader(said)}}
		a, err := c.Report(t.Context(), [64]byte{})
		if err == nil && len(a.Report) > len(said) {
			t.Errorf("a report of %d bytes in %d", len(a.Report), len(said))
		}
		if len(said) < 4 && c.broken == nil {
			t.Error("the channel goes on after an answer that broke off")
		}
	})
}
