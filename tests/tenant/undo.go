package tenant

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// undoTimeout bounds what a deploy that ends early takes back.
const undoTimeout = 30 * time.Second

// undo withdraws the keys, removes the ciphertext it uploaded and forgets the
// deployment, unless the command may be on its way: then the guest needs its
// keys and the user needs the name. A deployment that was to be replaced is
// back under its name.
func (t *Tenant) undo(ctx context.Context, p *plan) error {
	if p.sent {
		return nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if p.d.Stage != StagePrepared || p.unsure {
		err := t.broker.DeleteLaunch(undo, p.d.LaunchID)
		if err != nil && contract.AsRefusal(err).Code != "broker.launch-unknown" {
			return fmt.Errorf("withdrawing the keys of launch %s at the broker, delete it there: %w", p.d.LaunchID, err)
		}
	}
	err := errors.Join(t.abortUploads(undo, p.d), t.removeUploads(undo, p))
	return errors.Join(err, t.state.forget(p.d.Name, p.aside))
}

// removeUploads leaves no ciphertext behind that no key will open.
func (t *Tenant) removeUploads(ctx context.Context, p *plan) error {
	var errs []error
	for _, key := range p.uploads {
		bucket := t.profile.Store.Bucket
		err := t.store.Remove(ctx, bucket, key)
		if err == nil {
			err = t.state.forgetObject(bucket, key)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("removing %s/%s, which nobody can open any more: %w", bucket, key, err))
		}
	}
	return errors.Join(errs...)
}

// unsent reports whether the broker cannot have taken the registration: it said
// no, nobody was reached, or somebody else.
func unsent(err error) bool {
	_, refused := errors.AsType[*contract.Refusal](err)
	_, stranger := errors.AsType[*tls.CertificateVerificationError](err)
	var op *net.OpError
	return refused || stranger || (errors.As(err, &op) && op.Op == "dial")
}
