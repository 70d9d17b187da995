package metadata

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/confidential-node/agent/firmware/contract"
)

// httpStatus maps the service's own refusals to HTTP. Everything else a sink
// refuses is 422, and what is no refusal 500.
func httpStatus(code string) int {
	switch code {
	case "metadata.token":
		return http.StatusForbidden
	case "metadata.path", "metadata.result-name":
		return http.StatusNotFound
	case "metadata.method":
		return http.StatusMethodNotAllowed
	case "metadata.malformed":
		return http.StatusBadRequest
	case "metadata.too-large":
		return http.StatusRequestEntityTooLarge
	case "metadata.slow":
		return http.StatusRequestTimeout
	case "metadata.rate":
		return http.StatusTooManyRequests
	case "metadata.conflict", "metadata.challenge":
		return http.StatusConflict
	case "internal":
		return http.StatusInternalServerError
	default:
		return http.StatusUnprocessableEntity
	}
}

func refuse(code, format string, args ...any) *contract.Refusal {
	return contract.Refuse("metadata."+code, "follow the metadata interface of this node's version", format, args...)
}

// ServeHTTP answers one request of the guest.
func (s *session) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	body, err := s.answer(w, r)
	if err != nil {
		refusal := contract.AsRefusal(err)
		if refusal.Code == "internal" && r.Context().Err() == nil {
			s.log.Error("guest's request failed", "guest_id", s.ID, "err", err)
		}
		// What is left of the body is not waited for.
		w.Header().Set("Connection", "close")
		writeJSON(w, httpStatus(refusal.Code), refusal)
		return
	}
	switch v := body.(type) {
	case nil:
		w.WriteHeader(http.StatusNoContent)
	case []byte:
		write(w, http.StatusOK, v)
	default:
		writeJSON(w, http.StatusOK, v)
	}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	write(w, status, data)
}

func write(w http.ResponseWriter, status int, data []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(data) // if the guest hung up, there is nobody to tell
}

// answer returns nil for an empty answer, bytes to send as they are, or a
// value to encode.
func (s *session) answer(w http.ResponseWriter, r *http.Request) (any, error) {
	if !s.limiter.AllowN(s.now(), 1) {
		return nil, refuse("rate", "more than %d requests a second", requestRate)
	}
	if err := checkHead(r); err != nil {
		return nil, err
	}
	deadline(w, bodyTimeout)
	path := r.URL.Path
	name, isResult := strings.CutPrefix(path, contract.PathResults)
	method := http.MethodGet
	switch {
	case isResult, path == contract.PathResultManifest:
		method = http.MethodPut
	case path == contract.PathEvidence, path == contract.PathStatus:
		method = http.MethodPost
	}
	known := []string{
		contract.PathManifest, contract.PathNetwork, contract.PathEndorsements, contract.PathBoot, contract.PathChallenge,
		contract.PathEvidence, contract.PathStatus, contract.PathResultManifest,
	}
	if !isResult && !slices.Contains(known, path) {
		return nil, refuse("path", "there is no such path")
	}
	if r.Method != method {
		return nil, refuse("method", "this path takes %s only", method)
	}
	if (r.URL.RawQuery != "" || r.URL.ForceQuery) && path != contract.PathEvidence {
		return nil, refuse("malformed", "this path takes no query")
	}
	if method == http.MethodGet && (r.ContentLength != 0 || len(r.TransferEncoding) > 0) {
		return nil, refuse("malformed", "a question has no body")
	}
	if !isResult && len(r.TransferEncoding) > 0 {
		return nil, refuse("malformed", "this path takes a body of a length that is said")
	}
	switch {
	case isResult:
		return nil, s.result(w, r, name)
	case method == http.MethodGet:
		return s.get(r.Context(), path)
	default:
		return nil, s.take(r, path)
	}
}

