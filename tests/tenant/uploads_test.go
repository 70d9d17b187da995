package tenant

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/blob"
)

// answer is what the tenant says of an upload that waits.
type answer struct {
	grant  *api.ResultUpload
	settle string // the upload's id
}

func (n *fakeNode) GrantUpload(_ context.Context, id string, u *api.ResultUpload) error {
	return n.answered(id, answer{grant: u})
}

func (n *fakeNode) SettleUpload(_ context.Context, id, _, uploadID string) error {
	return n.answered(id, answer{settle: uploadID})
}

func (n *fakeNode) answered(id string, a answer) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	g, err := n.get(id)
	if err == nil {
		g.state.Uploads = nil
		g.answers <- a
	}
	return err
}

// asks shows the tenant an upload that waits, and returns the answer.
func (g *fakeGuest) asks(t *testing.T, u PendingUpload) answer {
	t.Helper()
	u.EventID = uuid.NewString()
	g.node.mu.Lock()
	g.state.Uploads = []PendingUpload{u}
	g.node.mu.Unlock()
	select {
	case a := <-g.answers:
		return a
	case <-t.Context().Done():
		t.Fatal("the tenant does not answer")
		return answer{}
	}
}

// putParts delivers one file as the agent does, with its own code; harm may
// change the ETags it reports.
func (g *fakeGuest) putParts(t *testing.T, u *api.ResultUpload, data []byte, harm func(uploadID string, etags []string)) {
	t.Helper()
	client := blob.Client(&http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}})
	spools, err := blob.OpenSpools(t.TempDir(), blob.SpoolConfig{MaxBytes: 1 << 30, CheckHeader: sealed.CheckHeader}, client, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	spool, err := spools.Open("guest", map[string]int64{u.GetName(): u.MaxBytes()}, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	e, err := spool.Receive(t.Context(), u.GetName(), bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	for {
		p := u.GetParts()
		etags, err := spools.UploadParts(t.Context(), "guest", e, blob.Grant{
			UploadID: p.GetUploadId(), PartSize: int64(p.GetPartSize()), FirstPart: int(p.GetFirstPart()), URLs: p.GetUrls(),
		})
		var a answer
		if wanted, is := errors.AsType[*blob.WantedError](err); is {
			a = g.asks(t, PendingUpload{Wanted: &api.UploadGrantWanted{Name: e.Name, UploadId: p.GetUploadId(), FirstPart: uint32(wanted.Part), Refusal: api.RefusalToWire(wanted.Why)}})
		} else if err != nil {
			t.Fatal(err)
		} else {
			if harm != nil {
				harm(p.GetUploadId(), etags)
			}
			a = g.asks(t, PendingUpload{Ready: &api.UploadReady{Name: e.Name, UploadId: p.GetUploadId(), Size: uint64(e.Size), Etags: etags}})
		}
		if u = a.grant; a.settle == p.GetUploadId() {
			return
		}
	}
}

const fiveMiB = 5 << 20

func TestResultsInPartsAreGrantedCompletedAndOpened(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("0123456789abcdef", 3*fiveMiB/16)
	for name, c := range map[string]struct {
		launch func(*api.LaunchGuest)
		harm   func(w *world) func(uploadID string, etags []string)
	}{
		"all at once": {nil, nil},
		"more URLs are wanted": {func(l *api.LaunchGuest) {
			l.Results.Uploads[0].Parts.Urls = l.Results.Uploads[0].Parts.Urls[:2]
		}, nil},
		"a wrong ETag": {nil, func(*world) func(string, []string) {
			broken := false
			return func(_ string, etags []string) {
				if !broken {
					etags[1], broken = `"00000000000000000000000000000000"`, true
				}
			}
		}},
		"the upload is aborted behind our back": {func(l *api.LaunchGuest) {
			l.Results.Uploads[0].Parts.Urls = l.Results.Uploads[0].Parts.Urls[:1]
		}, func(w *world) func(string, []string) {
			aborted := false
			return func(id string, _ []string) {
				if d, err := w.tenant.state.load("job"); !aborted && err == nil {
					aborted = true
					_ = w.tenant.store.AbortUpload(w.t.Context(), bucket, d.Results[0].Key, id)
				}
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.node.swap = c.launch
			ref, _ := w.push(0)
			if _, err := w.tenant.Deploy(t.Context(), DeployOptions{
				Name: "job", Image: ref, Results: []string{"large"}, PartSize: fiveMiB, Confidential: true, AttestationRequired: true,
			}); err != nil {
				t.Fatal(err)
			}
			g := w.guest()
			if parts := g.command.GetResults().GetUploads()[0].GetParts(); parts.GetPartSize() != fiveMiB || len(g.command.GetResults().GetUploads()[1].GetPutUrl()) == 0 {
				t.Errorf("the launch grants %v", parts)
			}
			if c.harm != nil {
				g.harm = c.harm(w)
			}
			waited := make(chan error, 1)
			go func() {
				_, err := w.tenant.Wait(t.Context(), "job")
				waited <- err
			}()
			g.finish(t, map[string]string{"large": large}, g.ResultKey)
			if err := <-waited; err != nil {
				t.Fatal(err)
			}
			out := t.TempDir()
			if r, err := w.tenant.Results(t.Context(), "job", out); err != nil || !slices.Equal(r.Files, []string{"large"}) {
				t.Fatal(r, err)
			}
			if got, err := os.ReadFile(filepath.Join(out, "large")); err != nil || string(got) != large {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

func TestUploadsThatNoGrantCarriesAreUsage(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]DeployOptions{
		"negative":    {ResultsQuota: -1},
		"small parts": {PartSize: fiveMiB - 1},
		"large parts": {PartSize: 5<<30 + 1},
		"too many":    {PartSize: fiveMiB, ResultsQuota: 10_000*fiveMiB + 1},
		"too much":    {ResultsQuota: 10_000*(5<<30) + 1},
	} {
		o.Name, o.Image, o.Confidential, o.AttestationRequired = "job", "registry.example/app:1", true, true
		if err := o.check(); ExitCode(err) != ExitUsage {
			t.Errorf("%s: %v", name, err)
		}
	}
	for quota, want := range map[int64]int64{0: fiveMiB, 5 << 30: 42 << 20, 1 << 40: 5 << 30} {
		o := DeployOptions{ResultsQuota: quota}
		if got := o.partSize(); got < want-1<<21 || got > want+1<<21 {
			t.Errorf("parts of %d bytes for %d", got, quota)
		}
	}
}

// What was begun at the store is forgotten there when the launch is refused,
// and when the guest ends without it.
func TestNoUploadIsLeftBehind(t *testing.T) {
	t.Parallel()
	for name, fails := range map[string]func(*fakeNode){
		"control.no-node":     func(n *fakeNode) { n.onLaunch = func() { n.fail = contract.Refuse("control.no-node", "r", "none") } },
		"tenant.guest-failed": func(n *fakeNode) { n.status = api.GuestStatus_GUEST_STATUS_FAILED },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			fails(w.node)
			ref, _ := w.push(0)
			_, err := w.tenant.Deploy(t.Context(), DeployOptions{
				Name: "job", Image: ref, Results: []string{"large"}, PartSize: fiveMiB, Confidential: true, AttestationRequired: true,
			})
			if name == "tenant.guest-failed" {
				_, err = w.tenant.Wait(t.Context(), "job")
			}
			if code(err) != name {
				t.Fatal(err)
			}
			w.noUploads()
		})
	}
}

func (w *world) noUploads() {
	t := w.t
	t.Helper()
	s, ok := w.tenant.store.(*s3Store)
	if !ok {
		t.Fatal("another store")
	}
	left, err := s.core().ListMultipartUploads(t.Context(), bucket, "", "", "", "", 10)
	if err != nil || len(left.Uploads) > 0 {
		t.Errorf("left %v, %v", left.Uploads, err)
	}
}
