package clock_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
)

const years = 3 * 365 * 24 * time.Hour

func built() time.Time { return time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC) }
func noon() time.Time  { return time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC) }

// life is one agent on a host; it is on disk when life returns.
func life(t *testing.T, h *clocktest.Host) *clock.Clock {
	t.Helper()
	c, err := clock.New(clock.Deps{Read: h.Read, Synchronised: h.Synchronised, Records: h, Built: built(), Logger: hclog.NewNullLogger()})
	if err != nil {
		t.Fatal(err)
	}
	turn(t, c)
	return c
}

// turn has the agent save once.
func turn(t *testing.T, c *clock.Clock) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

func wants(t *testing.T, c *clock.Clock, code string, wall time.Time) {
	t.Helper()
	got := ""
	if doubt := c.Doubt(); doubt != nil {
		got = doubt.Code
		if doubt.Remedy == "" {
			t.Error("a doubt without a remedy")
		}
	}
	if got != code {
		t.Errorf("doubt %q, want %q", got, code)
	}
	if now := c.Wall(); !now.Equal(wall) {
		t.Errorf("it is %v, want %v", now, wall)
	}
}

func TestAJumpOfYearsIsDoubtedAndTheTimeGoesOn(t *testing.T) {
	t.Parallel()
	for name, jump := range map[string]time.Duration{"forth": years, "back": -years, "beyond the bound": clock.Bound + time.Second, "a little more back": -clock.Bound - time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := clocktest.New(noon())
			c := life(t, h)
			wants(t, c, "", noon())
			code := clock.CodeJumped
			if name == "back" {
				code = clock.CodeBeforeBuild
			}
			h.Pass(time.Hour)
			turn(t, c)
			h.Step(jump)
			wants(t, c, code, noon().Add(time.Hour))
			h.Pass(time.Hour) // suspended or not
			wants(t, c, code, noon().Add(2*time.Hour))
			// Another agent of the same boot knows no better.
			c = life(t, h)
			wants(t, c, code, noon().Add(2*time.Hour))
			h.Pass(time.Hour)
			h.Step(-jump)
			wants(t, c, "", noon().Add(3*time.Hour))
		})
	}
}

func TestAClockThatIsSlewedIsFollowed(t *testing.T) {
	t.Parallel()
	h := clocktest.New(noon())
	c := life(t, h)
	for range 10 {
		h.Pass(time.Minute)
		h.Step(time.Minute)
		wants(t, c, "", h.Read().Wall)
		turn(t, c)
	}
	wants(t, life(t, h), "", noon().Add(20*time.Minute))
}

// What a time service says is believed: it is why the clock jumped.
func TestASynchronisedClockIsBelieved(t *testing.T) {
	t.Parallel()
	h := clocktest.New(noon().Add(years)) // nothing contradicts it at first
	c := life(t, h)
	wants(t, c, "", noon().Add(years))
	accepted := c.Now()
	h.Synchronise(noon())
	wants(t, c, "", noon())
	h.Pass(time.Hour)
	if passed := c.Now().Sub(accepted); passed != time.Hour {
		t.Errorf("since a moment before the clock was set it took %v", passed)
	}
	h.Step(years) // by hand
	wants(t, c, clock.CodeJumped, noon().Add(time.Hour))
	h.Synchronise(noon().AddDate(-1, 0, 0))
	wants(t, c, clock.CodeBeforeBuild, noon().Add(time.Hour))
}

func TestAfterARebootTheClockMustNotBeBeforeWhatIsOnDisk(t *testing.T) {
	t.Parallel()
	h := clocktest.New(noon())
	turn(t, life(t, h))
	h.Reboot(24 * time.Hour)
	wants(t, life(t, h), "", noon().Add(24*time.Hour))
	h.Reboot(-10 * 24 * time.Hour)
	c := life(t, h)
	wants(t, c, clock.CodeBehind, noon().Add(24*time.Hour))
	turn(t, c)
	c = life(t, h) // a restart in between changes nothing
	wants(t, c, clock.CodeBehind, noon().Add(24*time.Hour))
	h.Step(15 * 24 * time.Hour) // set by hand, to what may be right
	wants(t, c, "", noon().Add(6*24*time.Hour))
	h.Step(-years)
	wants(t, c, clock.CodeBeforeBuild, noon().Add(6*24*time.Hour))
}

