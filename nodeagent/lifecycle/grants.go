package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/nodeagent/store"
)

// errWaits means that somebody was asked for what an upload in parts needs.
var errWaits = errors.New("it waits for its control plane")

// uploadParts goes on with an upload in parts as far as its grant goes, then
// asks for what is missing: once for each grant, and once for the completion.
func (g *guest) uploadParts(ctx context.Context, e Entry, grant *api.UploadGrant) error {
	wish := g.record().Wish
	if wish != nil && wish.Name == e.Name {
		switch {
		case wish.Settled && wish.UploadID == grant.GetUploadId():
			return nil
		case !wish.Granted:
			return errWaits
		}
	}
	etags, err := g.m.d.Spools.UploadParts(ctx, g.id, e, blob.Grant{
		UploadID: grant.GetUploadId(), PartSize: int64(grant.GetPartSize()), FirstPart: int(grant.GetFirstPart()), URLs: grant.GetUrls(),
	})
	id := g.record().CommandID
	if wanted, is := errors.AsType[*blob.WantedError](err); is {
		return g.want(grant, wanted, store.Wish{Name: e.Name, UploadID: grant.GetUploadId(), Parts: wanted.Done}, api.NewGrantWanted(g.m.c.HostID, id, g.m.now(), &api.UploadGrantWanted{
			GuestId: g.id, Name: e.Name, Size: uint64(e.Size), UploadId: grant.GetUploadId(), FirstPart: uint32(wanted.Part), Refusal: api.RefusalToWire(wanted.Why),
		}))
	}
	if err != nil {
		return err
	}
	return g.want(grant, nil, store.Wish{Name: e.Name, UploadID: grant.GetUploadId(), Parts: len(etags), Complete: true}, api.NewUploadReady(g.m.c.HostID, id, g.m.now(), &api.UploadReady{
		GuestId: g.id, Name: e.Name, Size: uint64(e.Size), Sha256: e.SHA256[:], UploadId: grant.GetUploadId(), Etags: etags,
	}))
}

// fruitless ends an upload whose latest grant brought no part.
func fruitless(last *store.Wish, wish store.Wish, wanted *blob.WantedError) *contract.Refusal {
	if last == nil || last.Name != wish.Name || !last.Granted {
		return nil // the launch's own grant
	}
	before := 0
	if last.UploadID == wish.UploadID {
		before = last.Parts
	}
	if wanted.Done > before {
		return nil
	}
	r := contract.Refuse("results.grant-useless", "see that the grant's URLs are for this upload and valid, and begin with the part that was asked for; then launch again",
		"another grant was given for result %s, and none of its URLs could be used; part %d is missing", wish.Name, wanted.Part)
	if wanted.Why != nil {
		return r.Because(wanted.Why)
	}
	return r
}

// want records what an upload waits for, and says so, unless the grant that it
// went on with is no longer the latest, or was the last.
func (g *guest) want(used *api.UploadGrant, wanted *blob.WantedError, wish store.Wish, e *api.Event) error {
	var refused *contract.Refusal
	news := false
	if err := g.update(func(r *store.Guest) (announce, bool) {
		launch := &api.LaunchGuest{}
		if err := proto.Unmarshal(r.Launch, launch); err != nil || !proto.Equal(used, uploadOf(launch, wish.Name).GetParts()) {
			return false, false
		}
		if wanted != nil {
			if refused = fruitless(r.Wish, wish, wanted); refused != nil {
				return false, false
			}
		}
		r.Wish, news = &wish, true
		return false, true
	}, e); err != nil {
		return err
	}
	if refused != nil {
		return refused
	}
	if news {
		g.m.log.Info("upload waits for its control plane", keyGuest, g.id, "name", wish.Name, "parts", wish.Parts, "complete", wish.Complete)
		g.m.mark("wanted:" + wish.Name)
	}
	return errWaits
}

