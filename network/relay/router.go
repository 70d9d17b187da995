// Package relay takes connections from outside to guests where the kernel's
// own forwarding (package network) cannot: TLS on one shared port of the host,
// by server name (SNI, RFC 6066 section 3), without ending TLS; and published
// ports by IPv6, which guests do not speak beyond their tap.
//
// Unlike connections that nftables forwards, these pass through the agent and
// end when it does; the guests go on. Guests see the host's address as their
// peer. Of TLS the host sees names and ciphertext; the guest's certificate
// reaches its client as it is.
package relay

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of a router. The zero value of a field is its default.
type Limits struct {
	// Connections bounds all connections at a time. Default 2048; each takes
	// two descriptors and, while data waits, two more and up to 64 KiB in a
	// pipe for each direction. When there are as many, the one that has waited
	// longest without naming a guest gives way.
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

// Config is what the operator wants. The zero value relays published ports
// only.
type Config struct {
	// Listen is the address of the shared port, "host:port"; "" for none.
	Listen string
	Limits
}

// Route is one way to a guest: by Name on the shared port, or by Port, an
// IPv6 port of the host. Exactly one of them is set.
type Route struct {
	Name  string
	Port  uint16
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

// Router knows which way leads to which guest. Its methods may be called at
// any time.
type Router struct {
	cfg    Config
	log    hclog.Logger
	dial   func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error)
	listen func(ctx context.Context, network, address string) (net.Listener, error)

	ctx    context.Context //nolint:containedctx // of the listeners that Set opens
	cancel context.CancelFunc
	group  sync.WaitGroup

	mu      sync.Mutex
	over    bool
	trouble error
	names   map[string]Route
	ports   map[uint16]port
	sources map[netip.Prefix]int
	open    map[*connection]struct{}
	waiting *list.List // of those in open that have no guest yet, oldest first
	counts  Counts
}

// port is a published port that is listened on by IPv6.
type port struct {
	route    Route
	listener net.Listener
}

// New makes a router without routes. Close or Run has to follow.
func New(cfg Config, logger hclog.Logger) *Router {
	cfg.Limits = cfg.withDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	listen := net.ListenConfig{}
	return &Router{
		cfg: cfg, log: logger.Named("relay"), dial: dial, listen: listen.Listen, ctx: ctx, cancel: cancel,
		names: map[string]Route{}, ports: map[uint16]port{}, sources: map[netip.Prefix]int{}, open: map[*connection]struct{}{}, waiting: list.New(),
		counts: Counts{Refused: map[Reason]uint64{}, PerGuest: map[string]int{}},
	}
}

// retryEvery is how often a shared port that another process has is tried.
const retryEvery = 5 * time.Second

// Run serves the shared port, if there is one, until the context ends, and
// ends everything then. While the port cannot be listened on, Trouble says so
// and it is tried again.
func (r *Router) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, r.cancel)
	defer stop()
	defer r.Close()
	retry := time.NewTicker(retryEvery)
	defer retry.Stop()
	for r.cfg.Listen != "" && ctx.Err() == nil {
		err := r.shared(ctx)
		if err != nil && r.Trouble() == nil {
			r.log.Error("the shared TLS port is not served", "error", err)
		}
		r.setTrouble(err)
		select {
		case <-ctx.Done():
		case <-retry.C:
		}
	}
	<-ctx.Done()
	return nil
}

// shared serves the shared port for as long as it can.
func (r *Router) shared(ctx context.Context) error {
	listener, err := r.listen(ctx, "tcp", r.cfg.Listen)
	if err == nil {
		r.setTrouble(nil)
		err = r.serve(listener, r.byName)
	}
	if err != nil && ctx.Err() == nil {
		return contract.Refuse("network.shared-port", "stop what listens there, or change network.tls.listen",
			"the shared TLS port %s cannot be served", r.cfg.Listen).Because(err)
	}
	return nil
}

func (r *Router) setTrouble(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.trouble = err
}

// Trouble is why the shared port is not served; nil when it is, or when there
// is none.
func (r *Router) Trouble() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trouble
}

// Close ends all listeners and connections and waits for them. It may be
// called again.
func (r *Router) Close() {
	r.cancel()
	r.mu.Lock()
	r.over = true
	for _, p := range r.ports {
		_ = p.listener.Close()
	}
	for c := range r.open {
		c.closeLocked()
	}
	r.mu.Unlock()
	r.group.Wait()
}

func dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	return dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, to)
}

// Set gives a guest its routes in place of those it had. Either all of them
// are set or none.
//
// Errors: network.name-malformed, network.name-in-use, network.port-in-use.
func (r *Router) Set(ctx context.Context, guest string, routes []Route) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, route := range routes {
		if err := r.check(guest, route, routes[:i]); err != nil {
			return err
		}
	}
	opened := map[uint16]net.Listener{}
	for _, route := range routes {
		if route.Port == 0 || r.ports[route.Port].route.Guest == guest {
			continue
		}
		listener, err := r.listenPort(ctx, route.Port)
		if errors.Is(err, errNoIPv6) {
			continue
		}
		if err != nil {
			for _, l := range opened {
				_ = l.Close()
			}
			return err
		}
		opened[route.Port] = listener
	}
	r.replaceLocked(guest, routes, opened)
	return nil
}

// check refuses what is another's or was named before.
func (r *Router) check(guest string, route Route, before []Route) error {
	if route.Port != 0 {
		if p, ok := r.ports[route.Port]; ok && p.route.Guest != guest {
			return refusePort(route.Port).Because(errors.New("it leads to guest " + p.route.Guest))
		}
		return nil
	}
	if err := CheckName(route.Name); err != nil {
		return err
	}
	if slices.ContainsFunc(before, func(o Route) bool { return o.Name == route.Name }) {
		return refuseName(route.Name, guest)
	}
	if old, ok := r.names[route.Name]; ok && old.Guest != guest {
		return refuseName(route.Name, old.Guest)
	}
	return nil
}

// errNoIPv6 means that nobody can reach this host by IPv6.
var errNoIPv6 = errors.New("the host has no IPv6")

func (r *Router) listenPort(ctx context.Context, number uint16) (net.Listener, error) {
	if r.over {
		return nil, net.ErrClosed
	}
	listener, err := r.listen(ctx, "tcp6", net.JoinHostPort("::", strconv.Itoa(int(number))))
	if errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL) {
		return nil, errNoIPv6
	}
	if err != nil {
		return nil, refusePort(number).Because(err)
	}
	return listener, nil
}

func refusePort(number uint16) *contract.Refusal {
	return contract.Refuse("network.port-in-use", "ask for another port, or stop what uses this one", "host port %d is already used by IPv6", number)
}

// replaceLocked makes the routes those of the guest. What the guest keeps is
// not interrupted.
func (r *Router) replaceLocked(guest string, routes []Route, opened map[uint16]net.Listener) {
	for number, p := range r.ports {
		keeps := slices.ContainsFunc(routes, func(o Route) bool { return o.Port == number })
		if p.route.Guest == guest && !keeps {
			_ = p.listener.Close()
			delete(r.ports, number)
		}
	}
	maps.DeleteFunc(r.names, func(_ string, o Route) bool { return o.Guest == guest })
	for _, route := range routes {
		route.Guest = guest
		if route.Port == 0 {
			r.names[route.Name] = route
			continue
		}
		p, listening := r.ports[route.Port]
		if listener := opened[route.Port]; listener != nil {
			p, listening = port{listener: listener}, true
			number := route.Port
			r.group.Go(func() {
				if err := r.serve(listener, func(c *connection) (Route, []byte, Reason) { return r.byPort(c, number) }); err != nil {
					r.log.Warn("a published port is no longer served by IPv6", "port", number, "error", err)
				}
			})
		}
		if listening {
			p.route = route
			r.ports[route.Port] = p
		}
	}
}

func refuseName(name, guest string) error {
	return contract.Refuse("network.name-in-use", "choose another name, or stop the guest that has it", "the name %s leads to guest %s", name, guest)
}

// Remove ends a guest's routes, so that no new connection reaches it. Those
// that are open go on until Drop, or until they end.
func (r *Router) Remove(guest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.replaceLocked(guest, nil, nil)
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

// Routes lists all routes, ports first.
func (r *Router) Routes() []Route {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := slices.Collect(maps.Values(r.names))
	for _, p := range r.ports {
		out = append(out, p.route)
	}
	slices.SortFunc(out, func(a, b Route) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Port, b.Port)) })
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