// checkHead refuses what no guest of ours sends: a request without the token,
// one that was forwarded, and one whose target is not a plain path.
func checkHead(r *http.Request) error {
	if token := r.Header.Values(contract.MetadataHeader); len(token) != 1 || token[0] != contract.MetadataToken {
		return refuse("token", "header %s: %s is missing", contract.MetadataHeader, contract.MetadataToken)
	}
	for _, h := range []string{"Forwarded", "X-Forwarded-For", "Origin", "Upgrade", "Te", "Trailer", "Expect", "Content-Encoding"} {
		if len(r.Header.Values(h)) > 0 || (h == "Trailer" && len(r.Trailer) > 0) {
			return refuse("malformed", "header %s is not accepted", h)
		}
	}
	target, _, _ := strings.Cut(r.RequestURI, "?")
	if r.ProtoMajor != 1 || r.ProtoMinor != 1 || target != r.URL.Path || r.URL.Host != "" {
		return refuse("malformed", "the request is not HTTP/1.1 for a plain path")
	}
	return nil
}

func (s *session) get(ctx context.Context, path string) (any, error) {
	switch path {
	case contract.PathManifest:
		return s.Manifest, nil
	case contract.PathNetwork:
		facts := s.Network()
		if facts.UnixTime == 0 {
			facts.UnixTime = s.now().Unix()
		}
		return facts, nil
	case contract.PathEndorsements:
		return s.Endorsements(), nil
	case contract.PathBoot:
		return s.Boot, nil
	default:
		return s.poll(ctx)
	}
}

// poll waits for a challenge. The oldest is given out until it is answered or
// nobody waits for it any more, so that a guest which lost an answer on the
// way gets it again.
func (s *session) poll(ctx context.Context) (any, error) {
	timer := time.NewTimer(contract.ChallengePollSeconds * time.Second)
	defer timer.Stop()
	for {
		s.mu.Lock()
		if len(s.pending) > 0 {
			c := s.pending[0].Challenge
			s.mu.Unlock()
			return c, nil
		}
		wake := s.wake
		s.mu.Unlock()
		select {
		case <-wake:
		case <-timer.C:
			return nil, nil //nolint:nilnil // an empty answer: none came
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.gone:
			return nil, refuseGone()
		}
	}
}

// take reads a small body.
func (s *session) take(r *http.Request, path string) error {
	limit := contract.MaxStatusBytes
	switch path {
	case contract.PathEvidence:
		limit = contract.MaxEvidenceBytes
	case contract.PathResultManifest:
		limit = contract.MaxResultManifestBytes
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, int64(limit)+1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refuse("slow", "the body took more than %s", bodyTimeout)
	case err != nil:
		return refuse("malformed", "the body ended early").Because(err)
	case len(data) > limit:
		return refuse("too-large", "the body is larger than %d bytes", limit)
	case len(data) == 0:
		return refuse("malformed", "the body is empty")
	}
	switch path {
	case contract.PathEvidence:
		return s.evidence(r.URL.RawQuery, data)
	case contract.PathStatus:
		return s.status(r.Context(), data)
	default:
		return s.resultManifest(r.Context(), data)
	}
}

func (s *session) evidence(query string, data []byte) error {
	q, err := url.ParseQuery(query)
	if err != nil || len(q) != 1 || len(q["id"]) != 1 {
		return refuse("malformed", "the query is not id=ID")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.pending, func(c *challenge) bool { return c.ID == q["id"][0] })
	if i < 0 {
		return refuse("challenge", "no such challenge waits for an answer")
	}
	s.pending[i].answer <- data // capacity 1, and removed with the first answer
	s.pending = slices.Delete(s.pending, i, i+1)
	return nil
}

func (s *session) status(ctx context.Context, data []byte) error {
	status, err := parseStatus(data)
	if err != nil {
		return refuse("malformed", "the status is malformed").Because(err)
	}
	return s.Sink.Status(ctx, status)
}

// maxUptimeMS is a hundred years.
const maxUptimeMS = 100 * 366 * 24 * 3600 * 1000

