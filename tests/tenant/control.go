package tenant

import (
	"context"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
)

// ControlPlane is what the tenant asks of the platform. Nothing it answers is
// believed where it matters.
type ControlPlane interface {
	// Launch sends the command to the node, or to one it chooses when node is
	// empty. A node that lacks one of the features refuses.
	Launch(ctx context.Context, node string, l *api.LaunchGuest, features []string) (Launched, error)
	// Guest tells how far a guest has come.
	Guest(ctx context.Context, guestID string) (*Guest, error)
	// RequestEvidence relays a challenge to the guest.
	RequestEvidence(ctx context.Context, guestID string, nonce []byte) error
	// Evidence returns the answer to a challenge, nil while there is none.
	Evidence(ctx context.Context, guestID string, nonce []byte) ([]byte, error)
	// GrantUpload and SettleUpload answer uploads that wait.
	GrantUpload(ctx context.Context, guestID string, u *api.ResultUpload) error
	SettleUpload(ctx context.Context, guestID, name, uploadID string) error
	// Stop ends a guest; grace is the time it gets to end by itself.
	Stop(ctx context.Context, guestID string, grace time.Duration) error
}

// Launched is a command that was sent.
type Launched struct{ CommandID, GuestID, Node string }

// Guest is the platform's word about a guest.
type Guest struct {
	GuestID string          `json:"guest_id"`
	Node    string          `json:"node,omitempty"`
	Status  api.GuestStatus `json:"-"`
	// Refusal says why a command or the guest failed.
	Refusal  *contract.Refusal `json:"refusal,omitempty"`
	Phase    string            `json:"phase,omitempty"`
	ExitCode int32             `json:"exit_code,omitempty"`
	// Ports maps the guest's port to the host's.
	Ports map[uint32]uint32 `json:"ports,omitempty"`
	// ServerNames maps the guest's port to the name by which clients reach it
	// on the node's shared TLS port.
	ServerNames map[uint32]string `json:"server_names,omitempty"`
	// StepMS is the milliseconds of each finished step.
	StepMS map[string]uint64 `json:"step_ms,omitempty"`
	// Uploads wait for this tool.
	Uploads []PendingUpload `json:"-"`
	// Refused is true when the node refused the launch itself.
	Refused bool `json:"refused,omitempty"`
}

// ended reports whether nothing more will happen.
func (g *Guest) ended() bool {
	switch g.Status {
	case api.GuestStatus_GUEST_STATUS_FINISHED, api.GuestStatus_GUEST_STATUS_FAILED, api.GuestStatus_GUEST_STATUS_STOPPED:
		return true
	case api.GuestStatus_GUEST_STATUS_UNSPECIFIED, api.GuestStatus_GUEST_STATUS_ACCEPTED, api.GuestStatus_GUEST_STATUS_STARTED,
		api.GuestStatus_GUEST_STATUS_ATTESTED, api.GuestStatus_GUEST_STATUS_RUNNING, api.GuestStatus_GUEST_STATUS_COLLECTING:
	}
	return g.Refused
}

// answers reports whether the guest can answer a challenge.
func (g *Guest) answers() bool {
	return !g.ended() && g.Status >= api.GuestStatus_GUEST_STATUS_STARTED
}
