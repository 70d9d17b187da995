package lifecycle_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/lifecycle/lifecycletest"
)

// smallParts cuts the world's result of some 50 bytes into several parts; the
// smallest part of the wire is admission's rule, not the life cycle's.
const smallParts = 10

// inParts makes a launch give a grant for the result, of so many parts.
func inParts(parts int) func(*api.LaunchGuest) {
	return func(l *api.LaunchGuest) { l.Results.Uploads[0] = grantOf("u-1", 1, parts, "") }
}

func grantOf(uploadID string, first, n int, mark string) *api.ResultUpload {
	g := &api.UploadGrant{UploadId: uploadID, PartSize: smallParts, FirstPart: uint32(first)}
	for i := range n {
		g.Urls = append(g.Urls, fmt.Sprintf("%s?%spartNumber=%d", outURL, mark, first+i))
	}
	return &api.ResultUpload{Name: "out", Parts: g}
}

func granting(u *api.ResultUpload) *api.Command {
	return &api.Command{CommandId: api.NewID(), Verb: &api.Command_GrantUpload{GrantUpload: &api.GrantUpload{GuestId: guestID, Generation: 1, Upload: u}}}
}

func settling(name, uploadID string) *api.Command {
	return &api.Command{CommandId: api.NewID(), Verb: &api.Command_SettleUpload{SettleUpload: &api.SettleUpload{GuestId: guestID, Generation: 1, Name: name, UploadId: uploadID}}}
}

// bodies are the events of one kind, in order.
func bodies[T any](h *host, body func(*api.Event) *T) []*T {
	h.t.Helper()
	events, err := h.store.NextEvents(1000)
	if err != nil {
		h.t.Fatal(err)
	}
	var out []*T
	for _, e := range events {
		if b := body(e); b != nil {
			out = append(out, b)
		}
	}
	return out
}

// nth waits for the nth event of a kind.
func nth[T any](h *host, n int, body func(*api.Event) *T) *T {
	h.t.Helper()
	var found []*T
	h.until(fmt.Sprintf("event %d of %T", n, *new(T)), func() bool {
		found = bodies(h, body)
		return len(found) >= n
	})
	return found[n-1]
}

// complete does what whoever holds the store's keys does at the end.
func (h *host) complete(ctx context.Context, m *lifecycle.Manager, r *api.UploadReady) {
	h.t.Helper()
	if err := h.world.Complete(r.GetUploadId(), outURL, r.GetEtags()); err != nil {
		h.t.Fatal(err)
	}
	if err := h.execute(ctx, m, settling(r.GetName(), r.GetUploadId())); err != nil {
		h.t.Fatal(err)
	}
}

func TestAResultGoesUpInPartsAndIsThereWhenItsUploadIsCompleted(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	go h.guest(t.Context())
	if err := h.execute(t.Context(), m, h.command(inParts(2))); err != nil {
		t.Fatal(err)
	}
	wanted := nth(h, 1, (*api.Event).GetUploadGrantWanted)
	if wanted.GetName() != "out" || wanted.GetFirstPart() != 3 || wanted.GetUploadId() != "u-1" || wanted.GetSize() != uint64(len(sealedBytes())) || wanted.GetRefusal() != nil {
		t.Errorf("wanted %v", wanted)
	}
	if err := h.execute(t.Context(), m, granting(grantOf("u-1", 3, 128, ""))); err != nil {
		t.Fatal(err)
	}
	ready := nth(h, 1, (*api.Event).GetUploadReady)
	sum := sha256.Sum256(sealedBytes())
	digest := sum[:]
	if !bytes.Equal(ready.GetSha256(), digest) || len(ready.GetEtags()) != (len(sealedBytes())+smallParts-1)/smallParts {
		t.Errorf("ready %v", ready)
	}
	if done := bodies(h, (*api.Event).GetResultUploaded); len(done) > 0 {
		t.Errorf("uploaded before it was completed: %v", done)
	}
	h.complete(t.Context(), m, ready)
	// One that comes too late changes nothing.
	late := h.execute(t.Context(), m, granting(grantOf("u-2", 1, 128, "")))
	h.ends(t.Context(), finished, "")
	if late != nil {
		t.Error(late)
	}
	if !bytes.Equal(h.world.Uploaded(outURL), sealedBytes()) || h.world.Uploaded(listURL) == nil {
		t.Error("the results are not there")
	}
	if n := len(bodies(h, (*api.Event).GetUploadGrantWanted)); n != 1 {
		t.Errorf("asked for %d grants", n)
	}
	done := nth(h, 1, (*api.Event).GetResultUploaded)
	if done.GetName() != "out" || !bytes.Equal(done.GetSha256(), digest) {
		t.Errorf("uploaded %v", done)
	}
	h.clean()
}