func TestTheOperatorsWordEndsADoubtForGood(t *testing.T) {
	t.Parallel()
	h := clocktest.New(noon())
	c := life(t, h)
	h.Step(years)
	h.FailRecords(errors.New("disk full"))
	if err := c.Accept(); err == nil {
		t.Error("accepted although it could not be recorded")
	}
	wants(t, c, clock.CodeJumped, noon())
	h.FailRecords(nil)
	if err := c.Accept(); err != nil {
		t.Fatal(err)
	}
	wants(t, c, "", noon().Add(years))
	wants(t, life(t, h), "", noon().Add(years))
	h.Step(-2 * years)
	c = life(t, h)
	if err := c.Accept(); err == nil {
		t.Error("a clock before the build is accepted")
	}
	wants(t, c, clock.CodeBeforeBuild, noon().Add(years))
}

func TestAFirstStartBeforeTheBuildIsDoubted(t *testing.T) {
	t.Parallel()
	h := clocktest.New(time.Unix(0, 0))
	c := life(t, h)
	wants(t, c, clock.CodeBeforeBuild, time.Unix(0, 0))
	h.Synchronise(noon())
	wants(t, c, "", noon())
}

// The time is recorded every minute, and a store that fails is an answer too:
// only one that is silent is a hang.
func TestTheTimeIsRecordedAndTheStoresAnswersAreTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := clocktest.New(noon())
		var answers atomic.Int32
		c, err := clock.New(clock.Deps{
			Read: h.Read, Synchronised: h.Synchronised, Records: h, Logger: hclog.NewNullLogger(), Saved: func() { answers.Add(1) },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- c.Run(ctx) }()
		h.Pass(time.Hour)
		time.Sleep(time.Minute + time.Second) //nolint:forbidigo // fake time
		if seen, err := h.LastSeen(); err != nil || !seen.Wall.Equal(noon().Add(time.Hour)) || answers.Load() != 2 {
			t.Errorf("recorded %v %v, %d answers", seen, err, answers.Load())
		}
		h.FailRecords(errors.New("disk full"))
		time.Sleep(time.Minute) //nolint:forbidigo // fake time
		if answers.Load() != 3 {
			t.Errorf("%d answers", answers.Load())
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestInstantsGoByTheBootAndAcrossBootsByTheWall(t *testing.T) {
	t.Parallel()
	a := clock.Instant{Wall: noon(), BootID: "a", Up: time.Hour}
	for name, c := range map[string]struct {
		at   clock.Instant
		want time.Duration
	}{
		"same boot, years ahead": {clock.Instant{noon().Add(years), "a", 2 * time.Hour}, time.Hour},
		"same boot, years back":  {clock.Instant{noon().Add(-years), "a", 2 * time.Hour}, time.Hour},
		"another boot":           {clock.Instant{noon().Add(time.Minute), "b", 99 * time.Hour}, time.Minute},
		"no boot known":          {clock.Instant{Wall: noon().Add(time.Minute)}, time.Minute},
	} {
		if got := c.at.Sub(a); got != c.want || c.at.Before(a) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		if got := a.Add(time.Minute).Sub(a); got != time.Minute {
			t.Errorf("a minute later is %v later", got)
		}
	}
	plain := clock.Instant{Wall: noon()}
	if got := plain.Add(time.Minute).Sub(plain); got != time.Minute || !(clock.Instant{}).IsZero() || plain.IsZero() {
		t.Errorf("without a boot a minute is %v", got)
	}
}

func TestTheHostsClocksAreRead(t *testing.T) {
	t.Parallel()
	h, err := clock.NewHost("/")
	if err != nil {
		t.Fatal(err)
	}
	first := h.Read()
	second := h.Read()
	if first.BootID == "" || first.BootID != h.BootID() || first.Up <= 0 || second.Sub(first) < 0 || first.Wall.Before(built().AddDate(-10, 0, 0)) {
		t.Errorf("read %+v, then %+v", first, second)
	}
	_ = h.Synchronised() // whatever this machine's is
	if _, err := clock.NewHost(t.TempDir()); err == nil {
		t.Error("a boot id is made up")
	}
}
