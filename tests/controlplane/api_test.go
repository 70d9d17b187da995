package controlplane

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// guests answers commands as an agent with a perfect guest does.
func guests(hostID string) func(cmd *api.Command) ([]*api.Event, error) {
	return func(cmd *api.Command) ([]*api.Event, error) {
		now := time.Now()
		switch v := cmd.GetVerb().(type) {
		case *api.Command_LaunchGuest:
			id := v.LaunchGuest.GetGuestId()
			return []*api.Event{
				api.NewGuestState(hostID, "", now, &api.GuestState{GuestId: id, Generation: 1, Status: api.GuestStatus_GUEST_STATUS_ACCEPTED}),
				api.NewGuestState(hostID, "", now, &api.GuestState{GuestId: id, Generation: 1, Status: api.GuestStatus_GUEST_STATUS_RUNNING}),
				api.NewResultUploaded(hostID, "", now, &api.ResultUploaded{GuestId: id, Name: "out", Size: 3, Sha256: fill(5)}),
				api.NewResultUploaded(hostID, "", now, &api.ResultUploaded{GuestId: id, Name: "out", Size: 4, Sha256: fill(6)}),
			}, nil
		case *api.Command_RequestEvidence:
			return []*api.Event{api.NewEvidence(hostID, "", now, v.RequestEvidence.GetGuestId(), []byte(`{"of":"`+v.RequestEvidence.GetGuestId()+`"}`))}, nil
		case *api.Command_StopGuest:
			if v.StopGuest.GetGeneration() != 1 {
				return nil, contract.Refuse("guest.stale-generation", "use the latest", "stale")
			}
			return []*api.Event{api.NewGuestState(hostID, "", now, &api.GuestState{
				GuestId: v.StopGuest.GetGuestId(), Generation: 1, Status: api.GuestStatus_GUEST_STATUS_STOPPED,
			})}, nil
		}
		return nil, nil
	}
}

func TestAGuestIsDrivenThroughTheAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	n.execute = guests(host)
	w.ready(host)
	ctx := t.Context()
	sent, err := w.Client.Launch(ctx, "", launch(), api.FeatureInputsAge)
	if err != nil {
		t.Fatal(err)
	}
	if sent.Node != host || sent.GuestID == "" {
		t.Errorf("sent %+v", sent)
	}
	g, err := w.Client.WaitGuest(ctx, sent.GuestID, func(g *client.Guest) bool { return len(g.Results) > 0 && g.Outcome == client.OutcomeDone })
	if err != nil {
		t.Fatal(err)
	}
	controltest.Eventually(t, "the second upload of the same result", func() bool {
		g, err = w.Client.Guest(ctx, sent.GuestID)
		if err != nil {
			t.Fatal(err)
		}
		var r api.ResultUploaded
		return len(g.Results) == 1 && protojson.Unmarshal(g.Results[0], &r) == nil && r.GetSize() == 4
	})
	if s, err := g.GuestState(); err != nil || s.GetStatus() != api.GuestStatus_GUEST_STATUS_RUNNING || g.Refusal != nil || g.Generation != 1 {
		t.Errorf("guest %+v, %v", g, err)
	}
	nonce := fill(8)
	if _, err := w.Client.Evidence(ctx, sent.GuestID, nonce); code(err) != client.CodeNoEvidence {
		t.Errorf("evidence before the challenge: %v", err)
	}
	if _, err := w.Client.RequestEvidence(ctx, sent.GuestID, nonce); err != nil {
		t.Fatal(err)
	}
	var evidence []byte
	controltest.Eventually(t, "evidence", func() bool { evidence, err = w.Client.Evidence(ctx, sent.GuestID, nonce); return err == nil })
	if want := `{"of":"` + sent.GuestID + `"}`; string(evidence) != want {
		t.Errorf("evidence %s, want %s unchanged", evidence, want)
	}
	if _, err := w.Client.Stop(ctx, sent.GuestID, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Client.WaitGuest(ctx, sent.GuestID, func(g *client.Guest) bool { return g.Ended() }); err != nil {
		t.Fatal(err)
	}
	// All of it is still known after a restart, from the events.
	before, err := w.Client.Guest(ctx, sent.GuestID)
	if err != nil {
		t.Fatal(err)
	}
	n.stop()
	w.stop()
	w.start()
	after, err := w.Client.Guest(ctx, sent.GuestID)
	if err != nil || after.Outcome != before.Outcome || len(after.Results) != 1 || !after.Ended() {
		t.Errorf("after a restart %+v, %v", after, err)
	}
	if again, err := w.Client.Evidence(ctx, sent.GuestID, nonce); err != nil || !bytes.Equal(again, evidence) {
		t.Errorf("after a restart: %s, %v", again, err)
	}
}

