package metadata

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of one guest's session.
const (
	// maxConnections serves a challenge poll, a result and a few requests at
	// a time; the guest's own client keeps one or two open.
	maxConnections = 8
	maxHeaderBytes = 8 << 10
	// requestRate and requestBurst are far above what a launch needs (about
	// twenty requests in all, and a poll every 20 s).
	requestRate, requestBurst = 20, 60
	maxChallenges             = 8
	// acceptRate and acceptBurst bound the connections that are taken at all;
	// those beyond wait in the kernel, which costs nothing here.
	acceptRate, acceptBurst = 50, 100
	// headerTimeout and bodyTimeout end slow senders.
	headerTimeout = 5 * time.Second
	bodyTimeout   = 15 * time.Second
	idleTimeout   = 90 * time.Second
	// writeTimeout is for any answer, a challenge poll's wait included.
	writeTimeout = (contract.ChallengePollSeconds + 15) * time.Second
	// A result may pause for stallTimeout; over all it has resultGrace and a
	// second for each resultRate bytes.
	stallTimeout = 60 * time.Second
	resultGrace  = 10 * time.Minute
	resultRate   = 64 << 10
	// listenTimeout is how long Open waits for the device's address.
	listenTimeout = 15 * time.Second
	listenRetry   = 20 * time.Millisecond
)

// Sink takes what a guest says and makes. Its methods are called from several
// goroutines. A *contract.Refusal it returns goes to the guest; any other
// error stays here.
type Sink interface {
	// Status is the guest's word about itself, already checked for form.
	Status(ctx context.Context, s contract.GuestStatus) error
	// Result streams one sealed result. The sink enforces quota and format,
	// and discards what it got when r ends in an error.
	Result(ctx context.Context, name string, r io.Reader) error
	// ResultManifest is the signed list, opaque; no result follows.
	ResultManifest(ctx context.Context, signed []byte) error
}

// Session is one guest.
type Session struct {
	// ID is the guest's.
	ID string
	// Device is the host's end of its network, and Peer the guest's address
	// there: whoever else asks is not answered.
	Device string
	Peer   netip.Addr
	// Manifest is served byte for byte.
	Manifest []byte
	// Network and Endorsements are asked at each request.
	Network      func() contract.NetworkFacts
	Endorsements func() contract.Endorsements
	Boot         contract.BootComponents
	Sink         Sink
	// Results are the names the manifest allows.
	Results []string
}

// Server is the metadata service of all guests.
type Server struct {
	log    hclog.Logger
	now    func() time.Time
	listen func(ctx context.Context, device string) (net.Listener, error)

	mu       sync.Mutex
	sessions map[string]*session
}

// session is a Session being served.
type session struct {
	Session
	log     hclog.Logger
	now     func() time.Time
	limiter *rate.Limiter
	// ending is held while a result manifest is taken; before mu.
	ending sync.Mutex

	mu sync.Mutex
	// pending challenges, oldest first; wake is closed and replaced when one
	// is added.
	pending []*challenge
	wake    chan struct{}
	// receiving are the results on their way; ended is the digest of the
	// accepted result manifest.
	receiving map[string]bool
	ended     *[sha256.Size]byte
	// gone is closed with the session.
	gone chan struct{}

	server *http.Server
	done   chan struct{} // closed when the listener's goroutine ended
}

type challenge struct {
	contract.Challenge
	answer chan []byte // capacity 1
}

// New returns a server without sessions.
func New(logger hclog.Logger, now func() time.Time) *Server {
	return &Server{log: logger.Named("metadata"), now: now, listen: listenOn, sessions: map[string]*session{}}
}

// Open starts serving a guest. It waits a while for the device's address to
// become usable. Opening a session that is open is an error.
func (s *Server) Open(ctx context.Context, x Session) error {
	if err := x.validate(); err != nil {
		return err
	}
	sess := newSession(x, s.log, s.now)
	s.mu.Lock()
	if _, open := s.sessions[x.ID]; open {
		s.mu.Unlock()
		return fmt.Errorf("opening metadata session: guest %s has one", x.ID)
	}
	s.sessions[x.ID] = sess // reserves the id
	s.mu.Unlock()

	listener, err := s.listen(ctx, x.Device)
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-sess.gone:
		err = errors.Join(err, fmt.Errorf("opening metadata session: guest %s was closed meanwhile", x.ID))
		if listener != nil {
			err = errors.Join(err, listener.Close())
		}
	default:
	}
	if err != nil {
		if s.sessions[x.ID] == sess {
			delete(s.sessions, x.ID)
		}
		close(sess.done)
		return err
	}
	sess.server = &http.Server{
		Handler: sess, ReadHeaderTimeout: headerTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		// net/http quotes what it could not parse.
		ErrorLog: hclog.NewNullLogger().StandardLogger(nil),
	}
	go func() {
		defer close(sess.done)
		err := sess.server.Serve(newLimited(listener, x.Peer, maxConnections))
		if !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("metadata listener ended", "guest_id", x.ID, "err", err)
		}
	}()
	s.log.Debug("session open", "guest_id", x.ID, "device", x.Device)
	return nil
}

func (x Session) validate() error {
	if x.ID == "" || x.Device == "" || !x.Peer.IsValid() || x.Network == nil || x.Endorsements == nil || x.Sink == nil {
		return fmt.Errorf("opening metadata session: guest %q lacks an id, device, peer, facts or sink", x.ID)
	}
	if len(x.Manifest) == 0 || len(x.Manifest) > contract.MaxManifestBytes || len(x.Results) > contract.MaxResults {
		return fmt.Errorf("opening metadata session: manifest of %d bytes, %d results", len(x.Manifest), len(x.Results))
	}
	for _, name := range x.Results {
		if !contract.ValidFileName(name) {
			return fmt.Errorf("opening metadata session: result name %q is malformed", name)
		}
	}
	return nil
}

