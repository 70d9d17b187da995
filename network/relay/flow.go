package relay

import (
	"container/list"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// connection is a client and, once it has named one, its guest.
type connection struct {
	client *net.TCPConn
	source netip.Prefix
	// Below: under the router's lock until relay.
	server *net.TCPConn
	guest  string
	closed bool
	place  *list.Element // among those that wait
}

func (c *connection) closeLocked() {
	if c.closed {
		return
	}
	c.closed = true
	_ = c.client.Close()
	if c.server != nil {
		_ = c.server.Close()
	}
}

// chunk is how much is copied between two looks at the clock: who moves less
// in the idle time is taken for silent. The kernel copies (splice), so no
// buffer of that size exists.
const chunk = 256 << 10

// flow is what both ways of a connection share.
type flow struct {
	c    *connection
	idle time.Duration
	last atomic.Int64
	over atomic.Bool
}

// relay copies both ways until both have ended or nothing has moved on either
// for the idle time. One side's end of data is passed on while the other still
// sends.
func (c *connection) relay(first []byte, idle time.Duration) {
	f := &flow{c: c, idle: idle}
	f.moved()
	// Its own timer, since a receiver that takes nothing holds up the loops.
	var watch *time.Timer
	watch = time.AfterFunc(idle, func() {
		if rest := idle - time.Since(time.Unix(0, f.last.Load())); rest > 0 {
			watch.Reset(rest)
			return
		}
		f.end()
	})
	defer watch.Stop()
	if _, err := c.server.Write(first); err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { f.copy(c.server, c.client) })
	both.Go(func() { f.copy(c.client, c.server) })
	both.Wait()
}

func (f *flow) moved() { f.last.Store(time.Now().UnixNano()) }

// end wakes both ways up for good.
func (f *flow) end() {
	f.over.Store(true)
	_ = f.c.client.SetDeadline(time.Unix(1, 0))
	_ = f.c.server.SetDeadline(time.Unix(1, 0))
}

// copy copies one way until its end of data, and ends both when it breaks.
// Only reading has a deadline here, to see what moved: what a write that is
// cut short has taken from the sender would be lost.
func (f *flow) copy(to, from *net.TCPConn) {
	for {
		_ = from.SetReadDeadline(time.Now().Add(f.idle / 2))
		if f.over.Load() {
			return
		}
		limited := &io.LimitedReader{R: from, N: chunk}
		n, err := to.ReadFrom(limited)
		if n > 0 {
			f.moved()
		}
		switch {
		case err == nil && limited.N > 0:
			_ = to.CloseWrite()
			return
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			f.end()
			return
		}
	}
}

// temporary waits a little when the host is short of something.
func temporary(ctx context.Context, err error) bool {
	short := errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
	if !short && !errors.Is(err, syscall.ECONNABORTED) {
		return false
	}
	if short {
		wait := time.NewTimer(100 * time.Millisecond)
		defer wait.Stop()
		select {
		case <-ctx.Done():
		case <-wait.C:
		}
	}
	return true
}
