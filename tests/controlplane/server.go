package controlplane

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"

	"github.com/confidential-node/agent/nodeagent/api"
)

// Files of the folder for whoever uses the API: its bearer token, the CA of
// its certificate, and where it listens.
const (
	TokenFile = "api.token"
	CAFile    = "api.ca.pem"
	URLFile   = "api.url"
)

// Config says where a control plane lives.
type Config struct {
	// Dir holds keys, counters and streams; made 0700.
	Dir string
	// ListenNATS and ListenHTTP are host:port; port 0 takes a free one.
	ListenNATS, ListenHTTP string
	// Cert serves both listeners and CAPEM is the CA that issued it. Without
	// Cert a CA is made in Dir, for Names and the listening addresses.
	Cert  tls.Certificate
	CAPEM []byte
	Names []string
	// BeginRetry is how long after a BeginEpoch a node that still reports
	// another epoch gets the next one. Default 30 s.
	BeginRetry time.Duration
	// Clock is time.Now when nil.
	Clock  func() time.Time
	Logger hclog.Logger
}

// Server is a running control plane.
type Server struct {
	cfg    Config
	id     *identities
	broker *broker
	view   *view
	http   *http.Server
	url    string
	tasks  sync.WaitGroup
	stop   context.CancelFunc

	mu    sync.Mutex // guards state and the order of publishing
	state *state
}

// Start starts a control plane; ctx bounds the start alone. It returns after
// all stored events are part of the view.
func Start(ctx context.Context, cfg Config) (s *Server, err error) {
	if cfg.Logger == nil || cfg.Dir == "" {
		return nil, errors.New("starting control plane: folder and logger are required")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.BeginRetry == 0 {
		cfg.BeginRetry = 30 * time.Second
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("starting control plane: %w", err)
	}
	if len(cfg.Cert.Certificate) == 0 {
		names := slices.Clone(cfg.Names)
		for _, listen := range []string{cfg.ListenNATS, cfg.ListenHTTP} {
			if host, _, err := net.SplitHostPort(listen); err == nil && host != "" {
				names = append(names, host)
			}
		}
		if cfg.Cert, cfg.CAPEM, err = selfMade(cfg.Dir, names); err != nil {
			return nil, err
		}
	}
	s = &Server{cfg: cfg}
	if s.id, err = loadIdentities(cfg.Dir); err != nil {
		return nil, err
	}
	if s.state, err = loadState(cfg.Dir); err != nil {
		return nil, err
	}
	if s.broker, err = startBroker(ctx, cfg.Dir, cfg.ListenNATS, cfg.Cert, s.id, s.state.Revoked, cfg.Logger); err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	for host := range s.state.Hosts {
		if err := s.broker.consumer(ctx, host); err != nil {
			return nil, err
		}
	}
	s.view = newView(s)
	if err := s.follow(ctx, running); err != nil {
		return nil, err
	}
	return s, s.serve(ctx, running)
}

// serve starts the HTTPS API.
func (s *Server) serve(ctx, running context.Context) error {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", s.cfg.ListenHTTP)
	if err != nil {
		return fmt.Errorf("listening for the API: %w", err)
	}
	s.url = "https://" + ln.Addr().String()
	s.http = &http.Server{
		Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 60 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10, BaseContext: func(net.Listener) context.Context { return running },
		ErrorLog:  s.cfg.Logger.Named("http").StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{s.cfg.Cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}},
	}
	s.tasks.Go(func() {
		if err := s.http.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) {
			s.cfg.Logger.Error("serving the API", "err", err)
		}
	})
	if err := errors.Join(renameio.WriteFile(filepath.Join(s.cfg.Dir, CAFile), s.cfg.CAPEM, 0o600),
		renameio.WriteFile(filepath.Join(s.cfg.Dir, URLFile), []byte(s.url), 0o600)); err != nil {
		return fmt.Errorf("writing where the API is: %w", err)
	}
	s.cfg.Logger.Info("control plane up", "nats", s.NATSURL(), "api", s.url)
	return nil
}

// Close stops everything and waits for its end. What was acknowledged is on
// disk; Start with the same folder goes on.
func (s *Server) Close() {
	s.stop()
	if s.http != nil {
		if err := s.http.Close(); err != nil {
			s.cfg.Logger.Debug("closing the API", "err", err)
		}
	}
	s.tasks.Wait()
	s.broker.close()
}

// NATSURL is where nodes connect.
func (s *Server) NATSURL() string { return s.broker.url() }

// URL is where the API is.
func (s *Server) URL() string { return s.url }

// Token is the API's bearer token.
func (s *Server) Token() string { return s.id.token }

// CAPEM is the CA of both listeners.
func (s *Server) CAPEM() []byte { return s.cfg.CAPEM }

// IssuerKey is the key nodes must list in control.issuer_keys.
func (s *Server) IssuerKey() ed25519.PublicKey {
	return slices.Clone(ed25519.PublicKey(s.id.issuer[ed25519.SeedSize:]))
}

// EnrolHost makes a host known and returns a new identity for it, with the
// issuer's key and the CA. Identities given before stay valid.
func (s *Server) EnrolHost(ctx context.Context, hostID string) (creds []byte, issuer ed25519.PublicKey, caPEM []byte, err error) {
	if !api.ValidHostID(hostID) {
		return nil, nil, nil, errBadRequest("host id is not 1 to 64 of [a-z0-9-]")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.broker.consumer(ctx, hostID); err != nil {
		return nil, nil, nil, err
	}
	user, creds, err := s.id.identity(hostID, permissions(hostID), time.Time{}, jwt.ConnectionTypeStandard)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("making identity of host %s: %w", hostID, err)
	}
	h := s.state.Hosts[hostID]
	if h == nil {
		h = &hostState{}
		s.state.Hosts[hostID] = h
	}
	h.Identities = append(h.Identities, user)
	if err := s.state.save(s.cfg.Dir, s.cfg.Clock()); err != nil {
		return nil, nil, nil, err
	}
	return creds, s.IssuerKey(), s.CAPEM(), nil
}

// Revoke ends every identity a host was given so far; enrolling it again
// gives it another.
func (s *Server) Revoke(hostID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.state.Hosts[hostID]
	if h == nil {
		return errNodeNotFound(hostID)
	}
	for _, user := range h.Identities {
		s.state.Revoked[user] = s.cfg.Clock()
	}
	h.Identities = nil
	if err := s.state.save(s.cfg.Dir, s.cfg.Clock()); err != nil {
		return err
	}
	return s.broker.revoke(s.id, s.state.Revoked)
}

// Sniff calls see with every message on the server from now on, in one
// goroutine, until stop is called: commands, events, acknowledgements and
// requests. Searching for what must not be there is its purpose.
func (s *Server) Sniff(see func(subject string, header map[string][]string, data []byte)) (stop func() error, err error) {
	sub, err := s.broker.nc.Subscribe(">", func(m *nats.Msg) { see(m.Subject, m.Header, m.Data) })
	if err != nil {
		return nil, fmt.Errorf("listening to everything: %w", err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return nil, fmt.Errorf("listening to everything: %w", err)
	}
	if err := s.broker.nc.Flush(); err != nil {
		return nil, fmt.Errorf("listening to everything: %w", err)
	}
	return sub.Unsubscribe, nil
}

// Unsettled counts a host's commands that it has not acknowledged.
func (s *Server) Unsettled(ctx context.Context, hostID string) (int, error) {
	return s.broker.unsettled(ctx, hostID)
}

// Disconnect breaks a host's connections, as a network does.
func (s *Server) Disconnect(hostID string) error { return s.broker.disconnect(hostID) }
