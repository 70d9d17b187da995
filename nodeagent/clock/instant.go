package clock

import "time"

// Instant is a moment as both of the host's clocks told it: the wall clock,
// which people and other machines share and anybody may set, and the time
// since the host was started, which nobody can. The zero value is no moment.
type Instant struct {
	Wall time.Time
	// BootID names the boot that Up counts from. Records of earlier layouts
	// of the store have none.
	BootID string `json:",omitempty"`
	// Up is CLOCK_BOOTTIME: it goes on while the host is suspended.
	Up time.Duration `json:",omitempty"`
}

// Sub returns how long after u it was: by Up within one boot, whatever became
// of the wall clock meanwhile, and by the wall clock otherwise.
func (t Instant) Sub(u Instant) time.Duration {
	if t.BootID != "" && t.BootID == u.BootID {
		return t.Up - u.Up
	}
	return t.Wall.Sub(u.Wall)
}

// Add returns the moment d later.
func (t Instant) Add(d time.Duration) Instant {
	return Instant{t.Wall.Add(d), t.BootID, t.Up + d}
}

// Before reports whether t was before u.
func (t Instant) Before(u Instant) bool { return t.Sub(u) < 0 }

// IsZero reports whether t is no moment.
func (t Instant) IsZero() bool { return t.Wall.IsZero() }