// parseStatus checks the form of a guest's word. Text in it will be shown to
// people: control characters become blanks.
func parseStatus(data []byte) (contract.GuestStatus, error) {
	var s contract.GuestStatus
	if err := contract.UnmarshalStrict(data, contract.MaxStatusBytes, &s); err != nil {
		return s, err
	}
	phases := []contract.GuestPhase{
		contract.PhaseBooted, contract.PhaseAttested, contract.PhaseInputs, contract.PhaseImage,
		contract.PhaseRunning, contract.PhaseCollecting, contract.PhaseDone, contract.PhaseFailed,
	}
	switch {
	case !slices.Contains(phases, s.Phase):
		return s, errors.New("unknown phase")
	case s.UptimeMS < 0 || s.UptimeMS > maxUptimeMS:
		return s, fmt.Errorf("uptime %d ms", s.UptimeMS)
	case s.ExitCode < 0 || s.ExitCode > 255:
		return s, fmt.Errorf("exit code %d", s.ExitCode)
	case (s.Phase == contract.PhaseFailed) != (s.Refusal != nil):
		return s, errors.New("a refusal belongs to phase failed, and only there")
	}
	if r := s.Refusal; r != nil {
		if !regexp.MustCompile(`^[a-z0-9-]+(\.[a-z0-9-]+){0,5}$`).MatchString(r.Code) || len(r.Code) > 64 {
			return s, errors.New("refusal code is malformed")
		}
		r.Message, r.Remedy = printable(r.Message), printable(r.Remedy)
	}
	return s, nil
}

func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
}

// resultManifest ends the results. The same bytes again are no error: the
// guest may not have heard the first answer.
func (s *session) resultManifest(ctx context.Context, data []byte) error {
	s.ending.Lock()
	defer s.ending.Unlock()
	sum := sha256.Sum256(data)
	s.mu.Lock()
	ended, busy := s.ended, len(s.receiving) > 0
	if ended == nil && !busy {
		s.ended = &sum // no result begins from here on
	}
	s.mu.Unlock()
	switch {
	case ended != nil && *ended != sum:
		return refuse("conflict", "the results have ended")
	case ended != nil:
		return nil
	case busy:
		return refuse("conflict", "a result is still on its way")
	}
	if err := s.Sink.ResultManifest(ctx, data); err != nil {
		s.mu.Lock()
		s.ended = nil
		s.mu.Unlock()
		return err
	}
	return nil
}

func (s *session) result(w http.ResponseWriter, r *http.Request, name string) error {
	if !slices.Contains(s.Results, name) {
		return refuse("result-name", "the manifest names no such result")
	}
	s.mu.Lock()
	switch {
	case s.ended != nil:
		s.mu.Unlock()
		return refuse("conflict", "the results have ended")
	case s.receiving[name]:
		s.mu.Unlock()
		return refuse("conflict", "this result is already on its way")
	}
	s.receiving[name] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.receiving, name)
	}()
	body := &paced{r: r.Body, w: w, now: s.now, start: s.now()}
	err := s.Sink.Result(r.Context(), name, body)
	deadlineWrite(w, bodyTimeout)
	switch {
	case body.slow:
		return refuse("slow", "the result came too slowly").Because(err)
	case body.broken != nil:
		return refuse("malformed", "the body ended early").Because(body.broken)
	}
	return err
}

// paced reads a result and ends one that stalls or trickles.
type paced struct {
	r     io.Reader
	w     http.ResponseWriter
	now   func() time.Time
	start time.Time
	n     int64
	// slow and broken say how the body ended, if not well.
	slow   bool
	broken error
}

func (p *paced) Read(b []byte) (int, error) {
	now := p.now()
	if now.Sub(p.start) > resultGrace+time.Duration(p.n/resultRate)*time.Second {
		p.slow = true
		return 0, fmt.Errorf("reading result: %w", os.ErrDeadlineExceeded)
	}
	deadline(p.w, stallTimeout)
	n, err := p.r.Read(b)
	p.n += int64(n)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		p.slow = true
	case err != nil && !errors.Is(err, io.EOF):
		p.broken = err
	}
	return n, err
}

// deadline bounds reading the request. Sockets know the real clock only, and
// test recorders none.
func deadline(w http.ResponseWriter, d time.Duration) {
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(d))
}

// deadlineWrite bounds writing the answer after a body that took long.
func deadlineWrite(w http.ResponseWriter, d time.Duration) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(d))
}
