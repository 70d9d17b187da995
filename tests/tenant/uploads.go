package tenant

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
)

// How many URLs of parts go with a launch, all results together: beside 64 KiB
// of manifest they fit a command.
const launchURLs = 160

// PartStore is what an upload in parts needs of whoever holds the store's
// keys, which never leave this tool.
type PartStore interface {
	// BeginUpload returns the id of a new upload.
	BeginUpload(ctx context.Context, bucket, key string) (uploadID string, err error)
	// PresignPart returns the URL that one part may be put to.
	PresignPart(ctx context.Context, bucket, key, uploadID string, part int, valid time.Duration) (string, error)
	// CompleteUpload makes the object of all parts and returns its size. One
	// that was completed before is no error.
	CompleteUpload(ctx context.Context, bucket, key, uploadID string, etags []string) (size int64, err error)
	// AbortUpload forgets the parts. An upload that is gone is no error.
	AbortUpload(ctx context.Context, bucket, key, uploadID string) error
}

// PendingUpload is a result that waits for this tool; one of both is there.
type PendingUpload struct {
	EventID string
	Wanted  *api.UploadGrantWanted
	Ready   *api.UploadReady
}

// inParts reports whether results go up in parts.
func (o *DeployOptions) inParts() bool { return o.PartSize > 0 || o.ResultsQuota > api.MaxPutBytes }

func (o *DeployOptions) checkUploads() error {
	if o.ResultsQuota < 0 {
		return Usage("--results-quota %d is negative", o.ResultsQuota)
	}
	if !o.inParts() {
		return nil
	}
	if size := o.partSize(); size < api.MinPartBytes || size > api.MaxPartBytes || o.ResultsQuota > size*api.MaxParts {
		return Usage("results of %d bytes do not go up in parts of %d: a part has %d to %d bytes, an upload %d parts",
			o.ResultsQuota, size, api.MinPartBytes, int64(api.MaxPartBytes), api.MaxParts)
	}
	return nil
}

// firstURLs is how many parts of one result the launch grants.
func (o *DeployOptions) firstURLs() int {
	return max(1, min(api.MaxGrantURLs, launchURLs/max(1, len(o.Results))))
}

// partSize lets the URLs of the launch do where it can.
func (o *DeployOptions) partSize() int64 {
	if o.PartSize > 0 {
		return o.PartSize
	}
	urls := int64(o.firstURLs())
	return min(max((o.ResultsQuota+urls-1)/urls, api.MinPartBytes), api.MaxPartBytes)
}

// beginUploads makes room for results that go up in parts.
func (t *Tenant) beginUploads(ctx context.Context, p *plan) error {
	if !p.o.inParts() {
		return nil
	}
	for i := range p.d.Results {
		if err := t.beginUpload(ctx, &p.d.Results[i], p.o.partSize()); err != nil {
			return err
		}
	}
	return t.state.save(p.d)
}

func (t *Tenant) beginUpload(ctx context.Context, r *DeployedObject, partSize int64) error {
	id, err := t.store.BeginUpload(ctx, r.Bucket, r.Key)
	if err != nil {
		return err
	}
	r.Upload = &DeployedUpload{ID: id, PartSize: partSize}
	return nil
}

// abortUploads forgets the parts of what was not completed.
func (t *Tenant) abortUploads(ctx context.Context, d *Deployment) error {
	for _, r := range d.Results {
		if r.Upload == nil {
			continue
		}
		if err := t.store.AbortUpload(ctx, r.Bucket, r.Key, r.Upload.ID); err != nil {
			return err
		}
	}
	return nil
}

// upload signs where one result goes, from a part on.
func (t *Tenant) upload(ctx context.Context, r DeployedObject, first, n int) (*api.ResultUpload, error) {
	valid := t.profile.presignFor()
	if r.Upload == nil {
		url, err := t.store.PresignPut(ctx, r.Bucket, r.Key, valid)
		return &api.ResultUpload{Name: r.Name, PutUrl: url}, err
	}
	g := &api.UploadGrant{UploadId: r.Upload.ID, PartSize: uint64(r.Upload.PartSize), FirstPart: uint32(first)}
	for part := first; part < first+n && part <= api.MaxParts; part++ {
		url, err := t.store.PresignPart(ctx, r.Bucket, r.Key, r.Upload.ID, part, valid)
		if err != nil {
			return nil, err
		}
		g.Urls = append(g.Urls, url)
	}
	return &api.ResultUpload{Name: r.Name, Parts: g}, nil
}

// maxBegun bounds how often one result is begun anew.
const maxBegun = 3

// answerUploads gives results that wait what they wait for. What fails is
// tried again at the next poll.
func (w *waiter) answerUploads(ctx context.Context, g *Guest) {
	for _, u := range g.Uploads {
		if w.answered[u.EventID] {
			continue
		}
		if err := w.answerUpload(ctx, u); err != nil {
			w.t.report.Step("a result waits: " + err.Error())
			continue
		}
		if w.answered == nil {
			w.answered = map[string]bool{}
		}
		w.answered[u.EventID] = true
	}
}

func (w *waiter) answerUpload(ctx context.Context, u PendingUpload) error {
	name, id := u.Wanted.GetName(), u.Wanted.GetUploadId()
	if u.Ready != nil {
		name, id = u.Ready.GetName(), u.Ready.GetUploadId()
	}
	d, err := w.t.state.load(w.d.Name) // attesting changes it meanwhile
	if err != nil {
		return err
	}
	i := slices.IndexFunc(d.Results, func(r DeployedObject) bool { return r.Name == name && r.Upload != nil })
	if i < 0 {
		return fmt.Errorf("the node speaks of an upload %q that is none of this deployment", name)
	}
	r := &d.Results[i]
	first := int(u.Wanted.GetFirstPart())
	switch {
	case u.Ready != nil && id == r.Upload.ID:
		size, err := w.t.store.CompleteUpload(ctx, r.Bucket, r.Key, id, u.Ready.GetEtags())
		if err == nil && size != int64(u.Ready.GetSize()) {
			err = fmt.Errorf("the object of result %s has %d bytes, the node put %d", name, size, u.Ready.GetSize())
		}
		if err == nil {
			w.t.report.Step("result " + name + " is complete")
			return w.t.control.SettleUpload(ctx, d.GuestID, name, id)
		}
		w.t.report.Step(err.Error())
		if first, err = 1, w.beginAnew(ctx, d, r); err != nil {
			return err
		}
	case id == r.Upload.ID && u.Wanted.GetRefusal().GetCode() == "blob.not-found":
		first = 1
		if err := w.beginAnew(ctx, d, r); err != nil {
			return err
		}
	case id != r.Upload.ID, first < 1:
		first = 1 // of an upload that was begun anew meanwhile
	}
	grant, err := w.t.upload(ctx, *r, first, api.MaxGrantURLs)
	if err != nil {
		return err
	}
	w.t.report.Step(fmt.Sprintf("result %s goes on with part %d", name, first))
	return w.t.control.GrantUpload(ctx, d.GuestID, grant)
}

func (w *waiter) beginAnew(ctx context.Context, d *Deployment, r *DeployedObject) error {
	if w.begun[r.Name] >= maxBegun {
		return fmt.Errorf("the upload of result %s was begun %d times and never completed; look at the object store", r.Name, maxBegun)
	}
	if w.begun == nil {
		w.begun = map[string]int{}
	}
	w.begun[r.Name]++
	if err := w.t.beginUpload(ctx, r, r.Upload.PartSize); err != nil {
		return err
	}
	return w.t.state.save(d)
}
