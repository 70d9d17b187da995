package controlplane

import (
	"context"
	"net/http"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// waitingUpload is what a node said last of an upload in parts. The store's
// keys are the tenant's: who asks for the guest sees it, and answers.
type waitingUpload struct {
	eventID, name string
	wanted        *api.UploadGrantWanted
	ready         *api.UploadReady
}

// uploadLocked notes what an upload waits for; nil bodies mean nothing.
func (g *guestView) uploadLocked(u waitingUpload) {
	if g.uploads == nil {
		g.uploads = map[string]waitingUpload{}
	}
	if g.uploads[u.name] = u; u.wanted == nil && u.ready == nil {
		delete(g.uploads, u.name)
	}
}

// encoded is the upload as the API shows it.
func (u waitingUpload) encoded() (client.Upload, error) {
	out := client.Upload{EventID: u.eventID, Name: u.name}
	var err error
	for _, m := range []struct {
		message proto.Message
		into    *[]byte
	}{{u.wanted, (*[]byte)(&out.Wanted)}, {u.ready, (*[]byte)(&out.Ready)}} {
		if *m.into, err = encode(m.message); err != nil {
			return client.Upload{}, err
		}
	}
	return out, nil
}

func (s *Server) postUpload(r *http.Request) (any, error) {
	var in client.UploadAnswer
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if (in.Grant == nil) == (in.Settle == nil) {
		return nil, errBadRequest("either grant or settle is required")
	}
	return s.answerUpload(r.Context(), r.PathValue("id"), in)
}

func (s *Server) answerUpload(ctx context.Context, guestID string, in client.UploadAnswer) (*client.Sent, error) {
	upload := &api.ResultUpload{}
	if in.Grant != nil {
		if err := protojson.Unmarshal(in.Grant, upload); err != nil {
			return nil, errBadRequest("grant does not parse as a ResultUpload")
		}
	}
	return s.guestCommand(ctx, guestID, func(generation uint64) api.CommandVerb {
		if in.Settle != nil {
			return &api.Command_SettleUpload{SettleUpload: &api.SettleUpload{
				GuestId: guestID, Generation: generation, Name: in.Settle.Name, UploadId: in.Settle.UploadID,
			}}
		}
		return &api.Command_GrantUpload{GrantUpload: &api.GrantUpload{GuestId: guestID, Generation: generation, Upload: upload}}
	})
}
