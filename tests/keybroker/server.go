package keybroker

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/time/rate"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/gpu/rim"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
	"github.com/confidential-node/agent/tests/keybroker/hsm"
)

// errorType prefixes the "type" of an error body.
const errorType = "https://github.com/confidential-node/agent/refusals/"

// minAdminToken is the shortest admin token: 16 random bytes in hex.
const minAdminToken = 32

// Config of a Server. StateDir, AdminToken and Logger are required.
type Config struct {
	// StateDir holds launches and the token key; made 0700.
	StateDir string
	// AdminToken authorises the admin API; at least 32 characters.
	AdminToken string
	// Token wraps the resources; nil keeps them readable in StateDir. The
	// caller closes it.
	Token *hsm.Token
	// EmulatedRoots are accepted beside AMD's and NVIDIA's. For trials without secrets.
	EmulatedRoots []*x509.Certificate
	// AllowDevelopmentImage accepts guest images without AML defence and the
	// debug variant. For trials without secrets.
	AllowDevelopmentImage bool
	// AllowProducts accepts processor lines that are excluded by default.
	AllowProducts []snp.Product
	// GPUManifests are NVIDIA's reference values, verified; a launch with GPUs
	// that fit none of them gets nothing.
	GPUManifests []*rim.Manifest
	// AllowUnmeasuredGPUs accepts GPUs without manifests to compare with. For
	// trials without secrets.
	AllowUnmeasuredGPUs bool
	// Issuer is the token's "iss", the broker's URL as guests know it.
	Issuer string
	// SessionTTL is from the challenge to the last resource; 0 means 10 min.
	SessionTTL time.Duration
	// TokenTTL bounds the bearer token; 0 means 10 min.
	TokenTTL time.Duration
	// Rate and Burst limit the requests per second of one client address;
	// 0 means 20 and 40.
	Rate  float64
	Burst int
	// Logger must not be nil.
	Logger hclog.Logger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Server is one key broker.
type Server struct {
	cfg      Config
	log      hclog.Logger
	launches *launchStore
	sessions *sessionTable
	limit    *limiter
	unlock   func() error
	tokenKey *ecdsa.PrivateKey
}

// New opens the state folder, which no other process may use meanwhile, and
// returns a server without listeners.
func New(cfg Config) (_ *Server, err error) {
	if len(cfg.AdminToken) < minAdminToken {
		return nil, fmt.Errorf("admin token has %d characters, need %d", len(cfg.AdminToken), minAdminToken)
	}
	if cfg.SessionTTL == 0 {
		cfg.SessionTTL = 10 * time.Minute
	}
	if cfg.TokenTTL == 0 {
		cfg.TokenTTL = 10 * time.Minute
	}
	if cfg.Rate == 0 {
		cfg.Rate, cfg.Burst = 20, 40
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	unlock, err := lockState(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unlock())
		}
	}()
	if cfg.Token != nil {
		if _, err := cfg.Token.Newest(); err != nil {
			return nil, err
		}
	}
	launches, err := openStore(cfg.StateDir+"/launches", cfg.Token)
	if err != nil {
		return nil, err
	}
	key, err := loadTokenKey(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	return &Server{
		cfg: cfg, log: cfg.Logger.Named("keybroker"), launches: launches, unlock: unlock, tokenKey: key,
		sessions: &sessionTable{ttl: cfg.SessionTTL, sessions: map[string]*session{}},
		limit:    &limiter{rate: rate.Limit(cfg.Rate), burst: cfg.Burst, clients: map[string]*rate.Limiter{}},
	}, nil
}

// Close gives the state folder back. Nothing may be served any more.
func (s *Server) Close() error { return s.unlock() }

// GuestHandler serves the KBS protocol.
func (s *Server) GuestHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /kbs/v0/auth", s.handle(maxAuthBytes, nil, s.auth))
	mux.HandleFunc("POST /kbs/v0/attest", s.handle(maxAttestBytes, nil, s.attest))
	mux.HandleFunc("GET /kbs/v0/resource/{repository}/{type}/{tag}", s.handle(0, nil, s.resource))
	return mux
}

