package clock

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Host is the machine's clocks.
type Host struct{ bootID string }

// NewHost finds out which boot this is; root is / unless in tests.
func NewHost(root string) (Host, error) {
	text, err := os.ReadFile(filepath.Join(root, "proc/sys/kernel/random/boot_id"))
	id := strings.TrimSpace(string(text))
	if err == nil && id == "" {
		err = fmt.Errorf("the file is empty")
	}
	if err != nil {
		return Host{}, fmt.Errorf("reading the host's boot id: %w", err)
	}
	return Host{id}, nil
}

// BootID names this boot.
func (h Host) BootID() string { return h.bootID }

// Read reads both clocks.
func (h Host) Read() Instant {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		panic(fmt.Sprintf("reading the time since the boot: %v", err)) // Linux has had it since 2.6.39
	}
	// Without Go's monotonic part: two of these must differ as the wall does.
	return Instant{time.Now().Round(0), h.bootID, time.Duration(up.Nano())}
}

// Synchronised reports whether the kernel is told that the wall clock is kept
// by a time service: the kernel sets STA_UNSYNC when the clock is set by hand
// and when the service has been silent for hours.
func (h Host) Synchronised() bool {
	const timeError = 5 // TIME_ERROR, linux/timex.h
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	return err == nil && state != timeError && t.Status&unix.STA_UNSYNC == 0
}