func TestARefusedLaunchShowsItsReason(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.node(host)
	w.ready(host)
	sent, err := w.Client.Launch(t.Context(), host, launch(), "compliance.hipaa")
	if err != nil {
		t.Fatal(err)
	}
	g, err := w.Client.WaitGuest(t.Context(), sent.GuestID, func(g *client.Guest) bool { return g.Ended() })
	if err != nil || g.Outcome != client.OutcomeRefused || g.Refusal.Code != api.CodeFeatureUnknown || len(g.State) != 0 || g.Refusal.Remedy == "" {
		t.Errorf("guest %+v, %v", g, err)
	}
}

func TestClosedNodesAreNotChosen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.node(host)
	w.node("node-b")
	w.ready(host)
	w.ready("node-b")
	ctx := t.Context()
	chosen := func() string {
		t.Helper()
		sent, err := w.Client.Launch(ctx, "", launch())
		if err != nil {
			return code(err)
		}
		return sent.Node
	}
	var got []string
	for _, step := range []func() (*client.Sent, error){
		nil,
		func() (*client.Sent, error) { return w.Client.Cordon(ctx, host, "disk") },
		func() (*client.Sent, error) { return w.Client.Cordon(ctx, "node-b", "disk") },
		func() (*client.Sent, error) { return w.Client.Uncordon(ctx, host) },
	} {
		if step != nil {
			if _, err := step(); err != nil {
				t.Fatal(err)
			}
		}
		got = append(got, chosen())
	}
	if want := []string{host, "node-b", codeNoNode, host}; !slices.Equal(got, want) {
		t.Errorf("chosen %v, want %v", got, want)
	}
	other := launch()
	other.Image.KernelSha256 = fill(9)
	if _, err := w.Client.Launch(ctx, "", other); code(err) != codeNoNode {
		t.Errorf("an image nobody has: %v", err)
	}
}

