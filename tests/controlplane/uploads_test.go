package controlplane

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

func partsOf(uploadID string) *api.ResultUpload {
	return &api.ResultUpload{Name: "out", Parts: &api.UploadGrant{UploadId: uploadID, PartSize: api.MinPartBytes, FirstPart: 3, Urls: []string{"https://store.example/out?partNumber=3"}}}
}

// uploads is a guest whose result waits for URLs, then for its completion, and
// is there then.
func uploads(hostID string, granted chan<- *api.ResultUpload) func(cmd *api.Command) ([]*api.Event, error) {
	return func(cmd *api.Command) ([]*api.Event, error) {
		now := time.Now()
		switch v := cmd.GetVerb().(type) {
		case *api.Command_LaunchGuest:
			id := v.LaunchGuest.GetGuestId()
			return []*api.Event{api.NewGrantWanted(hostID, cmd.GetCommandId(), now, &api.UploadGrantWanted{GuestId: id, Name: "out", UploadId: "u-1", FirstPart: 3})}, nil
		case *api.Command_GrantUpload:
			granted <- v.GrantUpload.GetUpload()
			return []*api.Event{api.NewUploadReady(hostID, "", now, &api.UploadReady{
				GuestId: v.GrantUpload.GetGuestId(), Name: "out", UploadId: v.GrantUpload.GetUpload().GetParts().GetUploadId(), Size: 7, Etags: []string{"a", "b", "c"},
			})}, nil
		case *api.Command_SettleUpload:
			return []*api.Event{api.NewResultUploaded(hostID, "", now, &api.ResultUploaded{GuestId: v.SettleUpload.GetGuestId(), Name: v.SettleUpload.GetName()})}, nil
		}
		return nil, nil
	}
}

func TestUploadsInPartsAreShownAndAnswered(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	granted := make(chan *api.ResultUpload, 1)
	n.execute = uploads(host, granted)
	w.ready(host)
	sent, err := w.Client.Launch(t.Context(), "", launch())
	if err != nil {
		t.Fatal(err)
	}
	upload := func(what string, is func(*api.UploadGrantWanted, *api.UploadReady) bool) client.Upload {
		t.Helper()
		var found client.Upload
		controltest.Eventually(t, what, func() bool {
			g, err := w.Client.Guest(t.Context(), sent.GuestID)
			if err != nil || len(g.Uploads) != 1 {
				return false
			}
			found = g.Uploads[0]
			wanted, ready, err := found.Decode()
			return err == nil && is(wanted, ready)
		})
		return found
	}
	first := upload("a grant is wanted", func(wanted *api.UploadGrantWanted, _ *api.UploadReady) bool {
		return wanted.GetFirstPart() == 3 && wanted.GetUploadId() == "u-1"
	})
	if _, err := w.Client.GrantUpload(t.Context(), sent.GuestID, partsOf("u-1")); err != nil {
		t.Fatal(err)
	}
	if got := <-granted; !proto.Equal(got, partsOf("u-1")) {
		t.Errorf("the node got %v", got)
	}
	second := upload("the parts are there", func(_ *api.UploadGrantWanted, ready *api.UploadReady) bool { return len(ready.GetEtags()) == 3 })
	if first.EventID == second.EventID || first.EventID == "" {
		t.Errorf("events %q, %q", first.EventID, second.EventID)
	}
	if _, err := w.Client.SettleUpload(t.Context(), sent.GuestID, "out", "u-1"); err != nil {
		t.Fatal(err)
	}
	controltest.Eventually(t, "the result is there", func() bool {
		g, err := w.Client.Guest(t.Context(), sent.GuestID)
		return err == nil && len(g.Uploads) == 0 && len(g.Results) == 1
	})
}

func TestAnswersToUploadsThatMakeNoSenseAreRefusedTyped(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.node(host)
	w.ready(host)
	sent, err := w.Client.Launch(t.Context(), host, launch())
	if err != nil {
		t.Fatal(err)
	}
	both := partsOf("u-1")
	both.PutUrl = "https://store.example/out"
	small := partsOf("u-1")
	small.Parts.PartSize = 1
	grant := func(id string, u *api.ResultUpload) error {
		_, err := w.Client.GrantUpload(t.Context(), id, u)
		return err
	}
	settle := func(id, upload string) error {
		_, err := w.Client.SettleUpload(t.Context(), id, "out", upload)
		return err
	}
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"a URL and parts": {grant(sent.GuestID, both), codeBadRequest}, "small parts": {grant(sent.GuestID, small), codeBadRequest},
		"nothing": {grant(sent.GuestID, &api.ResultUpload{}), codeBadRequest}, "nobody's": {grant("nobody", partsOf("u")), codeGuestUnknown},
		"no upload": {settle(sent.GuestID, ""), codeBadRequest}, "nobody's upload": {settle("nobody", "u"), codeGuestUnknown},
	} {
		if code(c.err) != c.want {
			t.Errorf("%s: %v, want %s", name, c.err, c.want)
		}
	}
}
