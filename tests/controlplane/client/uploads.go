package client

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/confidential-node/agent/nodeagent/api"
)

// Upload is a result that goes up in parts and waits for who holds the store's
// keys: for a grant, or for the completion.
type Upload struct {
	// EventID of the node's word, to answer it once.
	EventID string `json:"event_id"`
	Name    string `json:"name"`
	// Wanted is protojson of api.UploadGrantWanted, Ready of api.UploadReady;
	// one is there.
	Wanted json.RawMessage `json:"wanted,omitempty"`
	Ready  json.RawMessage `json:"ready,omitempty"`
}

// Decode returns what is waited for; the other is nil.
func (u *Upload) Decode() (*api.UploadGrantWanted, *api.UploadReady, error) {
	if len(u.Ready) > 0 {
		ready := &api.UploadReady{}
		if err := decode(u.Ready, ready); err != nil {
			return nil, nil, fmt.Errorf("reading upload: %w", err)
		}
		return nil, ready, nil
	}
	wanted := &api.UploadGrantWanted{}
	if err := decode(u.Wanted, wanted); err != nil {
		return nil, nil, fmt.Errorf("reading upload: %w", err)
	}
	return wanted, nil, nil
}

// UploadAnswer is one of both.
type UploadAnswer struct {
	// Grant is protojson of api.ResultUpload. It holds credentials.
	Grant  json.RawMessage `json:"grant,omitempty"`
	Settle *Settled        `json:"settle,omitempty"`
}

// Settled names an upload that was completed.
type Settled struct {
	Name     string `json:"name"`
	UploadID string `json:"upload_id"`
}

// GrantUpload sends fresh URLs for a result.
func (c *Client) GrantUpload(ctx context.Context, guestID string, u *api.ResultUpload) (*Sent, error) {
	raw, err := protojson.Marshal(u)
	if err != nil {
		return nil, fmt.Errorf("encoding grant: %w", err)
	}
	reply := &Sent{}
	return reply, c.call(ctx, http.MethodPost, guestPath(guestID)+"/uploads", UploadAnswer{Grant: raw}, reply)
}

// SettleUpload says that an upload in parts was completed.
func (c *Client) SettleUpload(ctx context.Context, guestID, name, uploadID string) (*Sent, error) {
	reply := &Sent{}
	return reply, c.call(ctx, http.MethodPost, guestPath(guestID)+"/uploads", UploadAnswer{Settle: &Settled{name, uploadID}}, reply)
}