func newSession(x Session, log hclog.Logger, now func() time.Time) *session {
	x.Manifest, x.Results = slices.Clone(x.Manifest), slices.Clone(x.Results)
	return &session{
		Session: x, log: log, now: now, limiter: rate.NewLimiter(requestRate, requestBurst), wake: make(chan struct{}),
		receiving: map[string]bool{}, gone: make(chan struct{}), done: make(chan struct{}),
	}
}

// Close ends a guest's session: connections are cut and waiting challenges
// fail. A session that is not open is closed.
func (s *Server) Close(id string) error {
	s.mu.Lock()
	sess, ok := s.sessions[id]
	if !ok {
		s.mu.Unlock()
		return nil
	}
	delete(s.sessions, id)
	close(sess.gone)
	server := sess.server
	s.mu.Unlock()
	var err error
	if server != nil {
		if err = server.Close(); err != nil {
			err = fmt.Errorf("closing metadata session: %w", err)
		}
	}
	<-sess.done
	return err
}

// Shutdown closes every session.
func (s *Server) Shutdown() error {
	s.mu.Lock()
	ids := make([]string, 0, len(s.sessions))
	for id := range s.sessions {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	var errs []error
	for _, id := range ids {
		errs = append(errs, s.Close(id))
	}
	return errors.Join(errs...)
}

// Challenge asks a guest for evidence over nonce and waits for it until ctx
// ends. The evidence is the guest's bytes, unopened.
func (s *Server) Challenge(ctx context.Context, id string, nonce []byte) ([]byte, error) {
	if len(nonce) < contract.MinNonceBytes || len(nonce) > contract.MaxNonceBytes {
		return nil, contract.Refuse("evidence.nonce", fmt.Sprintf("send %d to %d random bytes", contract.MinNonceBytes, contract.MaxNonceBytes),
			"nonce has %d bytes", len(nonce))
	}
	s.mu.Lock()
	sess := s.sessions[id]
	s.mu.Unlock()
	if sess == nil {
		return nil, refuseGone()
	}
	c, err := sess.add(nonce)
	if err != nil {
		return nil, err
	}
	defer sess.drop(c)
	select {
	case evidence := <-c.answer:
		return evidence, nil
	case <-sess.gone:
		return nil, refuseGone()
	case <-ctx.Done():
		return nil, contract.Refuse("evidence.timeout", "ask again once the guest is running; it answers only then",
			"the guest did not answer in time").Because(ctx.Err())
	}
}

func refuseGone() *contract.Refusal {
	return contract.Refuse("guest.not-running", "ask for a guest that is running", "there is no such running guest")
}

func (s *session) add(nonce []byte) (*challenge, error) {
	var id [16]byte
	rand.Read(id[:]) // never fails
	c := &challenge{contract.Challenge{ID: hex.EncodeToString(id[:]), Nonce: slices.Clone(nonce)}, make(chan []byte, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pending) == maxChallenges {
		return nil, contract.Refuse("evidence.busy", "wait for the answers that are due", "%d challenges wait for this guest", maxChallenges)
	}
	s.pending = append(s.pending, c)
	close(s.wake)
	s.wake = make(chan struct{})
	return c, nil
}

func (s *session) drop(c *challenge) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending = slices.DeleteFunc(s.pending, func(p *challenge) bool { return p == c })
}

// listenOn listens on the metadata address of one device and no other.
func listenOn(ctx context.Context, device string) (net.Listener, error) {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	retry := time.NewTicker(listenRetry)
	defer retry.Stop()
	for {
		l, err := listenOnce(ctx, device)
		early := errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) || errors.Is(err, errNoDevice)
		if err == nil || !early {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the metadata address on %s: %w", device, err)
		case <-retry.C:
		}
	}
}

var errNoDevice = errors.New("no such device")

func listenOnce(ctx context.Context, device string) (net.Listener, error) {
	// package net remembers a name's index for a minute, in which a tap may
	// be made anew; a numeric zone is taken as it is.
	dev, err := net.InterfaceByName(device)
	if err != nil {
		return nil, fmt.Errorf("finding %s: %w: %w", device, errNoDevice, err)
	}
	var bound error
	cfg := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error {
		err := conn.Control(func(fd uintptr) { bound = unix.BindToDevice(int(fd), device) })
		return errors.Join(err, bound)
	}}
	addr := net.TCPAddr{IP: net.ParseIP(contract.MetadataAddr), Port: contract.MetadataPort, Zone: fmt.Sprint(dev.Index)}
	l, err := cfg.Listen(ctx, "tcp6", addr.String())
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", device, err)
	}
	return l, nil
}

// limited closes connections of others than the peer and those beyond a number
// at once, and takes no more than its rate, so that a guest which hoards or
// floods hurts itself only and holds no descriptors.
type limited struct {
	net.Listener
	peer  netip.Addr
	pace  *rate.Limiter
	slots chan struct{}
}

func newLimited(l net.Listener, peer netip.Addr, n int) *limited {
	return &limited{l, peer, rate.NewLimiter(acceptRate, acceptBurst), make(chan struct{}, n)}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		// At most the time of one connection: Close waits no longer.
		if err := l.pace.Wait(context.Background()); err != nil {
			return nil, err
		}
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if from, ok := conn.RemoteAddr().(*net.TCPAddr); !ok || from.AddrPort().Addr().WithZone("").Unmap() != l.peer {
			_ = conn.Close()
			continue
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			_ = conn.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
