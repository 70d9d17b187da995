// Package sni gives TLS connections that arrive on one shared port of the host
// to guests, each by its server name (SNI, RFC 6066 section 3), without ending
// TLS: the host sees names and ciphertext. A guest's certificate reaches its
// client as it is.
//
// Unlike ports that nftables forwards, connections here pass through the
// agent and end when it does; the guests go on. Guests see the host's address
// as their peer.
package sni

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of a router. The zero value of a field is its default.
type Limits struct {
	// Connections bounds all connections at a time. Default 2048; each takes
	// two descriptors and, while data waits, up to 64 KiB in a pipe.
	Connections int
	// PerSource bounds those of one IPv4 address or IPv6 /64. Default 64.
	PerSource int
	// PerGuest bounds those to one guest. Default 512.
	PerGuest int
	// Hello is how long a client may take to send its ClientHello. Default 5 s.
	Hello time.Duration
	// Idle is how long a connection may carry nothing either way. It ends
	// between one and two times that. Default 10 minutes.
	Idle time.Duration
}

func (l Limits) withDefaults() Limits {
	return Limits{
		cmp.Or(l.Connections, 2048), cmp.Or(l.PerSource, 64), cmp.Or(l.PerGuest, 512),
		cmp.Or(l.Hello, 5*time.Second), cmp.Or(l.Idle, 10*time.Minute),
	}
}

// dialTimeout bounds a connection to a guest, which is one hop away.
const dialTimeout = 5 * time.Second

// Route is a name and where it leads.
type Route struct {
	Name  string
	Guest string
	To    netip.AddrPort
}

// Counts are what a router has done since it was made, and has now.
type Counts struct {
	Open     int
	Routed   uint64
	Refused  map[Reason]uint64
	PerGuest map[string]int
}

// Reason is why a client was refused.
type Reason string

// Reasons. None of them can be chosen by anybody but the client, except
// Unreachable: the guest does not listen.
const (
	Full        Reason = "full"
	SourceFull  Reason = "source-full"
	GuestFull   Reason = "guest-full"
	NotTLS      Reason = "not-tls"
	Slow        Reason = "slow"
	NoName      Reason = "no-name"
	UnknownName Reason = "unknown-name"
	Unreachable Reason = "unreachable"
)

// Router knows which name leads to which guest. Its methods may be called at
// any time.
type Router struct {
	limits Limits
	log    hclog.Logger
	dial   func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error)

	mu      sync.Mutex
	routes  map[string]Route
	sources map[netip.Prefix]int
	open    map[*connection]struct{}
	counts  Counts
}

// New makes a router without routes.
func New(limits Limits, logger hclog.Logger) *Router {
	return &Router{
		limits: limits.withDefaults(), log: logger.Named("sni"), dial: dial,
		routes: map[string]Route{}, sources: map[netip.Prefix]int{}, open: map[*connection]struct{}{},
		counts: Counts{Refused: map[Reason]uint64{}, PerGuest: map[string]int{}},
	}
}

func dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	return dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, to)
}

// Set makes names lead to a guest, and none else of that guest's: it replaces
// what the guest had. Either all of them are set or none.
//
// Errors: network.name-malformed, network.name-in-use.
func (r *Router) Set(guest string, routes []Route) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, route := range routes {
		if err := CheckName(route.Name); err != nil {
			return err
		}
		if slices.ContainsFunc(routes[:i], func(o Route) bool { return o.Name == route.Name }) {
			return refuseName(route.Name, guest)
		}
		if old, ok := r.routes[route.Name]; ok && old.Guest != guest {
			return refuseName(route.Name, old.Guest)
		}
	}
	r.removeLocked(guest)
	for _, route := range routes {
		route.Guest = guest
		r.routes[route.Name] = route
	}
	return nil
}

func refuseName(name, guest string) error {
	return contract.Refuse("network.name-in-use", "choose another name, or stop the guest that has it", "the name %s leads to guest %s", name, guest)
}

// Remove ends a guest's routes, so that no new connection reaches it. Those
// that are open go on until Drop, or until they end.
func (r *Router) Remove(guest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.removeLocked(guest)
}

func (r *Router) removeLocked(guest string) {
	for name, route := range r.routes {
		if route.Guest == guest {
			delete(r.routes, name)
		}
	}
}

// Drop closes the guest's open connections.
func (r *Router) Drop(guest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.open {
		if c.guest == guest {
			c.closeLocked()
		}
	}
}

// Routes lists all routes by name.
func (r *Router) Routes() []Route {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Route, 0, len(r.routes))
	for _, route := range r.routes {
		out = append(out, route)
	}
	slices.SortFunc(out, func(a, b Route) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Counts returns a copy.
func (r *Router) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.counts
	c.Open = len(r.open)
	c.Refused, c.PerGuest = maps.Clone(r.counts.Refused), maps.Clone(r.counts.PerGuest)
	return c
}

// Serve accepts connections until the context ends, and returns when all of
// them have ended. It closes the listener.
func (r *Router) Serve(ctx context.Context, listener net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	var group sync.WaitGroup
	defer group.Wait()
	defer r.dropAll()
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil {
			if !temporary(ctx, err) {
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
			r.refuse(client, reason)
			continue
		}
		group.Go(func() { r.handle(ctx, c) })
	}
}

func (r *Router) dropAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.open {
		c.closeLocked()
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
	case len(r.open) >= r.limits.Connections:
		return nil, Full
	case r.sources[from] >= r.limits.PerSource:
		return nil, SourceFull
	}
	c := &connection{client: client, source: from}
	r.open[c] = struct{}{}
	r.sources[from]++
	return c, ""
}

// leave undoes admit and claim.
func (r *Router) leave(c *connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.closeLocked()
	delete(r.open, c)
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

// claim finds where a name leads and counts the connection there.
func (r *Router) claim(c *connection, name string) (Route, Reason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	route, ok := r.routes[name]
	switch {
	case name == "":
		return route, NoName
	case !ok:
		return route, UnknownName
	case r.counts.PerGuest[route.Guest] >= r.limits.PerGuest:
		return route, GuestFull
	}
	c.guest = route.Guest
	r.counts.PerGuest[route.Guest]++
	return route, ""
}

// refuse tells the client by an alert where it speaks TLS, and hangs up.
func (r *Router) refuse(client *net.TCPConn, reason Reason) {
	r.mu.Lock()
	r.counts.Refused[reason]++
	r.mu.Unlock()
	r.log.Debug("connection refused", "from", client.RemoteAddr(), "reason", reason)
	_ = client.SetWriteDeadline(time.Now().Add(time.Second))
	switch reason {
	case NoName, UnknownName:
		_, _ = client.Write(alertUnrecognizedName)
	case GuestFull, Unreachable:
		_, _ = client.Write(alertInternalError)
	case Full, SourceFull, NotTLS, Slow:
		_ = client.SetLinger(0) // no TIME_WAIT for those who only take
	}
	_ = client.Close()
}

// handle takes a client to its guest.
func (r *Router) handle(ctx context.Context, c *connection) {
	defer r.leave(c)
	_ = c.client.SetReadDeadline(time.Now().Add(r.limits.Hello))
	name, first, err := hello(ctx, c.client)
	if err != nil {
		reason := NotTLS
		if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
			reason = Slow
		}
		r.refuse(c.client, reason)
		return
	}
	route, reason := r.claim(c, name)
	if reason == "" && !r.connect(ctx, c, route) {
		reason = Unreachable
	}
	if reason != "" {
		r.refuse(c.client, reason)
		return
	}
	c.relay(first, r.limits.Idle)
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
