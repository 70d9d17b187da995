// Package client is a typed Go client of the reference control plane's HTTPS
// API, and the shapes of its documents. It owns no state but its connections
// and is safe for concurrent use. It never logs: launches carry credentials.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

const (
	maxReply     = 16 << 20
	pollInterval = 100 * time.Millisecond
)

// ErrUnreachable means that the control plane gave no answer.
var ErrUnreachable = errors.New("control plane is not reachable")

// Node is one host as the control plane knows it.
type Node struct {
	ID       string     `json:"id"`
	LastSeen *time.Time `json:"last_seen,omitempty"`
	// Cordoned is the node's own word, or a Cordon on its way.
	Cordoned bool   `json:"cordoned"`
	Guests   uint32 `json:"guests"`
	Outbox   uint64 `json:"outbox"`
	// Epoch is the issuer's; NodeEpoch the one the node last reported.
	Epoch     uint64 `json:"epoch"`
	NodeEpoch uint64 `json:"node_epoch"`
	StoreID   string `json:"store_id,omitempty"`
	// AuditEntries of the node's audit log are witnessed.
	AuditEntries int64 `json:"audit_entries"`
	// Alarms are the control plane's, until they are resolved; nothing is
	// launched on the node meanwhile. Warnings are the node's own.
	Alarms   []Alarm            `json:"alarms,omitempty"`
	Warnings []contract.Refusal `json:"warnings,omitempty"`
	// Capability is protojson of api.Capability.
	Capability json.RawMessage `json:"capability,omitempty"`
}

// Alarm is something about a node that somebody has to look into.
type Alarm struct {
	Code    string    `json:"code"`
	Message string    `json:"message"`
	Remedy  string    `json:"remedy"`
	Since   time.Time `json:"since"`
}

// Command outcomes.
const (
	OutcomePending = "pending"
	OutcomeRefused = "refused"
	OutcomeDone    = "done"
)

// Guest is one guest as the control plane knows it.
type Guest struct {
	GuestID    string `json:"guest_id"`
	Node       string `json:"node"`
	Generation uint64 `json:"generation"`
	CommandID  string `json:"command_id"`
	// Outcome is the launch command's.
	Outcome string `json:"outcome"`
	// Refusal of the launch command.
	Refusal *contract.Refusal `json:"refusal,omitempty"`
	// State is protojson of the latest api.GuestState.
	State json.RawMessage `json:"state,omitempty"`
	// Results are protojson of api.ResultUploaded.
	Results []json.RawMessage `json:"results,omitempty"`
	// Uploads in parts that wait for an answer.
	Uploads []Upload `json:"uploads,omitempty"`
}

// GuestState decodes the latest state; an empty one when there is none.
func (g *Guest) GuestState() (*api.GuestState, error) {
	s := &api.GuestState{}
	if len(g.State) == 0 {
		return s, nil
	}
	if err := decode(g.State, s); err != nil {
		return nil, fmt.Errorf("reading guest state: %w", err)
	}
	return s, nil
}

// Ended reports whether nothing more will happen to the guest.
func (g *Guest) Ended() bool {
	s, err := g.GuestState()
	if err != nil {
		return false
	}
	switch s.GetStatus() {
	case api.GuestStatus_GUEST_STATUS_FINISHED, api.GuestStatus_GUEST_STATUS_FAILED, api.GuestStatus_GUEST_STATUS_STOPPED:
		return true
	case api.GuestStatus_GUEST_STATUS_UNSPECIFIED, api.GuestStatus_GUEST_STATUS_ACCEPTED, api.GuestStatus_GUEST_STATUS_STARTED,
		api.GuestStatus_GUEST_STATUS_ATTESTED, api.GuestStatus_GUEST_STATUS_RUNNING, api.GuestStatus_GUEST_STATUS_COLLECTING:
	}
	return g.Outcome == OutcomeRefused
}

