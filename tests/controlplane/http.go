package controlplane

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// maxBody bounds a request; the largest is a launch, whose bytes are base64.
const maxBody = 1 << 20

// answer is one route: it returns what is encoded as JSON; raw bytes pass.
type answer func(r *http.Request) (any, error)

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, f := range map[string]answer{
		"GET /v1/nodes":                 s.getNodes,
		"POST /v1/nodes/{id}/enrol":     s.postEnrol,
		"POST /v1/nodes/{id}/cordon":    s.postCordon,
		"POST /v1/nodes/{id}/uncordon":  s.postUncordon,
		"POST /v1/nodes/{id}/resolve":   s.postResolve,
		"POST /v1/nodes/{id}/revoke":    s.postRevoke,
		"POST /v1/launches":             s.postLaunch,
		"GET /v1/guests/{id}":           s.getGuest,
		"POST /v1/guests/{id}/stop":     s.postStop,
		"POST /v1/guests/{id}/uploads":  s.postUpload,
		"POST /v1/guests/{id}/evidence": s.postEvidence,
		"GET /v1/guests/{id}/evidence":  s.getEvidence,
		"GET /v1/events":                s.getEvents,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.reply(w, r, f) })
	}
	want := sha256.Sum256([]byte(s.id.token))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		got := sha256.Sum256([]byte(token))
		if !bearer || subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			s.refuse(w, contract.Refuse(codeUnauthorised, "send the bearer token of the control plane's folder", "the bearer token is missing or wrong"))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		mux.ServeHTTP(w, r)
	})
}

func (s *Server) reply(w http.ResponseWriter, r *http.Request, f answer) {
	out, err := f(r)
	if err != nil {
		s.refuse(w, err)
		return
	}
	raw, ok := out.([]byte)
	if !ok {
		if raw, err = json.Marshal(out); err != nil {
			s.refuse(w, fmt.Errorf("encoding answer: %w", err))
			return
		}
	}
	s.write(w, http.StatusOK, raw)
}

func (s *Server) refuse(w http.ResponseWriter, err error) {
	refusal := contract.AsRefusal(err)
	status := http.StatusConflict
	switch refusal.Code {
	case codeBadRequest:
		status = http.StatusBadRequest
	case codeUnauthorised:
		status = http.StatusUnauthorized
	case codeGuestUnknown, client.CodeNoEvidence:
		status = http.StatusNotFound
	case "internal":
		status = http.StatusInternalServerError
		s.cfg.Logger.Error("answering the API", "err", err)
	}
	raw, err := json.Marshal(refusal)
	if err != nil {
		raw = []byte("{}")
	}
	s.write(w, status, raw)
}

func (s *Server) write(w http.ResponseWriter, status int, raw []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if _, err := w.Write(raw); err != nil {
		s.cfg.Logger.Debug("answering the API", "err", err)
	}
}

// read decodes a request's body strictly.
func read(r *http.Request, v any) error {
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		return errBadRequest("the body cannot be read or is larger than %d bytes", maxBody)
	}
	if len(raw) == 0 {
		return nil
	}
	if err := contract.UnmarshalStrict(raw, maxBody, v); err != nil {
		return errBadRequest("the body does not parse: %v", err)
	}
	return nil
}

func (s *Server) getNodes(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.view.mu.Lock()
	defer s.view.mu.Unlock()
	nodes := []client.Node{}
	for _, id := range slices.Sorted(maps.Keys(s.state.Hosts)) {
		h := s.state.Hosts[id]
		out := client.Node{ID: id, Epoch: h.Epoch, Cordoned: h.Cordoning, StoreID: h.StoreID}
		for _, code := range slices.Sorted(maps.Keys(h.Watched.Alarms)) {
			out.Alarms = append(out.Alarms, h.Watched.Alarms[code])
		}
		out.AuditEntries = h.Watched.Audit.Size
		if n := s.view.nodes[id]; n != nil {
			for _, w := range n.heartbeat.GetWarnings() {
				out.Warnings = append(out.Warnings, *api.RefusalFromWire(w))
			}
			seen := n.lastSeen
			out.LastSeen = &seen
			out.Guests, out.Outbox = n.heartbeat.GetGuests(), n.heartbeat.GetOutbox()
			out.Cordoned = h.Cordoning || n.heartbeat.GetCordoned()
			out.NodeEpoch = max(n.heartbeat.GetIssuerEpoch(), n.capability.GetIssuerEpoch())
			var err error
			if out.Capability, err = encode(n.capability); err != nil {
				return nil, err
			}
		}
		nodes = append(nodes, out)
	}
	return map[string]any{"nodes": nodes}, nil
}

// encode returns protojson, nil for a message that is not there.
func encode(m proto.Message) (json.RawMessage, error) {
	if !m.ProtoReflect().IsValid() {
		return nil, nil
	}
	raw, err := protojson.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encoding answer: %w", err)
	}
	return raw, nil
}

