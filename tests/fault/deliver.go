package fault

import (
	"context"
	"errors"
	"fmt"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/hostile"
)

// ResultName is what the guest of a Delivery delivers.
const ResultName = "out"

const (
	uploadID    = "u-1"
	resultParts = 3
	// resultBytes, sealed, fill all parts, the last one not quite.
	resultBytes = resultParts*api.MinPartBytes - 1<<20
)

// Delivery makes the launch of a guest that delivers one result in parts and
// ends, and gives it the URL of the first part alone.
func (f *Field) Delivery() (*Order, error) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, fmt.Errorf("making a recipient: %w", err)
	}
	o, err := f.order(f.delivering, func(m *contract.Manifest) {
		m.Env = map[string]string{hostile.EnvResult: fmt.Sprintf("%s:%d", ResultName, resultBytes)}
		m.Results = []contract.Result{{Name: ResultName, Recipients: []string{identity.Recipient().String()}}}
	})
	if err != nil {
		return nil, err
	}
	o.Results.Uploads = append(o.Results.Uploads, grant(1, 1))
	return o, nil
}

// grant gives the URLs of some parts.
func grant(first, last int) *api.ResultUpload {
	g := &api.UploadGrant{UploadId: uploadID, PartSize: api.MinPartBytes, FirstPart: uint32(first)}
	for part := first; part <= last; part++ {
		g.Urls = append(g.Urls, fmt.Sprintf("%sput?part=%d", storeURL, part))
	}
	return &api.ResultUpload{Name: ResultName, Parts: g}
}

// Answer plays whoever holds the store's keys until the guest has ended: it
// grants the parts that the node asks for, and says that the upload was
// completed. Each is said once, whatever becomes of the agent meanwhile.
func (f *Field) Answer(ctx context.Context, id string) error {
	answered := map[string]bool{}
	var failed error
	_, err := f.API.WaitGuest(ctx, id, func(g *client.Guest) bool {
		for _, u := range g.Uploads {
			if !answered[u.EventID] {
				answered[u.EventID] = true
				failed = errors.Join(failed, f.answer(ctx, id, u))
			}
		}
		return failed != nil || g.Ended()
	})
	return errors.Join(err, failed)
}

func (f *Field) answer(ctx context.Context, id string, u client.Upload) error {
	wanted, ready, err := u.Decode()
	switch {
	case err != nil:
		return err
	case ready != nil:
		_, err = f.API.SettleUpload(ctx, id, u.Name, ready.GetUploadId())
	default:
		_, err = f.API.GrantUpload(ctx, id, grant(int(wanted.GetFirstPart()), resultParts))
	}
	return err
}
