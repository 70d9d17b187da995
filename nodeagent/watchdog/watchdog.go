// Package watchdog tells systemd that the agent works, for as long as it does:
// each of the loops that matter says so at every turn, and when one of them has
// been silent for longer than it ever should, systemd is told nothing more and
// starts the agent anew (WatchdogSec, WATCHDOG_USEC). Guests go on running.
//
// A loop that fails and tries again turns; one that hangs does not. Nothing
// here judges more than that. A Watchdog is safe for concurrent use.
package watchdog

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
)

// Watchdog is one process's.
type Watchdog struct {
	every  time.Duration
	notify func(state string)
	log    hclog.Logger

	mu    sync.Mutex // guards below
	loops []*loop
	hung  string
}

type loop struct {
	name     string
	patience time.Duration
	turned   time.Time
}

// New makes a watchdog that must notify within limit; 0 is none: nobody asks.
func New(limit time.Duration, notify func(state string), logger hclog.Logger) *Watchdog {
	const perLimit = 3 // one ping may be late
	return &Watchdog{every: limit / perLimit, notify: notify, log: logger.Named("watchdog")}
}

// Loop adds a loop that is to call turned at least once within patience.
func (w *Watchdog) Loop(name string, patience time.Duration) (turned func()) {
	l := &loop{name: name, patience: patience, turned: time.Now()}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.loops = append(w.loops, l)
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		l.turned = time.Now()
	}
}

// Run notifies until ctx ends.
func (w *Watchdog) Run(ctx context.Context) error {
	if w.every <= 0 {
		return nil
	}
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	for {
		if w.look(time.Now()) {
			w.notify(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// look reports whether all loops turn, and tells when that has changed.
func (w *Watchdog) look(now time.Time) bool {
	w.mu.Lock()
	var silent []string
	for _, l := range w.loops {
		if now.Sub(l.turned) > l.patience {
			silent = append(silent, l.name)
		}
	}
	slices.Sort(silent)
	hung := strings.Join(silent, ", ")
	changed := hung != w.hung
	w.hung = hung
	w.mu.Unlock()
	switch {
	case !changed:
	case hung == "":
		w.log.Info("every loop turns again")
		w.notify("STATUS=working")
	default:
		w.log.Error("a loop hangs: systemd is told nothing more, and starts the agent anew; guests go on running", "loops", hung)
		w.notify("STATUS=hangs: " + hung)
	}
	return hung == ""
}