func (s *Server) postEnrol(r *http.Request) (any, error) {
	creds, issuer, caPEM, err := s.EnrolHost(r.Context(), r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	return client.Enrolment{Credentials: creds, IssuerKey: issuer, CAPEM: caPEM, Servers: []string{s.NATSURL()}}, nil
}

func (s *Server) postCordon(r *http.Request) (any, error) {
	var in client.Cordon
	if err := read(r, &in); err != nil {
		return nil, err
	}
	return s.cordon(r.Context(), r.PathValue("id"), true, in.Reason)
}

func (s *Server) postUncordon(r *http.Request) (any, error) {
	return s.cordon(r.Context(), r.PathValue("id"), false, "")
}

func (s *Server) postResolve(r *http.Request) (any, error) {
	return struct{}{}, s.Resolve(r.PathValue("id"))
}

func (s *Server) postRevoke(r *http.Request) (any, error) {
	return struct{}{}, s.Revoke(r.PathValue("id"))
}

func (s *Server) postLaunch(r *http.Request) (any, error) {
	var in client.Launch
	if err := read(r, &in); err != nil {
		return nil, err
	}
	l := &api.LaunchGuest{}
	if err := protojson.Unmarshal(in.Launch, l); err != nil {
		return nil, errBadRequest("launch does not parse as a LaunchGuest")
	}
	return s.launch(r.Context(), in.Node, l, in.RequiredFeatures)
}

func (s *Server) getGuest(r *http.Request) (any, error) {
	id := r.PathValue("id")
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.state.Guests[id]
	if g == nil {
		return nil, errGuestUnknown(id)
	}
	s.view.mu.Lock()
	defer s.view.mu.Unlock()
	out := client.Guest{GuestID: id, Node: g.Node, Generation: g.Generation, CommandID: g.CommandID, Outcome: client.OutcomePending}
	if o := s.view.outcomes[g.CommandID]; o != nil {
		out.Outcome, out.Refusal = client.OutcomeDone, o.refusal
		if o.refusal != nil {
			out.Outcome = client.OutcomeRefused
		}
	}
	v := s.view.guests[id]
	if v == nil {
		return out, nil
	}
	var err error
	if out.State, err = encode(v.state); err != nil {
		return nil, err
	}
	for _, result := range v.results {
		raw, err := encode(result)
		if err != nil {
			return nil, err
		}
		out.Results = append(out.Results, raw)
	}
	for _, name := range slices.Sorted(maps.Keys(v.uploads)) {
		upload, err := v.uploads[name].encoded()
		if err != nil {
			return nil, err
		}
		out.Uploads = append(out.Uploads, upload)
	}
	return out, nil
}

func (s *Server) postStop(r *http.Request) (any, error) {
	var in client.Stop
	if err := read(r, &in); err != nil {
		return nil, err
	}
	return s.stopGuest(r.Context(), r.PathValue("id"), in)
}

func (s *Server) postEvidence(r *http.Request) (any, error) {
	var in client.Challenge
	if err := read(r, &in); err != nil {
		return nil, err
	}
	return s.requestEvidence(r.Context(), r.PathValue("id"), in)
}

func (s *Server) getEvidence(r *http.Request) (any, error) {
	id, nonce := r.PathValue("id"), strings.ToLower(r.URL.Query().Get("nonce"))
	if _, err := hex.DecodeString(nonce); err != nil || nonce == "" {
		return nil, errBadRequest("nonce is not hex")
	}
	s.mu.Lock()
	known := s.state.Guests[id] != nil
	s.mu.Unlock()
	if !known {
		return nil, errGuestUnknown(id)
	}
	s.view.mu.Lock()
	defer s.view.mu.Unlock()
	if g := s.view.guests[id]; g != nil && g.evidence[nonce] != nil {
		return g.evidence[nonce], nil
	}
	return nil, contract.Refuse(client.CodeNoEvidence, "ask again, or look at the events for a refusal", "there is no answer to this challenge yet")
}

func (s *Server) getEvents(r *http.Request) (any, error) {
	const maxLimit = 1000
	q := r.URL.Query()
	number := func(name string, fallback uint64) (uint64, error) {
		if q.Get(name) == "" {
			return fallback, nil
		}
		n, err := strconv.ParseUint(q.Get(name), 10, 64)
		if err != nil {
			return 0, errBadRequest("%s is not a number", name)
		}
		return n, nil
	}
	since, err := number("since", 0)
	if err != nil {
		return nil, err
	}
	limit, err := number("limit", maxLimit)
	if err != nil {
		return nil, err
	}
	s.view.mu.Lock()
	defer s.view.mu.Unlock()
	events := []client.Event{}
	for _, e := range s.view.events {
		if e.Seq <= since || (e.Kind == api.KindHeartbeat && q.Get("heartbeats") != "true") {
			continue
		}
		if uint64(len(events)) >= min(limit, maxLimit) {
			break
		}
		events = append(events, e)
	}
	return map[string]any{"events": events}, nil
}
