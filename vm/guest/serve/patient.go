package serve

import (
	"context"
	"net"
	"sync/atomic"
	"time"
)

// warmUp is Handler.WarmUp's default; warmUpPause is between two looks.
const (
	warmUp      = 30 * time.Second
	warmUpPause = 50 * time.Millisecond
)

// Dial connects to the workload's side of a port.
type Dial func(context.Context) (net.Conn, error)

// patient tries again until the port has answered once or the time is over.
// One caller looks at a time, however many wait.
func patient(dial Dial, until time.Time) Dial {
	var answered atomic.Bool
	turn := make(chan struct{}, 1)
	return func(ctx context.Context) (net.Conn, error) {
		if answered.Load() || time.Now().After(until) {
			return dial(ctx)
		}
		select {
		case turn <- struct{}{}:
			defer func() { <-turn }()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		tick := time.NewTicker(warmUpPause)
		defer tick.Stop()
		for {
			conn, err := dial(ctx)
			if err == nil {
				answered.Store(true)
				return conn, nil
			}
			if time.Now().After(until) {
				return nil, err
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil, err
			}
		}
	}
}
