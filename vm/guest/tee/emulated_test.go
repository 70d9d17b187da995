//go:build emulated

package tee

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// processor answers each request with the next answer; "" leaves it waiting.
func processor(t *testing.T, answers ...string) *channel {
	t.Helper()
	guest, far := net.Pipe()
	t.Cleanup(func() { _, _ = guest.Close(), far.Close() })
	go func() {
		for _, answer := range answers {
			var size [4]byte
			if _, err := io.ReadFull(far, size[:]); err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, far, int64(binary.BigEndian.Uint32(size[:]))); err != nil || answer == "" {
				continue
			}
			binary.BigEndian.PutUint32(size[:], uint32(len(answer)))
			if answer == "huge" {
				size = [4]byte{255}
			}
			_, _ = far.Write(append(size[:], answer...))
		}
	}()
	return &channel{port: guest}
}

func TestReportsComeOverTheChannelInFrames(t *testing.T) {
	t.Parallel()
	text, err := json.Marshal(map[string][]byte{"report": []byte("the report")})
	if err != nil {
		t.Fatal(err)
	}
	c := processor(t, string(text), `{"error":"busy"}`, string(text))
	if r, err := c.Report(t.Context(), [64]byte{}); err != nil || string(r.Report) != "the report" {
		t.Errorf("%q %v", r.Report, err)
	}
	if _, err := c.Report(t.Context(), [64]byte{}); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("%v", err)
	}
	if _, err := c.Report(t.Context(), [64]byte{}); err != nil {
		t.Errorf("after an error of the processor's: %v", err)
	}
}

func TestASilentProcessorEndsWithTheContextAndBreaksTheChannel(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{"", "huge"} {
		c := processor(t, answer)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		_, err := c.Report(ctx, [64]byte{})
		cancel()
		if err == nil {
			t.Fatalf("%q: no error", answer)
		}
		if _, err := c.Report(t.Context(), [64]byte{}); err == nil || !strings.Contains(err.Error(), "out of step") {
			t.Errorf("%q: %v", answer, err)
		}
	}
}

func TestThePortIsFoundByItsName(t *testing.T) {
	t.Parallel()
	class, dev := t.TempDir(), t.TempDir()
	if _, err := openPort(class, dev); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v", err)
	}
	for port, name := range map[string]string{"vport1p1": "org.other", "vport1p2": portName} {
		if err := errors.Join(os.MkdirAll(filepath.Join(class, port), 0o755), os.WriteFile(filepath.Join(class, port, "name"), []byte(name+"\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dev, "vport1p2"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openPort(class, dev); err != nil {
		t.Error(err)
	}
}