// Sent is a command on its way.
type Sent struct {
	CommandID string `json:"command_id"`
	GuestID   string `json:"guest_id,omitempty"`
	Node      string `json:"node"`
}

// Launch asks for a guest.
type Launch struct {
	// Node is the host; empty lets the control plane choose.
	Node string `json:"node"`
	// Launch is protojson of api.LaunchGuest; an empty guest_id is assigned.
	Launch           json.RawMessage `json:"launch"`
	RequiredFeatures []string        `json:"required_features,omitempty"`
}

// Stop ends a guest.
type Stop struct {
	// Generation of the guest; 0 means the latest known.
	Generation   uint64  `json:"generation"`
	GraceSeconds float64 `json:"grace_seconds"`
}

// Challenge asks for evidence.
type Challenge struct {
	Nonce string `json:"nonce"`
}

// Cordon closes a node.
type Cordon struct {
	Reason string `json:"reason"`
}

// Event is one event in the order of arrival.
type Event struct {
	// Seq is the position in the control plane's stream.
	Seq uint64 `json:"seq"`
	// Kind is the event's kind, see api.EventKind.
	Kind string `json:"kind"`
	// Event is protojson of api.Event.
	Event json.RawMessage `json:"event"`
}

// Decode returns the event.
func (e *Event) Decode() (*api.Event, error) {
	out := &api.Event{}
	// The decoder passes over what it does not know without reading it all.
	if !json.Valid(e.Event) {
		return nil, errors.New("reading event: it is no JSON")
	}
	if err := decode(e.Event, out); err != nil {
		return nil, fmt.Errorf("reading event: %w", err)
	}
	return out, nil
}

// Enrolment is what a new host needs. Credentials hold its private key.
type Enrolment struct {
	Credentials []byte   `json:"credentials"`
	IssuerKey   []byte   `json:"issuer_key"`
	CAPEM       []byte   `json:"ca_pem"`
	Servers     []string `json:"servers"`
}

func decode(raw []byte, m proto.Message) error {
	return (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, m)
}

// Client speaks to one control plane.
type Client struct {
	base, token string
	http        *http.Client
}

// New returns a client. caPEM holds the only roots that are believed.
func New(baseURL string, caPEM []byte, token string) (*Client, error) {
	u, err := url.Parse(baseURL)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("making control plane client: the URL is not https://host[:port]")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(caPEM) {
		return nil, errors.New("making control plane client: no CA certificate given")
	}
	return &Client{strings.TrimSuffix(baseURL, "/"), token, &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}, ForceAttemptHTTP2: true,
	}}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call sends body as JSON, or nothing, and decodes the answer into reply; a
// *[]byte gets it as it is. Refusals come back as *contract.Refusal.
func (c *Client) call(ctx context.Context, method, path string, body, reply any) error {
	var in io.Reader = http.NoBody
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encoding request: %w", err)
		}
		in = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, in)
	if err != nil {
		return fmt.Errorf("asking the control plane: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	if len(raw) > maxReply {
		return fmt.Errorf("reading the control plane's answer: it has more than %d bytes", maxReply)
	}
	if resp.StatusCode/100 != 2 {
		var refusal contract.Refusal
		if json.Unmarshal(raw, &refusal) == nil && refusal.Code != "" {
			return &refusal
		}
		switch resp.StatusCode {
		case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout: // of what stands before it
			return fmt.Errorf("%w: %s", ErrUnreachable, resp.Status)
		}
		return fmt.Errorf("asking the control plane: it answered %s", resp.Status)
	}
	if out, ok := reply.(*[]byte); ok {
		*out = raw
		return nil
	}
	if err := json.Unmarshal(raw, reply); err != nil {
		return fmt.Errorf("reading the control plane's answer: %w", err)
	}
	return nil
}

func guestPath(id string) string { return "/v1/guests/" + url.PathEscape(id) }

// Nodes lists the enrolled hosts.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	var reply struct {
		Nodes []Node `json:"nodes"`
	}
	err := c.call(ctx, http.MethodGet, "/v1/nodes", nil, &reply)
	return reply.Nodes, err
}

