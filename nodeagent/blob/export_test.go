package blob

import "time"

// SetStall makes uploads give up sooner.
func (s *Spools) SetStall(d time.Duration) { s.stall = d }