// grantUpload replaces where a file goes. The grant is part of the launch from
// then on.
func (m *Manager) grantUpload(v *api.GrantUpload) error {
	g, err := m.awaiting(v.GetGuestId(), v.GetGeneration())
	if err != nil || g == nil {
		return err
	}
	var refused *contract.Refusal
	err = g.update(func(r *store.Guest) (announce, bool) {
		if !r.EndedAt.IsZero() {
			return false, false
		}
		launch := &api.LaunchGuest{}
		if err := proto.Unmarshal(r.Launch, launch); err != nil {
			refused = contract.Refuse("grant.record-damaged", "launch again", "the node cannot read the guest's launch").Because(err)
			return false, false
		}
		old, news := uploadOf(launch, v.GetUpload().GetName()), v.GetUpload()
		w := r.Wish
		completed := w != nil && w.Name == news.GetName() && w.Settled
		if refused = contradicts(old, news); refused != nil || completed || isSettled(*r, news.GetName()) {
			return false, false
		}
		old.PutUrl, old.Parts = news.GetPutUrl(), news.GetParts()
		raw, err := proto.Marshal(launch)
		if err != nil {
			refused = contract.Refuse("grant.record-damaged", "launch again", "the node cannot write the guest's launch").Because(err)
			return false, false
		}
		r.Launch = raw
		if w != nil && w.Name == news.GetName() {
			wish := *w
			wish.Granted = true
			r.Wish = &wish
		}
		return false, true
	})
	if refused != nil {
		return refused
	}
	if err != nil {
		return err
	}
	m.log.Info("upload granted", keyGuest, g.id, "name", v.GetUpload().GetName(), "urls", len(v.GetUpload().GetParts().GetUrls()))
	m.mark("granted:" + v.GetUpload().GetName())
	g.poke()
	return nil
}

// contradicts says why an upload cannot take another's place.
func contradicts(old, news *api.ResultUpload) *contract.Refusal {
	was, is := old.GetParts(), news.GetParts()
	switch {
	case old == nil:
		return contract.Refuse("grant.unknown-upload", "name an upload of the launch", "the launch has no upload %q", news.GetName())
	case (was == nil) != (is == nil):
		return contract.Refuse("grant.contradictory", "grant what the launch did: a URL, or parts", "upload %q is of another kind in the launch", news.GetName())
	case is != nil && was.GetUploadId() == is.GetUploadId() && was.GetPartSize() != is.GetPartSize():
		return contract.Refuse("grant.contradictory", "keep the size of the parts, or begin another upload",
			"the parts of upload %q have %d bytes, the grant says %d", news.GetName(), was.GetPartSize(), is.GetPartSize())
	}
	return nil
}

func isSettled(r store.Guest, name string) bool {
	return slices.ContainsFunc(r.Results, func(result store.Result) bool { return result.Name == name })
}

// settleUpload takes the word of whoever completed an upload.
func (m *Manager) settleUpload(v *api.SettleUpload) error {
	g, err := m.awaiting(v.GetGuestId(), v.GetGeneration())
	if err != nil || g == nil {
		return err
	}
	known := true
	err = g.update(func(r *store.Guest) (announce, bool) {
		if !r.EndedAt.IsZero() || isSettled(*r, v.GetName()) {
			return false, false
		}
		w := r.Wish
		if known = w != nil && w.Complete && w.Name == v.GetName() && w.UploadID == v.GetUploadId(); !known || w.Settled {
			return false, false
		}
		wish := *w
		wish.Settled = true
		r.Wish = &wish
		return false, true
	})
	if err != nil {
		return err
	}
	if !known {
		return contract.Refuse("grant.not-ready", "complete an upload when its UploadReady has come, and settle that very upload",
			"the node has not said that upload %q of result %s is ready", v.GetUploadId(), v.GetName())
	}
	m.mark("completed:" + v.GetName())
	g.poke()
	return nil
}

// awaiting returns the guest whose results may still be on their way, or nil
// when it has ended and nothing is.
func (m *Manager) awaiting(id string, generation uint64) (*guest, error) {
	rec, err := m.d.Records.Guest(id)
	switch {
	case errors.Is(err, store.ErrNoGuest):
		return nil, notFound(id)
	case err != nil:
		return nil, fmt.Errorf("reading guest: %w", err)
	case generation < rec.Generation:
		return nil, stale(rec, generation)
	}
	return m.guest(rec.ID), nil
}
