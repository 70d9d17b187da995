// Package admin is the agent's local door: HTTP over a unix socket that only
// root can open (0600), used by the agent's own verbs. It owns the socket,
// answers from snapshots, and passes on what operators order about GPUs and
// say about the clock. A Server may be used from many
// goroutines; Run ends when its context does.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/output"
)

// SocketName is the socket's name in the run directory.
const SocketName = "agent.sock"

// ErrUnreachable means that no agent answers on the socket.
var ErrUnreachable = errors.New("agent unreachable")

// ErrNotRunning means that nobody listens on the socket.
var ErrNotRunning = fmt.Errorf("%w: nothing listens", ErrUnreachable)

// maxReplyBytes bounds what a client reads.
const maxReplyBytes = 8 << 20

// Status is the answer of `nodeagent status`.
type Status struct {
	output.Header
	HostID       string    `json:"host_id"`
	Version      string    `json:"version"`
	Emulated     bool      `json:"emulated"`
	TEE          string    `json:"tee"`
	StartedAt    time.Time `json:"started_at"`
	Cordoned     bool      `json:"cordoned"`
	CordonReason string    `json:"cordon_reason,omitempty"`
	IssuerEpoch  uint64    `json:"issuer_epoch"`
	Outbox       int       `json:"outbox"`
	Control      Control   `json:"control"`
	Hypervisor   string    `json:"hypervisor"`
	Guests       []Guest   `json:"guests"`
	// Shortages are what the host has too little of for another guest, each
	// with its remedy; while there is one, admission is closed.
	Shortages []string `json:"shortages,omitempty"`
	Clock     Clock    `json:"clock"`
	Audit     Audit    `json:"audit"`
	Relay     Relay    `json:"relay"`
	// Warnings are findings that need an operator, each with its remedy.
	Warnings []string `json:"warnings"`
}

// Clock is the agent's time, and whether the host's clock can be believed.
type Clock struct {
	Trusted bool      `json:"trusted"`
	Now     time.Time `json:"now"`
	// Reason is why it cannot be.
	Reason string `json:"reason,omitempty"`
}

// Control is the state of the link to the control plane.
type Control struct {
	Connected bool `json:"connected"`
	// State names what the link does, or why it cannot: control.State.
	State  string `json:"state"`
	Server string `json:"server,omitempty"`
	// LastRoundTrip is when the server last confirmed something; zero means
	// never since the agent started.
	LastRoundTrip time.Time `json:"last_round_trip"`
	LastError     string    `json:"last_error,omitempty"`
}

// Audit is how far the audit log is.
type Audit struct {
	Name    string `json:"name"`
	Entries int64  `json:"entries"`
	// Signed entries are covered by a checkpoint, Witnessed ones by one that
	// the control plane has confirmed.
	Signed    int64 `json:"signed"`
	Witnessed int64 `json:"witnessed"`
}

// Relay is what passes through the agent to guests: connections by server
// name, and by IPv6 to published ports.
type Relay struct {
	// Open now; Routed since the agent started.
	Open   int    `json:"open"`
	Routed uint64 `json:"routed"`
	// Refused since the agent started, by reason.
	Refused map[relay.Reason]uint64 `json:"refused,omitempty"`
}

// Guest is one guest as the agent knows it.
type Guest struct {
	ID         string `json:"id"`
	Generation uint64 `json:"generation"`
	Status     string `json:"status"`
	GuestPhase string `json:"guest_phase,omitempty"`
	// Step of the launch last begun; Ending says that all are being undone.
	Step      string    `json:"step,omitempty"`
	Ending    bool      `json:"ending"`
	Since     time.Time `json:"since"`
	VCPUs     int       `json:"vcpus"`
	MemoryMiB uint64    `json:"memory_mib"`
	Ports     []Port    `json:"ports,omitempty"`
	Reason    string    `json:"reason,omitempty"`
	// Relayed connections that are open.
	Relayed int `json:"relayed,omitempty"`
}

// Port is one published TCP port.
type Port struct {
	Guest uint16 `json:"guest"`
	Host  uint16 `json:"host"`
	// Name by which TLS clients reach it on Host, the shared port.
	Name string `json:"name,omitempty"`
}

// Server answers on the socket.
type Server struct {
	path        string
	status      func(context.Context) (Status, error)
	acceptClock func() error
	gpus        GPUs
}

// New returns a server that will listen on path.
func New(path string, status func(context.Context) (Status, error), acceptClock func() error, gpus GPUs) *Server {
	return &Server{path, status, acceptClock, gpus}
}

// Run listens until ctx ends. A socket left over by a dead agent is replaced;
// the store's lock already excludes a second live one.
func (s *Server) Run(ctx context.Context) error {
	listener, err := listen(ctx, &net.ListenConfig{}, s.path)
	if err != nil {
		return err
	}
	defer os.Remove(s.path) //nolint:errcheck // one left over is replaced
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		status, err := s.status(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(status)
	})
	mux.HandleFunc("POST /v1/clock/accept", func(w http.ResponseWriter, _ *http.Request) {
		if err := s.acceptClock(); err != nil {
			refuse(w, err)
		}
	})
	handleGPUs(mux, s.gpus)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); ctx.Err() == nil {
		return fmt.Errorf("serving admin socket: %w", err)
	}
	return nil
}

// listen returns a listener on path. A socket has the umask's mode until it
// is changed, so it is bound where nobody else can reach it, and moved when
// its mode is right.
func listen(ctx context.Context, config *net.ListenConfig, path string) (net.Listener, error) {
	private := filepath.Join(filepath.Dir(path), ".new")
	if err := errors.Join(os.RemoveAll(private), os.Mkdir(private, 0o700)); err != nil {
		return nil, fmt.Errorf("making a private folder for the admin socket: %w", err)
	}
	defer os.RemoveAll(private) //nolint:errcheck // one left over is replaced
	bound := filepath.Join(private, filepath.Base(path))
	listener, err := config.Listen(ctx, "unix", bound)
	if err != nil {
		return nil, fmt.Errorf("listening on admin socket: %w", err)
	}
	if err := errors.Join(os.Chmod(bound, 0o600), os.Rename(bound, path)); err != nil {
		return nil, errors.Join(fmt.Errorf("closing admin socket to others: %w", err), listener.Close())
	}
	return listener, nil
}

// FetchStatus asks the agent behind the socket. An error wraps ErrUnreachable
// when nobody answers.
func FetchStatus(ctx context.Context, socket string) (Status, error) {
	body, err := ask(ctx, socket, http.MethodGet, "/v1/status", nil)
	if errors.Is(err, errAnswer) {
		return Status{}, fmt.Errorf("asking for status: %s", body)
	}
	if err != nil {
		return Status{}, err
	}
	var status Status
	if err := json.Unmarshal(body, &status); err != nil {
		return Status{}, fmt.Errorf("reading status: %w", err)
	}
	return status, nil
}

// AcceptClock tells the agent behind the socket that the host's clock is
// right. It is refused for a clock that cannot be.
func AcceptClock(ctx context.Context, socket string) error {
	body, err := ask(ctx, socket, http.MethodPost, "/v1/clock/accept", nil)
	return refusalIn(body, err)
}

func dial(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
}

// unreachable says why nobody answers.
func unreachable(err error, socket string) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w on %s; is nodeagent running? (systemctl status nodeagent, or --socket)", ErrNotRunning, socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: no permission to open %s; run as root", ErrUnreachable, socket)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}
