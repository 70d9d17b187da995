// Package kernellog reads what the host's kernel has said since it booted, as
// far as its ring buffer still holds it. It owns the record format of
// /dev/kmsg (Linux Documentation/ABI/testing/dev-kmsg) and nothing else: what a
// message means is for others.
package kernellog

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// maxRecord is the most the kernel writes at a time, maxRecords more than any
// ring buffer holds.
const (
	maxRecord  = 8192
	maxRecords = 1 << 18
)

// Device is the kernel's log from its oldest record on. Reading never waits.
type Device struct{ fd int }

// Open opens /dev/kmsg. It needs root, or kernel.dmesg_restrict=0.
func Open(path string) (*Device, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Device{fd}, nil
}

// Read reads one record. At the end of what was said it returns EAGAIN; EPIPE
// says that records were overwritten before they could be read.
func (d *Device) Read(p []byte) (int, error) { return unix.Read(d.fd, p) }

// Close closes the device.
func (d *Device) Close() error { return unix.Close(d.fd) }

// Messages returns the kernel's messages, oldest first: not those that
// programs wrote there, which anybody with root can make say anything. Lost
// records are no error.
func Messages(records io.Reader) ([]string, error) {
	var messages []string
	buffer := make([]byte, maxRecord)
	for range maxRecords {
		n, err := records.Read(buffer)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, io.EOF):
			return messages, nil
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.EINTR), errors.Is(err, unix.EINVAL):
			continue // overwritten, interrupted, or longer than any of interest
		case err != nil:
			return messages, fmt.Errorf("reading the kernel's log: %w", err)
		case n == 0:
			return messages, nil
		}
		if message, ok := parse(string(buffer[:n])); ok {
			messages = append(messages, message)
		}
	}
	return messages, nil
}

// parse returns the text of a record "PRIORITY,SEQUENCE,TIME,FLAGS…;TEXT\n",
// after which lines with a leading blank carry tags. The facility in the
// priority's upper bits is 0 for the kernel.
func parse(record string) (message string, ok bool) {
	head, text, found := strings.Cut(record, ";")
	var priority uint32
	if !found {
		return "", false
	}
	if _, err := fmt.Sscanf(head, "%d,", &priority); err != nil || priority>>3 != 0 {
		return "", false
	}
	message, _, _ = strings.Cut(text, "\n")
	return message, message != ""
}
