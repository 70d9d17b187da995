package keybroker

import (
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/base64"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/confidential-node/agent/firmware/contract"
)

// maxSessions bounds memory: a session is some hundred bytes.
const maxSessions = 8192

const sessionRemedy = "start again with POST /kbs/v0/auth"

// grant is what a successful attestation yields: one launch's resources, for
// one key.
type grant struct {
	launchID string
	key      *ecdsa.PublicKey
}

type session struct {
	nonce   string
	expires time.Time
	// used is set by the first attest request, whatever its outcome.
	used  bool
	grant *grant
}

// sessionTable maps cookies to sessions.
type sessionTable struct {
	ttl time.Duration

	mu       sync.Mutex
	sessions map[string]*session
}

func random(n int) []byte {
	out := make([]byte, n)
	rand.Read(out) // never fails: crypto/rand aborts the program instead
	return out
}

// open starts a session and returns cookie and nonce.
func (t *sessionTable) open(now time.Time) (string, string, *contract.Refusal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.sessions) >= maxSessions {
		for id, s := range t.sessions {
			if now.After(s.expires) {
				delete(t.sessions, id)
			}
		}
	}
	if len(t.sessions) >= maxSessions {
		return "", "", contract.Refuse("broker.busy", "wait a minute and try again", "too many sessions are open")
	}
	id := base64.RawURLEncoding.EncodeToString(random(32))
	nonce := base64.StdEncoding.EncodeToString(random(32))
	t.sessions[id] = &session{nonce: nonce, expires: now.Add(t.ttl)}
	return id, nonce, nil
}

func (t *sessionTable) liveLocked(id string, now time.Time) (*session, *contract.Refusal) {
	s := t.sessions[id]
	if s == nil {
		return nil, contract.Refuse("broker.session-unknown", sessionRemedy, "the request carries no known session cookie")
	}
	if now.After(s.expires) {
		delete(t.sessions, id)
		return nil, contract.Refuse("broker.session-expired", sessionRemedy, "the session has expired")
	}
	return s, nil
}

// consume takes the session's nonce. It can be taken once.
func (t *sessionTable) consume(id string, now time.Time) (string, *contract.Refusal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, refused := t.liveLocked(id, now)
	if refused != nil {
		return "", refused
	}
	if s.used {
		return "", contract.Refuse("broker.nonce-used", sessionRemedy, "the session's nonce was already answered")
	}
	s.used = true
	return s.nonce, nil
}

// attested binds the grant to the session.
func (t *sessionTable) attested(id string, g *grant) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.sessions[id]; s != nil {
		s.grant = g
	}
}

func (t *sessionTable) grant(id string, now time.Time) (*grant, *contract.Refusal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, refused := t.liveLocked(id, now)
	if refused != nil {
		return nil, refused
	}
	if s.grant == nil {
		return nil, contract.Refuse("broker.not-attested", "answer the challenge with POST /kbs/v0/attest first", "the session has not attested")
	}
	return s.grant, nil
}

// maxClients bounds the limiter's memory.
const maxClients = 8192

// limiter allows each client address its own rate.
type limiter struct {
	rate  rate.Limit
	burst int

	mu      sync.Mutex
	clients map[string]*rate.Limiter
}

func (l *limiter) allow(r *http.Request, now time.Time) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.clients[host]
	if c == nil {
		if len(l.clients) >= maxClients {
			for k, v := range l.clients {
				if v.TokensAt(now) >= float64(l.burst) {
					delete(l.clients, k)
				}
			}
		}
		if len(l.clients) >= maxClients {
			return false
		}
		c = rate.NewLimiter(l.rate, l.burst)
		l.clients[host] = c
	}
	return c.AllowN(now, 1)
}
