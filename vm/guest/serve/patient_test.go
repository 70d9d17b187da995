package serve

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestAWorkloadIsGivenTimeToListen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		listens := time.Now().Add(5 * time.Second)
		var mu sync.Mutex
		looks := 0
		dial := patient(func(context.Context) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			looks++
			if time.Now().Before(listens) {
				return nil, syscall.ECONNREFUSED
			}
			here, there := net.Pipe()
			_ = there.Close()
			return here, nil
		}, time.Now().Add(warmUp))
		var callers sync.WaitGroup
		for range 20 {
			callers.Go(func() {
				conn, err := dial(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				_ = conn.Close()
			})
		}
		callers.Wait()
		if limit := 5*int(time.Second/warmUpPause) + 25; looks > limit {
			t.Errorf("looked %d times for 20 callers, want at most %d", looks, limit)
		}
	})
}

func TestAWorkloadThatNeverListensIsNotWaitedForForEver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dial := patient(func(context.Context) (net.Conn, error) { return nil, syscall.ECONNREFUSED }, time.Now().Add(warmUp))
		begin := time.Now()
		if _, err := dial(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) || time.Since(begin) < warmUp || time.Since(begin) > warmUp+time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		begin = time.Now()
		if _, err := dial(t.Context()); err == nil || time.Since(begin) != 0 {
			t.Errorf("%v after another %v", err, time.Since(begin))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		later := patient(func(context.Context) (net.Conn, error) { return nil, syscall.ECONNREFUSED }, time.Now().Add(warmUp))
		if _, err := later(ctx); err == nil || time.Since(begin) > time.Second {
			t.Errorf("a caller that has gone was waited for: %v", err)
		}
	})
}
