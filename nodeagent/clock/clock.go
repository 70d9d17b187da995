// Package clock is the agent's time, and its doubt about it.
//
// Wall clocks are set by hand, stepped by a time service, and start at 1970 on
// a host whose battery is empty; a command's window and a certificate's end
// depend on them all the same. So the agent goes by a time of its own: that of
// the wall clock for as long as it agrees with CLOCK_BOOTTIME, and from its
// last agreement on by CLOCK_BOOTTIME alone when it does not. The last
// agreement is on disk, so a restart of the agent forgets nothing.
//
// A wall clock that cannot be believed is a doubt: a typed refusal for new
// launches. Guests that run are unharmed by it: their deadlines are Instants.
// A doubt ends
//
//   - when the wall clock agrees again, within Bound, with the agent's time;
//     after a reboot, when it is not before the newest time on disk any more;
//   - when the kernel says that a time service keeps the clock synchronised
//     (adjtimex without STA_UNSYNC; setting the clock by hand sets that flag);
//   - when the operator accepts the clock as it is (Accept).
//
// A clock before the build of the agent is wrong whatever anybody says: only
// setting it helps. A Clock is safe for concurrent use.
package clock

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
)

const (
	// Bound is how far the wall clock may be from where it was last seen plus
	// the time that has passed. Windows of commands tolerate as much; a time
	// service that slews moves a clock by 0.5 ms a second.
	Bound = 2 * time.Minute
	// saveEvery is how often the agreement of the clocks is put on disk.
	saveEvery = time.Minute
)

// Codes of doubts.
const (
	// CodeJumped: the wall clock moved and the time since the boot did not.
	CodeJumped = "clock.jumped"
	// CodeBehind: the wall clock is before the newest time on disk.
	CodeBehind = "clock.behind"
	// CodeBeforeBuild: the wall clock is before the agent was built.
	CodeBeforeBuild = "clock.before-build"
)

// Records keep the last agreement; the zero Instant is none.
type Records interface {
	LastSeen() (Instant, error)
	SaveLastSeen(seen Instant) error
}

// Deps are what a Clock is made of. All are required unless said otherwise.
type Deps struct {
	// Read reads both clocks: (Host).Read.
	Read func() Instant
	// Synchronised reports whether a time service keeps the wall clock:
	// (Host).Synchronised.
	Synchronised func() bool
	Records      Records
	// Built is when the agent was built; zero when that is not known.
	Built  time.Time
	Logger hclog.Logger
	// Saved, if set, is called whenever the store has answered.
	Saved func()
}

// Clock is the agent's time.
type Clock struct {
	d Deps

	saving sync.Mutex // before mu; guards seen
	// seen is the last agreement on disk.
	seen Instant

	mu sync.Mutex // never held while the store writes; guards below
	// anchor is the last agreement.
	anchor Instant
	// atLeast says that anchor is the earliest that it may be, not what it is.
	atLeast bool
	doubt   *contract.Refusal
}

// New goes on where the last agent of this host was.
func New(d Deps) (*Clock, error) {
	if d.Read == nil || d.Synchronised == nil || d.Records == nil || d.Logger == nil {
		return nil, errors.New("making clock: a dependency is missing")
	}
	c := &Clock{d: d}
	c.d.Logger = d.Logger.Named("clock")
	seen, err := d.Records.LastSeen()
	if err != nil {
		return nil, fmt.Errorf("reading when the host was last seen: %w", err)
	}
	now := d.Read()
	c.seen, c.anchor = seen, seen
	switch {
	case seen.IsZero():
		c.anchor = now
	case seen.BootID != now.BootID || now.Up < seen.Up:
		// How long the host was off is known to its wall clock alone.
		c.anchor, c.atLeast = Instant{seen.Wall, now.BootID, now.Up}, true
	}
	c.judgeLocked(now)
	return c, nil
}

// Now is the agent's time.
func (c *Clock) Now() Instant {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.d.Read()
	c.judgeLocked(now)
	if c.doubt == nil {
		return now
	}
	return c.anchor.Add(now.Up - c.anchor.Up)
}

// Wall is the agent's time for whoever needs no more.
func (c *Clock) Wall() time.Time { return c.Now().Wall }

// Doubt says why the wall clock cannot be believed, and is nil when it can.
func (c *Clock) Doubt() *contract.Refusal {
	c.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.doubt
}

// judgeLocked compares the clocks, and anchors the agent's time where they
// agree.
func (c *Clock) judgeLocked(now Instant) {
	own := c.anchor.Add(now.Up - c.anchor.Up)
	off := now.Wall.Sub(own.Wall)
	early := now.Wall.Before(c.d.Built)
	agrees := off >= -Bound && (off <= Bound || c.atLeast)
	switch {
	case early:
		c.doubtLocked(CodeBeforeBuild, "set the host's clock, best by a time service; a clock before the agent was built cannot be accepted",
			"the host's clock says %s, the agent was built %s", stamp(now.Wall), stamp(c.d.Built))
	case agrees, c.d.Synchronised():
		c.believeLocked(now)
	case c.atLeast:
		c.doubtLocked(CodeBehind, remedy, "the host's clock says %s, and it was %s already when the agent last ran", stamp(now.Wall), stamp(own.Wall))
	default:
		c.doubtLocked(CodeJumped, remedy, "the host's clock says %s, by the time since the boot it is %s", stamp(now.Wall), stamp(own.Wall))
	}
}

const remedy = "let a time service set the host's clock (chronyc tracking, timedatectl); if the clock is right as it is, tell the agent: nodeagent clock accept"

func (c *Clock) doubtLocked(code, remedy, format string, args ...any) {
	news := c.doubt == nil || c.doubt.Code != code
	c.doubt = contract.Refuse(code, remedy, format, args...)
	if news {
		c.d.Logger.Error("the host's clock cannot be believed: nothing is launched until it can, guests go on running",
			"code", code, "remedy", remedy, "err", c.doubt)
	}
}

func (c *Clock) believeLocked(now Instant) {
	if c.doubt != nil {
		c.d.Logger.Info("the host's clock is believed again", "now", stamp(now.Wall))
	}
	c.anchor, c.atLeast, c.doubt = now, false, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Accept believes the wall clock as it is, because the operator says so.
func (c *Clock) Accept() error {
	c.saving.Lock()
	defer c.saving.Unlock()
	switch doubt := c.Doubt(); {
	case doubt == nil:
		return nil
	case doubt.Code == CodeBeforeBuild:
		return doubt
	default:
		c.d.Logger.Warn("the operator accepts the host's clock", "code", doubt.Code)
	}
	now := c.d.Read()
	// On disk first: a restart must not bring the doubt back.
	if err := c.d.Records.SaveLastSeen(now); err != nil {
		return fmt.Errorf("recording the host's clock: %w", err)
	}
	c.seen = now
	c.mu.Lock()
	defer c.mu.Unlock()
	c.believeLocked(now)
	return nil
}

// Run looks at the clocks and keeps their agreement on disk until ctx ends.
func (c *Clock) Run(ctx context.Context) error {
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	for {
		c.save()
		if c.d.Saved != nil {
			c.d.Saved()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// save puts the last agreement on disk; in doubt it is the one that is there.
func (c *Clock) save() {
	c.saving.Lock()
	defer c.saving.Unlock()
	now := c.Now()
	c.mu.Lock()
	if c.doubt == nil {
		c.seen = now
	}
	c.mu.Unlock()
	if err := c.d.Records.SaveLastSeen(c.seen); err != nil {
		c.d.Logger.Warn("the time could not be recorded; see that the disk of state_dir has space and can be written", "err", err)
	}
}
