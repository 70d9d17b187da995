//go:build emulated

package failpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// pollInterval is how often a held process looks whether it may go on.
const pollInterval = 10 * time.Millisecond

// Points are the armed faults of one process, or of one test.
type Points struct {
	// Sleep is the real clock's unless a test brings its own.
	Sleep func(time.Duration)
	file  string

	mu    sync.Mutex
	armed map[string]string // fault by point
}

// New makes points without a fault.
func New() *Points { return &Points{Sleep: sleep, armed: map[string]string{}} }

// FromEnvironment makes the points of this process: nil unless FileEnv is set.
func FromEnvironment() *Points {
	p := New()
	if p.file = os.Getenv(FileEnv); p.file == "" {
		return nil
	}
	return p
}

func sleep(d time.Duration) { <-time.After(d) }

// Arm puts a fault on a point.
func (p *Points) Arm(point, fault string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed[point] = fault
}

// Disarm takes it away, and lets go who is held there.
func (p *Points) Disarm(point string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.armed, point)
}

// Hit carries out the fault of a point. It panics on a fault it does not know:
// a test with a typing error must not pass.
func (p *Points) Hit(point string) error {
	if p == nil {
		return nil
	}
	fault, armed := p.fault(point)
	if !armed {
		return nil
	}
	action, rest, _ := strings.Cut(fault, "(")
	arg := strings.TrimSuffix(rest, ")")
	switch {
	case action == "error" && arg == "ENOSPC":
		return fmt.Errorf("failpoint %s: %w", point, syscall.ENOSPC)
	case action == "error":
		return fmt.Errorf("failpoint %s: %w", point, errors.New(arg))
	case action == "panic":
		panic("failpoint " + point)
	case action == "kill" && arg == "":
		kill()
	case action == "kill":
		time.AfterFunc(duration(point, arg), kill)
	case action == "delay":
		p.Sleep(duration(point, arg))
	case action == "hang":
		for still := fault; armed && still == fault; still, armed = p.fault(point) {
			sleep(pollInterval)
		}
	default:
		panic(fmt.Sprintf("failpoint %s: unknown fault %q", point, fault))
	}
	return nil
}

func (p *Points) fault(point string) (string, bool) {
	p.mu.Lock()
	fault, armed := p.armed[point]
	p.mu.Unlock()
	if armed || p.file == "" {
		return fault, armed
	}
	text, err := os.ReadFile(p.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		panic(fmt.Sprintf("failpoint %s: %v", point, err))
	}
	for line := range strings.Lines(string(text)) {
		if name, fault, ok := strings.Cut(strings.TrimSpace(line), "="); ok && name == point {
			return fault, true
		}
	}
	return "", false
}

func duration(point, arg string) time.Duration {
	d, err := time.ParseDuration(arg)
	if err != nil {
		panic(fmt.Sprintf("failpoint %s: %v", point, err))
	}
	return d
}

// kill ends the process as a power cut does: nothing is cleaned up.
func kill() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}
