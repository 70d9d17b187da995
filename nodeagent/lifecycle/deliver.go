package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/nodeagent/store"
)

// deliver uploads every complete file of the spool, each until it is there,
// refused, or its URL has expired. The signed list goes last: where it is, the
// results are.
func (g *guest) deliver(ctx context.Context) error {
	if find(g.record().Steps, stepDomain) == nil {
		return nil // never started
	}
	cmd, _, err := g.command()
	if err != nil {
		return err
	}
	spool, err := g.m.d.Spools.Open(g.id, spoolFiles(cmd), g.record().Limits.ResultBytes)
	if err != nil {
		return fmt.Errorf("opening spool: %w", err)
	}
	entries, err := spool.Entries()
	if err != nil {
		return fmt.Errorf("reading spool: %w", err)
	}
	last := func(e Entry) int {
		if e.Name == contract.ResultsManifestName {
			return 1
		}
		return 0
	}
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Or(cmp.Compare(last(a), last(b)), cmp.Compare(a.Name, b.Name)) })
	for _, e := range entries {
		settled := slices.ContainsFunc(g.record().Results, func(r store.Result) bool { return r.Name == e.Name })
		if settled || uploadOf(cmd, e.Name) == nil {
			continue
		}
		failure := g.incomplete(e)
		if failure == nil {
			if failure, err = g.upload(ctx, e); err != nil {
				return err
			}
		}
		if err := g.settle(e, failure); err != nil {
			return err
		}
	}
	return nil
}

// incomplete holds the signed list back when a result did not arrive.
func (g *guest) incomplete(e Entry) *contract.Refusal {
	lost := slices.IndexFunc(g.record().Results, func(r store.Result) bool { return !r.Uploaded })
	if e.Name != contract.ResultsManifestName || lost < 0 {
		return nil
	}
	return contract.Refuse("results.incomplete", "see why the result could not be delivered, then launch again",
		"the list of results is not delivered, because result %s was not", g.record().Results[lost].Name)
}

// upload returns why a file could not be delivered, or an error when the
// agent ends meanwhile.
func (g *guest) upload(ctx context.Context, e Entry) (*contract.Refusal, error) {
	if err := g.beginDelivery(); err != nil {
		return nil, err
	}
	// Whatever the host's clock says of the deadline, the store is asked once.
	atLeast := lastTry
	for wait := g.m.c.Retry; ; wait = min(2*wait, 30*g.m.c.Retry) {
		cmd, _, err := g.command()
		if err != nil {
			return nil, err
		}
		target := uploadOf(cmd, e.Name) // a grant may have replaced it
		deadline := blob.Expiry(target.GetPutUrl())
		if deadline.IsZero() {
			deadline = g.record().DeliverBy
		}
		left := max(deadline.Sub(g.m.now()), atLeast)
		if atLeast = 0; left <= 0 {
			return contract.Refuse("results.upload-expired", "launch again with URLs that are valid for longer, and a store that takes them in time",
				"result %s could not be uploaded before its URL or its time expired", e.Name), nil
		}
		g.m.mark("sending:" + e.Name)
		err = g.tryUpload(ctx, e, target, left)
		if err == nil {
			return nil, nil //nolint:nilnil // delivered: there is neither reason nor error
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if r, refused := errors.AsType[*contract.Refusal](err); refused {
			return r, nil
		}
		pause := max(wait, blob.RetryAfter(err))
		if !errors.Is(err, errWaits) {
			g.m.log.Warn("upload failed, tried again", keyGuest, g.id, "name", e.Name, "pause", pause.String(), "until", deadline, keyError, err)
		}
		g.note(fmt.Sprintf("result %s waits for its object store; stop the guest again to give it up: %v", e.Name, err))
		if err := g.m.pause(ctx, g.wake, pause); err != nil {
			return nil, err
		}
	}
}

// beginDelivery sets the deadline of all files together, once.
func (g *guest) beginDelivery() error {
	by := g.m.now().Add(g.m.c.UploadWindow)
	return g.update(func(r *store.Guest) (announce, bool) {
		if !r.DeliverBy.IsZero() {
			return false, false
		}
		r.DeliverBy = by
		return false, true
	})
}

func uploadOf(cmd *api.LaunchGuest, name string) *api.ResultUpload {
	for _, u := range cmd.GetResults().GetUploads() {
		if u.GetName() == name {
			return u
		}
	}
	return nil
}

// tryUpload uploads once. A StopGuest that comes meanwhile ends the try, and
// its grace bounds those that follow.
func (g *guest) tryUpload(ctx context.Context, e Entry, target *api.ResultUpload, left time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g.mu.Lock()
	g.cancel = cancel
	stop := g.rec.GiveUp
	g.mu.Unlock()
	if stop != nil {
		if left = min(left, stop.Deadline.Sub(g.m.instant())); left <= 0 {
			return contract.Refuse("results.given-up", "launch again when the object store is there",
				"result %s waited for its object store, and the guest was stopped once more", e.Name)
		}
	}
	ctx, done := context.WithTimeout(ctx, left)
	defer done()
	if target.GetParts() != nil {
		return g.uploadParts(ctx, e, target.GetParts())
	}
	return g.m.d.Spools.Upload(ctx, g.id, e, target.GetPutUrl())
}

// lastTry bounds an upload to a URL that seems to have expired.
const lastTry = time.Minute

// settle records what became of a file. A guest whose results did not all
// arrive has not finished.
func (g *guest) settle(e Entry, failure *contract.Refusal) error {
	var events []*api.Event
	if failure == nil {
		events = append(events, api.NewResultUploaded(g.m.c.HostID, g.record().CommandID, g.m.now(), &api.ResultUploaded{
			GuestId: g.id, Name: e.Name, Size: uint64(e.Size), Sha256: e.SHA256[:],
		}))
	} else {
		events = append(events, api.NewResultGivenUp(g.m.c.HostID, g.record().CommandID, g.m.now(), &api.ResultGivenUp{
			GuestId: g.id, Name: e.Name, Size: uint64(e.Size), Refusal: api.RefusalToWire(failure),
		}))
	}
	err := g.update(func(r *store.Guest) (announce, bool) {
		r.Results = append(r.Results, store.Result{Name: e.Name, Uploaded: failure == nil, Failure: failure})
		if failure != nil && r.Final == api.GuestStatus_GUEST_STATUS_FINISHED {
			r.Final, r.Outcome = api.GuestStatus_GUEST_STATUS_FAILED, failure
		}
		return false, true
	}, events...)
	switch {
	case err != nil:
	case failure != nil:
		g.m.log.Warn("result given up", keyGuest, g.id, "name", e.Name, keyCode, failure.Code, keyRemedy, failure.Remedy, keyError, failure)
	default:
		g.note("")
		g.m.log.Info("result uploaded", keyGuest, g.id, "name", e.Name, "size", e.Size)
	}
	g.m.mark("settled:" + e.Name)
	return err
}
