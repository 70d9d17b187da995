//go:build emulated

package tee

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Emulated says whether this build talks to an emulated processor.
const Emulated = true

// portName is the virtio-serial port that leads to the emulated processor.
const portName = "org.confidential-node.psp"

// maxFrame bounds one message in either direction.
const maxFrame = 64 << 10

// Open finds the emulated processor's port.
func Open() (Reporter, error) { return openPort("/sys/class/virtio-ports", "/dev") }

func openPort(class, dev string) (Reporter, error) {
	names, err := filepath.Glob(filepath.Join(class, "*", "name"))
	if err != nil {
		return nil, fmt.Errorf("listing ports: %w", err)
	}
	for _, file := range names {
		name, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(name)) != portName {
			continue
		}
		port, err := os.OpenFile(filepath.Join(dev, filepath.Base(filepath.Dir(file))), os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("opening port: %w", err)
		}
		return &channel{port: port}, nil
	}
	return nil, fmt.Errorf("%w: no port %s", ErrUnavailable, portName)
}

// port is what the channel needs of a device file.
type port interface {
	io.ReadWriter
	SetDeadline(t time.Time) error
}

// channel speaks frames: a big-endian uint32 length, then that much JSON.
type channel struct {
	mu     sync.Mutex
	port   port
	broken error
}

// Report asks the emulated processor. After an interrupted exchange the
// channel is out of step and refuses to go on.
func (c *channel) Report(ctx context.Context, data [contract.ReportDataSize]byte) (Attestation, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return Attestation{}, fmt.Errorf("getting report: channel is out of step: %w", c.broken)
	}
	report, err := c.exchange(ctx, data[:])
	if err != nil {
		return Attestation{}, fmt.Errorf("getting report: %w", err)
	}
	return Attestation{Report: report}, nil
}

func (c *channel) exchange(ctx context.Context, data []byte) ([]byte, error) {
	deadline, _ := ctx.Deadline()
	if err := c.port.SetDeadline(deadline); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.port.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	text, err := json.Marshal(struct {
		ReportData []byte `json:"report_data"`
	}{data})
	if err != nil {
		return nil, err
	}
	answer, err := c.frame(text)
	if err != nil {
		c.broken = err
		return nil, err
	}
	var r struct {
		Report []byte `json:"report"`
		Error  string `json:"error"`
	}
	if err := contract.UnmarshalStrict(answer, maxFrame, &r); err != nil {
		return nil, err
	}
	if r.Error != "" {
		return nil, errors.New(r.Error)
	}
	return r.Report, nil
}

func (c *channel) frame(text []byte) ([]byte, error) {
	var size [4]byte
	binary.BigEndian.PutUint32(size[:], uint32(len(text)))
	if _, err := c.port.Write(append(size[:], text...)); err != nil {
		return nil, fmt.Errorf("asking: %w", err)
	}
	if _, err := io.ReadFull(c.port, size[:]); err != nil {
		return nil, fmt.Errorf("waiting for the answer: %w", err)
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxFrame {
		return nil, fmt.Errorf("answer of %d bytes", n)
	}
	answer := make([]byte, n)
	if _, err := io.ReadFull(c.port, answer); err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	return answer, nil
}
