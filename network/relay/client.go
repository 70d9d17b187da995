package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"
)

// serve accepts connections until the router or the listener is closed.
// Where each leads says find, which may read of it.
func (r *Router) serve(listener net.Listener, find func(*connection) (Route, []byte, Reason)) error {
	stop := context.AfterFunc(r.ctx, func() { _ = listener.Close() })
	defer stop()
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			if !temporary(r.ctx, err) {
				return err
			}
			continue
		}
		client, ok := conn.(*net.TCPConn)
		if !ok {
			_ = conn.Close()
			continue
		}
		c, reason := r.admit(client)
		if reason != "" {
			r.refuse(client, reason, false)
			continue
		}
		r.group.Go(func() { r.handle(c, find) })
	}
}

// source is what one client's connections are counted by.
func source(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	addr := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

// admit counts a new client, or says why not.
func (r *Router) admit(client *net.TCPConn) (*connection, Reason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := source(client.RemoteAddr())
	switch {
	case r.over:
		return nil, Full
	case r.sources[from] >= r.cfg.PerSource:
		return nil, SourceFull
	case len(r.open) >= r.cfg.Connections && !r.giveWayLocked():
		return nil, Full
	}
	c := &connection{client: client, source: from}
	r.open[c] = struct{}{}
	c.place = r.waiting.PushBack(c)
	r.sources[from]++
	return c, ""
}

// giveWayLocked ends the connection that has waited longest without naming a
// guest, as SYN caches do: silent clients from many addresses do not keep out
// one that says at once whom it wants.
func (r *Router) giveWayLocked() bool {
	oldest := r.waiting.Front()
	if oldest == nil {
		return false
	}
	if c, ok := oldest.Value.(*connection); ok {
		r.leaveLocked(c)
	}
	return true
}

// leave undoes admit and claim. It may be called again.
func (r *Router) leave(c *connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaveLocked(c)
}

func (r *Router) leaveLocked(c *connection) {
	c.closeLocked()
	if _, in := r.open[c]; !in {
		return
	}
	delete(r.open, c)
	r.waiting.Remove(c.place)
	if r.sources[c.source]--; r.sources[c.source] == 0 {
		delete(r.sources, c.source)
	}
	if c.guest == "" {
		return
	}
	if r.counts.PerGuest[c.guest]--; r.counts.PerGuest[c.guest] == 0 {
		delete(r.counts.PerGuest, c.guest)
	}
}

// byName reads whom a client of the shared port wants.
func (r *Router) byName(c *connection) (Route, []byte, Reason) {
	_ = c.client.SetReadDeadline(time.Now().Add(r.cfg.Hello))
	name, first, err := hello(r.ctx, c.client)
	if err != nil {
		if timeout, ok := errors.AsType[net.Error](err); errors.Is(err, net.ErrClosed) || ok && timeout.Timeout() {
			return Route{}, nil, Slow
		}
		return Route{}, nil, NotTLS
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	route, known := r.names[name]
	switch {
	case name == "":
		return route, nil, NoName
	case !known:
		return route, nil, UnknownName
	}
	return route, first, r.claimLocked(c, route)
}

func (r *Router) byPort(c *connection, number uint16) (Route, []byte, Reason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, known := r.ports[number]
	if !known {
		return Route{Port: number}, nil, UnknownName // closed meanwhile
	}
	return p.route, nil, r.claimLocked(c, p.route)
}

// claimLocked counts the connection as one of the guest's.
func (r *Router) claimLocked(c *connection, route Route) Reason {
	if r.counts.PerGuest[route.Guest] >= r.cfg.PerGuest {
		return GuestFull
	}
	if c.closed {
		return Slow // it gave way meanwhile
	}
	c.guest = route.Guest
	r.waiting.Remove(c.place)
	r.counts.PerGuest[route.Guest]++
	return ""
}

// refuse hangs up, and tells a client that speaks TLS by an alert why.
func (r *Router) refuse(client *net.TCPConn, reason Reason, isTLS bool) {
	r.mu.Lock()
	r.counts.Refused[reason]++
	r.mu.Unlock()
	r.log.Debug("connection refused", "from", client.RemoteAddr(), "reason", reason)
	_ = client.SetWriteDeadline(time.Now().Add(time.Second))
	switch {
	case !isTLS:
		_ = client.SetLinger(0) // no TIME_WAIT for those who only take
	case reason == NoName || reason == UnknownName:
		_, _ = client.Write(alertUnrecognizedName)
	default:
		_, _ = client.Write(alertInternalError)
	}
	_ = client.Close()
}

// handle takes a client to its guest.
func (r *Router) handle(c *connection, find func(*connection) (Route, []byte, Reason)) {
	defer r.leave(c)
	route, first, reason := find(c)
	if reason == "" && !r.connect(r.ctx, c, route) {
		reason = Unreachable
	}
	if reason != "" {
		r.refuse(c.client, reason, reason != NotTLS && reason != Slow && route.Port == 0)
		return
	}
	c.relay(first, r.cfg.Idle)
}

// connect opens the guest's side. False when the guest does not answer, or
// was dropped meanwhile.
func (r *Router) connect(ctx context.Context, c *connection, route Route) bool {
	guest, err := r.dial(ctx, route.To)
	if err != nil {
		r.log.Debug("guest does not answer", "guest", route.Guest, "error", err)
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.closed {
		_ = guest.Close()
		return false
	}
	c.server = guest
	r.counts.Routed++
	return true
}