func TestExpiredURLsOfPartsAreRenewedOrTheUploadBegunAnew(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	go h.guest(t.Context())
	expired := func(l *api.LaunchGuest) {
		l.Results.Uploads[0] = grantOf("u-1", 1, 128, "")
		for i := range l.Results.Uploads[0].Parts.Urls[1:] {
			l.Results.Uploads[0].Parts.Urls[i+1] += lifecycletest.Expired
		}
	}
	if err := h.execute(t.Context(), m, h.command(expired)); err != nil {
		t.Fatal(err)
	}
	if w := nth(h, 1, (*api.Event).GetUploadGrantWanted); w.GetFirstPart() != 2 || w.GetRefusal().GetCode() != "blob.url-expired" {
		t.Errorf("wanted %v", w)
	}
	if err := h.execute(t.Context(), m, granting(grantOf("u-2", 1, 3, ""))); err != nil {
		t.Fatal(err)
	}
	if w := nth(h, 2, (*api.Event).GetUploadGrantWanted); w.GetFirstPart() != 4 || w.GetUploadId() != "u-2" {
		t.Errorf("wanted %v", w)
	}
	if err := h.execute(t.Context(), m, granting(grantOf("u-2", 4, 128, ""))); err != nil {
		t.Fatal(err)
	}
	// The completion fails at the store: all of it once more.
	nth(h, 1, (*api.Event).GetUploadReady)
	if err := h.execute(t.Context(), m, granting(grantOf("u-3", 1, 128, ""))); err != nil {
		t.Fatal(err)
	}
	h.complete(t.Context(), m, nth(h, 2, (*api.Event).GetUploadReady))
	h.ends(t.Context(), finished, "")
}

func TestGrantsNobodyCanUseAreRefusedTyped(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	m := h.life(t.Context(), nil)
	go h.guest(t.Context())
	if err := h.execute(t.Context(), m, h.command(inParts(1))); err != nil {
		t.Fatal(err)
	}
	nth(h, 1, (*api.Event).GetUploadGrantWanted)
	other := grantOf("u-1", 2, 1, "")
	other.Parts.PartSize++
	unknown := grantOf("u-1", 2, 1, "")
	unknown.Name = "elsewhere"
	stale := granting(grantOf("u-1", 2, 1, ""))
	stale.GetGrantUpload().Generation = 0
	for code, cmd := range map[string]*api.Command{
		"grant.contradictory":    granting(other),
		"grant.unknown-upload":   granting(unknown),
		"guest.stale-generation": stale,
		"grant.not-ready":        settling("out", "u-1"),
	} {
		h.refused(t.Context(), m, cmd, code)
	}
	h.refused(t.Context(), m, granting(&api.ResultUpload{Name: "out", PutUrl: outURL}), "grant.contradictory")
	// A grant that brings nothing is not asked for again and again.
	if err := h.execute(t.Context(), m, granting(grantOf("u-1", 2, 128, lifecycletest.Expired))); err != nil {
		t.Fatal(err)
	}
	h.ends(t.Context(), failed, "results.grant-useless")
	if n := len(bodies(h, (*api.Event).GetUploadGrantWanted)); n != 1 {
		t.Errorf("asked for %d grants", n)
	}
}

// Whatever a store or a control plane does not do ends at the deadline, which
// a restart does not put off.
func TestADeliveryThatNeverEndsIsGivenUpAtItsDeadline(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		launch func(*api.LaunchGuest)
		store  error
	}{
		"a store that never takes it":            {nil, errors.New("away")},
		"a control plane that never grants":      {inParts(2), nil},
		"a control plane that never completes":   {inParts(128), nil},
		"a store that never takes a single part": {inParts(2), errors.New("away")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.world.Fail("upload out", c.store)
			ctx, die := context.WithCancel(t.Context())
			m, over := h.lifeUntil(ctx, nil)
			go h.guest(t.Context())
			if err := h.execute(ctx, m, h.command(c.launch)); err != nil {
				t.Fatal(err)
			}
			waits := func(m *lifecycle.Manager) func() bool {
				return func() bool {
					v := m.Snapshot()
					return len(v) == 1 && v[0].Undoing && strings.Contains(v[0].Finding, "waits for")
				}
			}
			h.until("it waits", waits(m))
			die()
			<-over
			h.world.ProcessDied()
			h.ahead.Store(int64(23 * time.Hour))
			m = h.life(t.Context(), nil)
			h.until("it waits again", waits(m))
			h.ahead.Store(int64(25 * time.Hour))
			h.ends(t.Context(), failed, "results.upload-expired")
			given := bodies(h, (*api.Event).GetResultGivenUp)
			if i := slices.IndexFunc(given, func(r *api.ResultGivenUp) bool { return r.GetName() == "out" }); i < 0 {
				t.Errorf("given up: %v", given)
			}
		})
	}
}
