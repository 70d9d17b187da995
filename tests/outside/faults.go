package outside

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
)

// Faults is an object store that misbehaves on purpose in front of another
// one. Each request takes the first rule that wants it; what no rule wants
// passes. A fault is a function of the exchange, so that a new one is a few
// lines.
type Faults struct {
	next http.Handler

	mu    sync.Mutex
	rules []*rule
	seen  []Exchange
}

// Exchange is one request that came: what it asked for, and its number among
// all. Part is that of an upload, "" for a whole object.
type Exchange struct {
	N                   int
	Method, Range, Part string
}

// Fault answers in the store's place. next is the store.
type Fault func(w http.ResponseWriter, r *http.Request, next http.Handler)

type rule struct {
	want  func(Exchange) bool
	left  int
	fault Fault
}

// NewFaults puts a layer without faults before a store.
func NewFaults(next http.Handler) *Faults { return &Faults{next: next} }

// Inject lets a fault answer the next times requests that are wanted; times
// below 1 mean all of them.
func (f *Faults) Inject(times int, want func(Exchange) bool, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{want, times, fault})
}

// Heal takes every fault away, and forgets what came.
func (f *Faults) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules, f.seen = nil, nil
}

// Seen returns what came since Heal.
func (f *Faults) Seen() []Exchange {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Exchange(nil), f.seen...)
}

func (f *Faults) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.pick(r)(w, r, f.next)
}

func (f *Faults) pick(r *http.Request) Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := Exchange{len(f.seen) + 1, r.Method, r.Header.Get("Range"), r.URL.Query().Get("partNumber")}
	f.seen = append(f.seen, e)
	for _, rule := range f.rules {
		if rule.left < 0 || !rule.want(e) {
			continue
		}
		if rule.left > 0 {
			if rule.left--; rule.left == 0 {
				rule.left = -1
			}
		}
		return rule.fault
	}
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) { next.ServeHTTP(w, r) }
}

// Any wants every request.
func Any(Exchange) bool { return true }

// From wants the nth request and what follows.
func From(n int) func(Exchange) bool { return func(e Exchange) bool { return e.N >= n } }

// Method wants requests of one method.
func Method(m string) func(Exchange) bool { return func(e Exchange) bool { return e.Method == m } }

// OncePerPart wants the first request for each part of an upload.
func OncePerPart() func(Exchange) bool {
	seen := map[string]bool{}
	return func(e Exchange) bool {
		again := seen[e.Part]
		seen[e.Part] = true
		return e.Part != "" && !again
	}
}

// Status answers with a code and headers, given as name, value.
func Status(code int, headers ...string) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		_, _ = io.Copy(io.Discard, r.Body)
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
	}
}

// Reset closes the connection without an answer.
func Reset(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }

// ResetAfter closes the connection after n bytes of the answer.
func ResetAfter(n int) Fault {
	return altered(func(a *answer, w http.ResponseWriter) {
		a.send(w, a.body.Bytes()[:min(n, a.body.Len())])
		panic(http.ErrAbortHandler)
	})
}

// ResetAfterReading closes the connection after n bytes of the request.
func ResetAfterReading(n int64) Fault {
	return func(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
		_, _ = io.CopyN(io.Discard, r.Body, n)
		panic(http.ErrAbortHandler)
	}
}

// SlowReader reads a byte of the request whenever next returns true, and is the store
// for what is left when it returns false.
func SlowReader(next func() bool) Fault {
	return func(w http.ResponseWriter, r *http.Request, store http.Handler) {
		var slowly bytes.Buffer
		for next() {
			if n, err := io.CopyN(&slowly, r.Body, 1); n == 0 || err != nil {
				break
			}
		}
		r.Body = io.NopCloser(io.MultiReader(&slowly, r.Body))
		store.ServeHTTP(w, r)
	}
}

// Say reads the request and answers with a body, whatever the store would.
func Say(code int, body string) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
}

// Early says that all is well before it has read the request, and never reads
// it.
func Early(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(w).Flush()
}

// Hang reads the request and answers as the store does once it is released, or
// never when the client goes away.
func Hang(arrived chan<- struct{}, release <-chan struct{}) Fault {
	return func(w http.ResponseWriter, r *http.Request, store http.Handler) {
		var body bytes.Buffer
		_, _ = io.Copy(&body, r.Body) // a server sees the end of a client only after that
		arrived <- struct{}{}
		select {
		case <-release:
			r.Body = io.NopCloser(&body)
			store.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	}
}

// Short keeps all but the last n bytes of the request and says that all is
// well.
func Short(n int64) Fault {
	return func(w http.ResponseWriter, r *http.Request, store http.Handler) {
		body := r.Body
		r.ContentLength -= n
		r.Body = io.NopCloser(io.LimitReader(body, r.ContentLength))
		store.ServeHTTP(w, r)
		_, _ = io.Copy(io.Discard, body)
	}
}

// Drip answers and then sends a byte whenever next returns true, till it
// returns false.
func Drip(next func() bool) Fault {
	return altered(func(a *answer, w http.ResponseWriter) {
		a.send(w, nil)
		for _, b := range a.body.Bytes() {
			if !next() {
				return
			}
			a.more(w, []byte{b})
		}
	})
}

// Header sets a header of the store's answer.
func Header(name, value string) Fault {
	return altered(func(a *answer, w http.ResponseWriter) {
		a.header.Set(name, value)
		a.send(w, a.body.Bytes())
	})
}

// Claim makes the store say that the object has another size.
func Claim(size int64) Fault {
	return altered(func(a *answer, w http.ResponseWriter) {
		span, _, _ := strings.Cut(a.header.Get("Content-Range"), "/")
		a.header.Set("Content-Range", span+"/"+strconv.FormatInt(size, 10))
		a.send(w, a.body.Bytes())
	})
}

// Corrupt flips a bit in the middle of what the store sends.
func Corrupt(w http.ResponseWriter, r *http.Request, next http.Handler) {
	altered(func(a *answer, w http.ResponseWriter) {
		if body := a.body.Bytes(); len(body) > 0 {
			body[len(body)/2] ^= 1
		}
		a.send(w, a.body.Bytes())
	})(w, r, next)
}

// answer is what the store said, held back.
type answer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(code int)        { a.code = code }
func (a *answer) Write(b []byte) (int, error) { return a.body.Write(b) }

// send gives the head, and some of the body.
func (a *answer) send(w http.ResponseWriter, body []byte) {
	maps.Copy(w.Header(), a.header)
	w.Header().Set("Content-Length", strconv.Itoa(a.body.Len()))
	w.WriteHeader(a.code)
	a.more(w, body)
}

func (*answer) more(w http.ResponseWriter, body []byte) {
	_, _ = w.Write(body)
	_ = http.NewResponseController(w).Flush()
}

func altered(change func(*answer, http.ResponseWriter)) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		a := &answer{header: http.Header{}, code: http.StatusOK}
		next.ServeHTTP(a, r)
		change(a, w)
	}
}