// Handler serves the KBS protocol and the admin API.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/kbs/", s.GuestHandler())
	mux.Handle(brokeradmin.PathPrefix, s.AdminHandler())
	return mux
}

// Serve answers on ln with TLS 1.3 until ctx ends, then closes ln.
func Serve(ctx context.Context, ln net.Listener, cert tls.Certificate, handler http.Handler, logger hclog.Logger) error {
	srv := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       logger.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	done := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		done <- srv.Shutdown(grace)
	})
	err := srv.Serve(tls.NewListener(ln, &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"},
	}))
	if stop() {
		return fmt.Errorf("serving: %w", err)
	}
	return <-done
}

// endpoint answers by itself or returns a refusal.
type endpoint = func(http.ResponseWriter, *http.Request, []byte) error

// handle wraps an endpoint with the limits every request has. A guard, if
// any, is asked before the body is read.
func (s *Server) handle(limit int64, guard func(*http.Request) error, next endpoint) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		if !s.limit.allow(r, s.cfg.Now()) {
			s.answerError(w, r, contract.Refuse("broker.rate-limited", "send fewer requests", "too many requests from this address"))
			return
		}
		if guard != nil {
			if err := guard(r); err != nil {
				s.answerError(w, r, err)
				return
			}
		}
		body, err := readBody(w, r, limit)
		if err == nil {
			err = next(w, r, body)
		}
		if err != nil {
			s.answerError(w, r, err)
		}
	}
}

func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, contract.Refuse("broker.body-too-large", "send a smaller body", "the body is larger than %d bytes", limit)
	}
	if err != nil {
		return nil, contract.Refuse("broker.request-malformed", "send the whole body", "the body could not be read").Because(err)
	}
	return body, nil
}