func TestRequestsThatMakeNoSenseAreRefusedTyped(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.node(host)
	w.ready(host)
	w.enrol("node-new")
	ctx := t.Context()
	sent, err := w.Client.Launch(ctx, host, launch())
	if err != nil {
		t.Fatal(err)
	}
	twice, bad := launch(), launch()
	twice.GuestId, bad.LaunchDigest = sent.GuestID, nil
	for name, tc := range map[string]struct {
		call func() error
		want string
	}{
		"unknown node":     {func() error { _, err := w.Client.Launch(ctx, "node-z", launch()); return err }, codeNodeNotFound},
		"node never seen":  {func() error { _, err := w.Client.Launch(ctx, "node-new", launch()); return err }, codeNodeNotReady},
		"guest twice":      {func() error { _, err := w.Client.Launch(ctx, host, twice); return err }, codeGuestExists},
		"malformed launch": {func() error { _, err := w.Client.Launch(ctx, host, bad); return err }, codeBadRequest},
		"unknown guest":    {func() error { _, err := w.Client.Guest(ctx, "nobody"); return err }, codeGuestUnknown},
		"stop nobody":      {func() error { _, err := w.Client.Stop(ctx, "nobody", 0); return err }, codeGuestUnknown},
		"negative grace":   {func() error { _, err := w.Client.Stop(ctx, sent.GuestID, -time.Second); return err }, codeBadRequest},
		"short nonce":      {func() error { _, err := w.Client.RequestEvidence(ctx, sent.GuestID, []byte{1}); return err }, codeBadRequest},
		"evidence of none": {func() error { _, err := w.Client.Evidence(ctx, "nobody", fill(1)); return err }, codeGuestUnknown},
		"host id":          {func() error { _, err := w.Client.Enrol(ctx, "Node.A"); return err }, codeBadRequest},
		"cordon nobody":    {func() error { _, err := w.Client.Cordon(ctx, "node-z", ""); return err }, codeNodeNotFound},
		"long reason":      {func() error { _, err := w.Client.Cordon(ctx, host, string(make([]byte, 300))); return err }, codeBadRequest},
	} {
		err := tc.call()
		if code(err) != tc.want || contract.AsRefusal(err).Remedy == "" {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
}

func TestTheAPIWantsItsTokenAndStrictBodies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enrol(host)
	for _, token := range []string{"", "x", w.Server.Token() + "x"} {
		c, err := client.New(w.Server.URL(), w.Server.CAPEM(), token)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Nodes(t.Context()); code(err) != codeUnauthorised {
			t.Errorf("token %q: %v", token, err)
		}
		c.Close()
	}
	h := w.Server.handler()
	for name, body := range map[string]string{
		"unknown field": `{"reason":"x","colour":1}`, "trailing": `{} {}`, "not JSON": `x`, "duplicate": `{"reason":"a","reason":"b"}`,
		"too large": `{"reason":"` + string(bytes.Repeat([]byte{'x'}, maxBody)) + `"}`,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://x/v1/nodes/"+host+"/cordon", bytes.NewReader([]byte(body)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+w.Server.Token())
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		var refusal contract.Refusal
		if err := json.Unmarshal(rec.Body.Bytes(), &refusal); err != nil || rec.Code != http.StatusBadRequest || refusal.Code != codeBadRequest {
			t.Errorf("%s: %d %s", name, rec.Code, rec.Body)
		}
	}
}

func TestAHostSpeaksOnlyForItself(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	n.execute = guests(host)
	w.ready(host)
	sent, err := w.Client.Launch(t.Context(), host, launch())
	if err != nil {
		t.Fatal(err)
	}
	controltest.Eventually(t, "running", func() bool {
		g, err := w.Client.Guest(t.Context(), sent.GuestID)
		return err == nil && g.Outcome == client.OutcomeDone
	})
	creds, _, _, err := w.Server.EnrolHost(t.Context(), "node-b")
	if err != nil {
		t.Fatal(err)
	}
	liar, _ := w.rawConn(creds)
	lie := func(e *api.Event) {
		t.Helper()
		raw, err := api.MarshalEvent(e)
		if err != nil {
			t.Fatal(err)
		}
		if err := liar.Publish(api.EventSubject("node-b", api.EventKind(e)), raw); err != nil {
			t.Fatal(err)
		}
	}
	failed := &api.GuestState{GuestId: sent.GuestID, Status: api.GuestStatus_GUEST_STATUS_FAILED}
	lie(api.NewGuestState(host, "", time.Now(), failed))     // in another's name
	lie(api.NewGuestState("node-b", "", time.Now(), failed)) // about another's guest
	lie(api.NewRefused("node-b", sent.CommandID, time.Now(), contract.Refuse("x.y", "z", "no"), nil))
	truth := api.NewDone("node-b", "", time.Now())
	lie(truth)
	lie(truth) // twice: no message id, so that only the event id tells
	controltest.Eventually(t, "the last event", func() bool {
		return slices.ContainsFunc(w.events(), func(e *api.Event) bool { return e.GetEventId() == truth.GetEventId() })
	})
	g, err := w.Client.Guest(t.Context(), sent.GuestID)
	if err != nil || g.Ended() || g.Outcome != client.OutcomeDone {
		t.Errorf("believed: %+v, %v", g, err)
	}
	if err := liar.Flush(); err != nil {
		t.Fatal(err)
	}
	times := 0
	for _, e := range w.events() {
		if e.GetEventId() == truth.GetEventId() {
			times++
		}
	}
	if times != 1 {
		t.Errorf("an event was applied %d times", times)
	}
}

func TestSequencesSurviveARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.node(host)
	w.ready(host)
	first, err := w.Server.NewCommand(host, cordonVerb())
	if err != nil {
		t.Fatal(err)
	}
	key := w.Server.IssuerKey()
	w.stop()
	w.start()
	second, err := w.Server.NewCommand(host, cordonVerb())
	if err != nil || second.GetIssuerEpoch() != first.GetIssuerEpoch() || second.GetSequence() != first.GetSequence()+1 || !key.Equal(w.Server.IssuerKey()) {
		t.Errorf("%v after %v, %v", second, first, err)
	}
}
