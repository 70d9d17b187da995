package tenant

import (
	"context"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// ErrUnreachable means that the control plane gave no answer.
var ErrUnreachable = client.ErrUnreachable

// controlClient adapts the control plane's client to what the tenant asks.
type controlClient struct{ client *client.Client }

func newControlClient(p *ControlPlaneProfile) (ControlPlane, error) {
	if err := need(map[string]string{"control_plane.ca_file": p.CAFile, "control_plane.token_file": p.TokenFile}); err != nil {
		return nil, err
	}
	caPEM, err := readSmall(p.CAFile)
	if err != nil {
		return nil, fmt.Errorf("reading control plane CA: %w", err)
	}
	token, err := readSecret(p.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("reading control plane token: %w", err)
	}
	c, err := client.New(p.URL, caPEM, token)
	if err != nil {
		return nil, Usage("control_plane: %v", err)
	}
	return &controlClient{c}, nil
}

// Launch implements ControlPlane.
func (c *controlClient) Launch(ctx context.Context, node string, l *api.LaunchGuest, features []string) (Launched, error) {
	sent, err := c.client.Launch(ctx, node, l, features...)
	if err != nil {
		return Launched{}, err
	}
	if sent.GuestID == "" {
		return Launched{}, fmt.Errorf("reading the control plane's answer to a launch: no guest id")
	}
	return Launched{CommandID: sent.CommandID, GuestID: sent.GuestID, Node: sent.Node}, nil
}

// Guest implements ControlPlane.
func (c *controlClient) Guest(ctx context.Context, guestID string) (*Guest, error) {
	view, err := c.client.Guest(ctx, guestID)
	if err != nil {
		return nil, err
	}
	state, err := view.GuestState()
	if err != nil {
		return nil, err
	}
	g := &Guest{
		GuestID: guestID, Node: view.Node, Status: state.GetStatus(), Refusal: view.Refusal, Phase: state.GetGuestPhase(),
		ExitCode: state.GetExitCode(), StepMS: state.GetStepMs(), Ports: map[uint32]uint32{}, ServerNames: map[uint32]string{}, Refused: view.Outcome == client.OutcomeRefused,
	}
	for _, p := range state.GetPorts() {
		g.Ports[p.GetGuestPort()] = p.GetHostPort()
		if name := p.GetServerName(); name != "" {
			g.ServerNames[p.GetGuestPort()] = name
		}
	}
	for i := range view.Uploads {
		wanted, ready, err := view.Uploads[i].Decode()
		if err != nil {
			return nil, err
		}
		g.Uploads = append(g.Uploads, PendingUpload{view.Uploads[i].EventID, wanted, ready})
	}
	if r := state.GetRefusal(); r != nil {
		g.Refusal = api.RefusalFromWire(r)
	}
	return g, nil
}

// GrantUpload implements ControlPlane.
func (c *controlClient) GrantUpload(ctx context.Context, guestID string, u *api.ResultUpload) error {
	_, err := c.client.GrantUpload(ctx, guestID, u)
	return err
}

// SettleUpload implements ControlPlane.
func (c *controlClient) SettleUpload(ctx context.Context, guestID, name, uploadID string) error {
	_, err := c.client.SettleUpload(ctx, guestID, name, uploadID)
	return err
}

// RequestEvidence implements ControlPlane.
func (c *controlClient) RequestEvidence(ctx context.Context, guestID string, nonce []byte) error {
	_, err := c.client.RequestEvidence(ctx, guestID, nonce)
	return err
}

// Evidence implements ControlPlane.
func (c *controlClient) Evidence(ctx context.Context, guestID string, nonce []byte) ([]byte, error) {
	raw, err := c.client.Evidence(ctx, guestID, nonce)
	if err != nil && contract.AsRefusal(err).Code == client.CodeNoEvidence {
		return nil, nil
	}
	return raw, err
}

// Stop implements ControlPlane. The control plane knows the latest generation.
func (c *controlClient) Stop(ctx context.Context, guestID string, grace time.Duration) error {
	_, err := c.client.Stop(ctx, guestID, grace)
	return err
}