// Enrol makes a new identity for a host.
func (c *Client) Enrol(ctx context.Context, node string) (*Enrolment, error) {
	reply := &Enrolment{}
	return reply, c.call(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/enrol", struct{}{}, reply)
}

// Cordon closes a node for new guests.
func (c *Client) Cordon(ctx context.Context, node, reason string) (*Sent, error) {
	reply := &Sent{}
	return reply, c.call(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/cordon", Cordon{reason}, reply)
}

// Uncordon opens it again.
func (c *Client) Uncordon(ctx context.Context, node string) (*Sent, error) {
	reply := &Sent{}
	return reply, c.call(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/uncordon", struct{}{}, reply)
}

// Resolve ends a node's alarms: somebody looked into them.
func (c *Client) Resolve(ctx context.Context, node string) error {
	return c.call(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/resolve", struct{}{}, &struct{}{})
}

// Revoke ends every identity a node was given; Enrol gives it another.
func (c *Client) Revoke(ctx context.Context, node string) error {
	return c.call(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/revoke", struct{}{}, &struct{}{})
}

// Launch sends a launch to a node, or to one the control plane chooses.
func (c *Client) Launch(ctx context.Context, node string, l *api.LaunchGuest, features ...string) (*Sent, error) {
	raw, err := protojson.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("encoding launch: %w", err)
	}
	reply := &Sent{}
	return reply, c.call(ctx, http.MethodPost, "/v1/launches", Launch{node, raw, features}, reply)
}

// Guest tells how far a guest has come.
func (c *Client) Guest(ctx context.Context, id string) (*Guest, error) {
	reply := &Guest{}
	return reply, c.call(ctx, http.MethodGet, guestPath(id), nil, reply)
}

// WaitGuest asks until the condition holds.
func (c *Client) WaitGuest(ctx context.Context, id string, until func(*Guest) bool) (*Guest, error) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		g, err := c.Guest(ctx, id)
		if err != nil || until(g) {
			return g, err
		}
		select {
		case <-ctx.Done():
			return g, fmt.Errorf("waiting for guest: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

// Stop ends a guest; grace is the time it gets to end by itself.
func (c *Client) Stop(ctx context.Context, id string, grace time.Duration) (*Sent, error) {
	reply := &Sent{}
	return reply, c.call(ctx, http.MethodPost, guestPath(id)+"/stop", Stop{GraceSeconds: grace.Seconds()}, reply)
}

// RequestEvidence relays a challenge to the guest.
func (c *Client) RequestEvidence(ctx context.Context, id string, nonce []byte) (*Sent, error) {
	reply := &Sent{}
	return reply, c.call(ctx, http.MethodPost, guestPath(id)+"/evidence", Challenge{hex.EncodeToString(nonce)}, reply)
}

// CodeNoEvidence refuses the answer to a challenge that is not there yet.
const CodeNoEvidence = "control.no-evidence"

// Evidence returns the answer to a challenge, as the guest gave it. While
// there is none it is a refusal with CodeNoEvidence.
func (c *Client) Evidence(ctx context.Context, id string, nonce []byte) ([]byte, error) {
	var raw []byte
	err := c.call(ctx, http.MethodGet, guestPath(id)+"/evidence?nonce="+hex.EncodeToString(nonce), nil, &raw)
	return raw, err
}

// Events lists events after a position, heartbeats only on request.
func (c *Client) Events(ctx context.Context, since uint64, limit int, heartbeats bool) ([]Event, error) {
	q := url.Values{"since": {strconv.FormatUint(since, 10)}, "limit": {strconv.Itoa(limit)}, "heartbeats": {strconv.FormatBool(heartbeats)}}
	var reply struct {
		Events []Event `json:"events"`
	}
	err := c.call(ctx, http.MethodGet, "/v1/events?"+q.Encode(), nil, &reply)
	return reply.Events, err
}