func (s *Server) answerError(w http.ResponseWriter, r *http.Request, err error) {
	refused := contract.AsRefusal(err)
	status := statusOf(refused.Code)
	if refused.Code == "broker.launch-unknown" && strings.HasPrefix(r.URL.Path, brokeradmin.PathPrefix) {
		status = http.StatusNotFound
	}
	if status == http.StatusInternalServerError {
		s.log.Error("request failed", "path", r.URL.Path, "err", err)
	} else {
		s.log.Info("request refused", "path", r.URL.Path, "code", refused.Code, "message", refused.Message, "cause", refused.Cause)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	body := brokeradmin.ErrorBody{Type: errorType + refused.Code, Detail: refused.Message, Code: refused.Code, Message: refused.Message, Remedy: refused.Remedy}
	if err := json.NewEncoder(w).Encode(body); err != nil {
		s.log.Debug("writing answer", "err", err)
	}
}

func statusOf(code string) int {
	switch code {
	case "internal":
		return http.StatusInternalServerError
	case "broker.rate-limited", "broker.busy":
		return http.StatusTooManyRequests
	case "broker.body-too-large":
		return http.StatusRequestEntityTooLarge
	case "broker.request-malformed", "broker.resource-malformed", "broker.registration-malformed":
		return http.StatusBadRequest
	case "broker.release-exhausted", "broker.full":
		return http.StatusForbidden
	case hsm.CodeMissing, hsm.CodeAmbiguous, hsm.CodePINFile, hsm.CodePIN, hsm.CodeLocked, hsm.CodeBusy, hsm.CodeFailed, hsm.CodeKeyMissing, hsm.CodeExtractable:
		return http.StatusServiceUnavailable
	case hsm.CodeDamaged:
		return http.StatusInternalServerError
	case "broker.launch-conflict":
		return http.StatusConflict
	case "broker.resource-unknown":
		return http.StatusNotFound
	}
	return http.StatusUnauthorized
}

func (s *Server) answer(w http.ResponseWriter, body any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(body); err != nil {
		s.log.Debug("writing answer", "err", err)
	}
}

// auth opens a session.
func (s *Server) auth(w http.ResponseWriter, _ *http.Request, body []byte) error {
	if refused := parseAuth(body); refused != nil {
		return refused
	}
	id, nonce, refused := s.sessions.open(s.cfg.Now())
	if refused != nil {
		return refused
	}
	http.SetCookie(w, &http.Cookie{
		Name: sessionCookie, Value: id, Path: "/", MaxAge: int(s.cfg.SessionTTL.Seconds()),
		Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode,
	})
	s.answer(w, challenge{Nonce: nonce})
	return nil
}

func cookie(r *http.Request) string {
	c, err := r.Cookie(sessionCookie)
	if err != nil {
		return ""
	}
	return c.Value
}

// attest verifies the answer to the session's challenge, counts the release
// and gives the token, in this order.
func (s *Server) attest(w http.ResponseWriter, r *http.Request, body []byte) error {
	id := cookie(r)
	nonce, refused := s.sessions.consume(id, s.cfg.Now())
	if refused != nil {
		return refused
	}
	a, refused := parseAttest(body)
	if refused != nil {
		return refused
	}
	token, err := s.release(a, nonce)
	if err != nil {
		if refusal := contract.AsRefusal(err); refusal.Code != "internal" {
			if err := s.launches.refuse(a.manifest.LaunchID, refusal, s.cfg.Now()); err != nil {
				s.log.Error("recording refusal", "launch_id", a.manifest.LaunchID, "err", err)
			}
		}
		return err
	}
	s.sessions.attested(id, &grant{launchID: a.manifest.LaunchID, key: a.key})
	s.answer(w, tokenResponse{token})
	return nil
}

func (s *Server) release(a *attestation, nonce string) (string, error) {
	launchID := a.manifest.LaunchID
	launch, refused := s.launches.get(launchID)
	if refused != nil {
		return "", refused
	}
	entry, refused := s.judge(a, nonce, launch)
	if refused != nil {
		return "", refused
	}
	if err := s.launches.opens(launch); err != nil {
		return "", err
	}
	token, err := s.signToken(launchID, a.rawKey, s.cfg.Now())
	if err != nil {
		return "", err
	}
	if err := s.launches.release(launch, *entry); err != nil {
		return "", err
	}
	s.log.Info("keys released", "launch_id", launchID, "chip_id", entry.ChipID[:16], "emulated", entry.Emulated)
	return token, nil
}

func resourceUnknown(name string) *contract.Refusal {
	return contract.Refuse("broker.resource-unknown", "let the tenant register the resource for this launch",
		"there is no resource %.400s for this launch", name)
}

// resource gives one secret of the attested launch, as JWE to its key.
func (s *Server) resource(w http.ResponseWriter, r *http.Request, _ []byte) error {
	var g *grant
	var refused *contract.Refusal
	if bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		g, refused = s.openToken(bearer, s.cfg.Now())
	} else {
		g, refused = s.sessions.grant(cookie(r), s.cfg.Now())
	}
	if refused != nil {
		return refused
	}
	name, refused := parseResourcePath(r.PathValue("repository") + "/" + r.PathValue("type") + "/" + r.PathValue("tag"))
	if refused != nil {
		return refused
	}
	launch, refused := s.launches.get(g.launchID)
	if refused != nil {
		return refused
	}
	value, err := s.launches.open(launch, name.Path())
	if err != nil {
		if refusal := contract.AsRefusal(err); refusal.Code != "internal" {
			if err := s.launches.refuse(g.launchID, refusal, s.cfg.Now()); err != nil {
				s.log.Error("recording refusal", "launch_id", g.launchID, "err", err)
			}
		}
		return err
	}
	sealed, err := sealTo(g.key, value)
	clear(value)
	if err != nil {
		return err
	}
	s.log.Info("resource given", "launch_id", g.launchID, "resource", name.Path())
	w.Header().Set("Content-Type", "application/json")
	_, err = io.WriteString(w, sealed)
	if err != nil {
		s.log.Debug("writing answer", "err", err)
	}
	return nil
}

// sealTo encrypts a resource to the guest's key, in flattened serialisation.
func sealTo(key *ecdsa.PublicKey, value []byte) (string, error) {
	enc, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.ECDH_ES_A256KW, Key: key}, nil)
	if err != nil {
		return "", fmt.Errorf("preparing resource encryption: %w", err)
	}
	obj, err := enc.Encrypt(value)
	if err != nil {
		return "", fmt.Errorf("encrypting resource: %w", err)
	}
	return obj.FullSerialize(), nil
}
