package tenant

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

// maxControlReply bounds what the control plane may answer.
const maxControlReply = 2 << 20

// controlClient speaks the control plane's HTTPS API with a bearer token.
type controlClient struct {
	base   string
	token  string
	client *http.Client
}

func newControlClient(p *ControlPlaneProfile) (ControlPlane, error) {
	if err := need(map[string]string{"control_plane.ca_file": p.CAFile, "control_plane.token_file": p.TokenFile}); err != nil {
		return nil, err
	}
	transport, err := pinnedTransport(p.CAFile)
	if err != nil {
		return nil, err
	}
	token, err := readSecret(p.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("reading control plane token: %w", err)
	}
	return &controlClient{strings.TrimSuffix(p.URL, "/"), token, &http.Client{Transport: transport}}, nil
}

// call sends body as JSON, or nothing, and returns the answer. A refusal in
// the answer's body becomes the error; found is false for 404.
func (c *controlClient) call(ctx context.Context, method, path string, body any) (reply []byte, found bool, err error) {
	var in io.Reader = http.NoBody
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return nil, false, fmt.Errorf("asking the control plane: %w", err)
		}
		in = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, in)
	if err != nil {
		return nil, false, fmt.Errorf("asking the control plane: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	reply, err = io.ReadAll(io.LimitReader(resp.Body, maxControlReply))
	switch {
	case err != nil:
		return nil, false, fmt.Errorf("%w: %w", ErrUnreachable, err)
	case resp.StatusCode == http.StatusNotFound:
		return nil, false, nil
	case resp.StatusCode/100 == 2:
		return reply, true, nil
	}
	var refusal contract.Refusal
	if json.Unmarshal(reply, &refusal) == nil && refusal.Code != "" {
		return nil, false, &refusal
	}
	return nil, false, fmt.Errorf("asking the control plane: it answered %s", resp.Status)
}

// Launch implements ControlPlane.
func (c *controlClient) Launch(ctx context.Context, node string, l *api.LaunchGuest, features []string) (Launched, error) {
	launch, err := protojson.Marshal(l)
	if err != nil {
		return Launched{}, fmt.Errorf("encoding launch: %w", err)
	}
	raw, _, err := c.call(ctx, http.MethodPost, "/v1/launches", map[string]any{
		"node": node, "launch": json.RawMessage(launch), "required_features": features,
	})
	if err != nil {
		return Launched{}, err
	}
	var reply struct {
		CommandID string `json:"command_id"`
		GuestID   string `json:"guest_id"`
		Node      string `json:"node"`
	}
	if err := json.Unmarshal(raw, &reply); err != nil || reply.GuestID == "" {
		return Launched{}, fmt.Errorf("reading the control plane's answer to a launch: no guest id (%w)", err)
	}
	return Launched{reply.CommandID, reply.GuestID, reply.Node}, nil
}

// Guest implements ControlPlane.
func (c *controlClient) Guest(ctx context.Context, guestID string) (*Guest, error) {
	raw, found, err := c.call(ctx, http.MethodGet, "/v1/guests/"+url.PathEscape(guestID), nil)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, contract.Refuse("control.guest-unknown", "check the guest id; the control plane may have forgotten a guest long gone", "the control plane knows no guest %s", guestID)
	}
	var view struct {
		Node    string            `json:"node"`
		State   json.RawMessage   `json:"state"`
		Refusal *contract.Refusal `json:"refusal"`
	}
	if err := json.Unmarshal(raw, &view); err != nil {
		return nil, fmt.Errorf("reading guest: %w", err)
	}
	// A refused command leaves no state behind, only the refusal.
	g := &Guest{GuestID: guestID, Node: view.Node, Refusal: view.Refusal, Refused: view.Refusal != nil && len(view.State) == 0}
	if len(view.State) == 0 {
		return g, nil
	}
	var state api.GuestState
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(view.State, &state); err != nil {
		return nil, fmt.Errorf("reading guest: %w", err)
	}
	g.Status, g.Phase, g.ExitCode, g.StepMS = state.GetStatus(), state.GetGuestPhase(), state.GetExitCode(), state.GetStepMs()
	g.Ports = map[uint32]uint32{}
	for _, p := range state.GetPorts() {
		g.Ports[p.GetGuestPort()] = p.GetHostPort()
	}
	if r := state.GetRefusal(); r != nil {
		g.Refusal = &contract.Refusal{Code: r.GetCode(), Message: r.GetMessage(), Remedy: r.GetRemedy()}
	}
	return g, nil
}

// RequestEvidence implements ControlPlane.
func (c *controlClient) RequestEvidence(ctx context.Context, guestID string, nonce []byte) error {
	_, _, err := c.call(ctx, http.MethodPost, "/v1/guests/"+url.PathEscape(guestID)+"/evidence", map[string]string{"nonce": hex.EncodeToString(nonce)})
	return err
}

// Evidence implements ControlPlane.
func (c *controlClient) Evidence(ctx context.Context, guestID string, nonce []byte) ([]byte, error) {
	raw, _, err := c.call(ctx, http.MethodGet, "/v1/guests/"+url.PathEscape(guestID)+"/evidence?nonce="+hex.EncodeToString(nonce), nil)
	return raw, err
}

// Stop implements ControlPlane.
func (c *controlClient) Stop(ctx context.Context, guestID string, generation uint64, grace time.Duration) error {
	_, _, err := c.call(ctx, http.MethodPost, "/v1/guests/"+url.PathEscape(guestID)+"/stop", map[string]any{
		"generation": generation, "grace_seconds": grace.Seconds(),
	})
	return err
}
