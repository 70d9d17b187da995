package tenant

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// Status is what is known of a deployment: the tenant's own record, the
// platform's word, and the broker's.
type Status struct {
	Deployment *Deployment         `json:"deployment"`
	Guest      *Guest              `json:"guest,omitempty"`
	State      string              `json:"state,omitempty"`
	Broker     *brokeradmin.Status `json:"broker,omitempty"`
	// Problems say which part could not be asked.
	Problems []string `json:"problems,omitempty"`
}

// List returns the names of all deployments.
func (t *Tenant) List() ([]string, error) { return t.state.list() }

// Status asks everybody who knows something.
func (t *Tenant) Status(ctx context.Context, name string) (*Status, error) {
	d, err := t.state.load(name)
	if err != nil {
		return nil, err
	}
	s := &Status{Deployment: d}
	if d.GuestID != "" && t.control != nil {
		if s.Guest, err = t.control.Guest(ctx, d.GuestID); err != nil {
			s.Problems = append(s.Problems, err.Error())
		} else {
			s.State = stateWord(s.Guest.Status)
		}
	}
	if d.Stage != StagePrepared && t.broker != nil {
		if s.Broker, err = t.broker.Launch(ctx, d.LaunchID); err != nil {
			s.Problems = append(s.Problems, err.Error())
		}
	}
	return s, nil
}

// stateWord is the status as people say it; nothing said yet is "pending".
func stateWord(s api.GuestStatus) string {
	if s == api.GuestStatus_GUEST_STATUS_UNSPECIFIED {
		return "pending"
	}
	return s.Word()
}

// Wait returns when the guest has ended. On the way it attests the guest, as
// soon as it answers: only evidence of the running guest gives the key that
// its results must be signed with. A failed guest is a refusal that names the
// reason, the broker's where it has one.
func (t *Tenant) Wait(ctx context.Context, name string) (*Guest, error) {
	return t.await(ctx, name, (*Guest).ended)
}

// WaitRunning returns when the workload runs (or has ended).
func (t *Tenant) WaitRunning(ctx context.Context, name string) (*Guest, error) {
	return t.await(ctx, name, func(g *Guest) bool { return g.ended() || g.Status >= api.GuestStatus_GUEST_STATUS_RUNNING })
}

func (t *Tenant) await(ctx context.Context, name string, enough func(*Guest) bool) (*Guest, error) {
	if err := t.needControl(); err != nil {
		return nil, err
	}
	d, err := t.launched(name)
	if err != nil {
		return nil, err
	}
	w := waiter{t: t, d: d, silence: patience{within: evidencePatience, now: t.now}}
	outage := patience{within: outagePatience, now: t.now}
	for {
		g, err := t.control.Guest(ctx, d.GuestID)
		if err != nil {
			err = fmt.Errorf("asking for the guest: %w", err)
			if lasting(ctx, err) || outage.over() {
				return nil, err
			}
			if wait(ctx) != nil {
				return nil, err
			}
			continue
		}
		outage.reset()
		if g.Status != w.last {
			w.last = g.Status
			t.report.Step("guest is " + stateWord(g.Status))
		}
		if g.ended() {
			// Parts of what was never completed cost as much as objects.
			if err := t.abortUploads(ctx, d); err != nil {
				t.report.Step("parts may be left in the object store: " + err.Error())
			}
		}
		if enough(g) && (w.attested || g.ended()) {
			return g, t.outcome(ctx, d, g)
		}
		if err := w.attest(ctx, g); err != nil {
			return g, err
		}
		w.answerUploads(ctx, g)
		if err := wait(ctx); err != nil {
			return g, fmt.Errorf("waiting for guest %s: %w", d.GuestID, err)
		}
	}
}

// How long await goes on without what it waits for. A guest needs minutes to
// boot and to answer under emulation, seconds on silicon.
const (
	outagePatience   = 2 * time.Minute
	evidencePatience = 15 * time.Minute
)

// patience ends some time after the first failure in a row.
type patience struct {
	within time.Duration
	now    func() time.Time
	since  time.Time
}

func (p *patience) over() bool {
	if p.since.IsZero() {
		p.since = p.now()
	}
	return p.now().Sub(p.since) >= p.within
}

func (p *patience) reset() { p.since = time.Time{} }

// lasting reports whether asking again would end the same. What passes is that
// nobody answered, and what a guest's node says while the guest comes and goes.
func lasting(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return true
	}
	if refused, ok := errors.AsType[*contract.Refusal](err); ok {
		switch refused.Code {
		case codeGuestEnded, "guest.not-running", "evidence.timeout", "evidence.busy":
			return false
		}
		return true
	}
	return !errors.Is(err, ErrUnreachable) && !errors.Is(err, context.DeadlineExceeded)
}

// waiter attests a guest once, while it runs.
type waiter struct {
	t        *Tenant
	d        *Deployment
	last     api.GuestStatus
	silence  patience
	attested bool
	// answered are the events of uploads that need no further answer; begun is
	// how often each result's upload was begun anew.
	answered map[string]bool
	begun    map[string]int
}

// attest tries once. A guest that cannot answer yet is asked again, for a
// time; evidence that does not hold ends the wait.
func (w *waiter) attest(ctx context.Context, g *Guest) error {
	if w.attested || !g.answers() {
		return nil
	}
	try, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	v, err := w.t.Attest(try, w.d.Name, VerifyOptions{})
	switch {
	case err == nil:
	case lasting(ctx, err):
		return fmt.Errorf("attesting the guest: %w", err)
	case w.silence.over():
		return contract.Refuse("tenant.evidence-timeout", "stop the guest with tenant stop, look at the node, and deploy again; its results could not be verified",
			"guest %s runs and has given no evidence for %v", w.d.GuestID, evidencePatience).Because(err)
	default:
		return nil // the next poll tells more
	}
	if err := v.refusal(); err != nil {
		return err
	}
	w.attested = true
	w.t.report.Step("evidence holds")
	return nil
}

// outcome explains a guest that did not finish.
func (t *Tenant) outcome(ctx context.Context, d *Deployment, g *Guest) error {
	if !g.ended() || g.Status == api.GuestStatus_GUEST_STATUS_FINISHED {
		return nil
	}
	if g.Status == api.GuestStatus_GUEST_STATUS_STOPPED {
		return contract.Refuse("tenant.guest-stopped", "deploy again if this was not wanted", "guest %s was stopped", d.GuestID)
	}
	var why error
	if g.Refusal != nil {
		why = g.Refusal
	} else {
		why = contract.Refuse("tenant.guest-failed", "see tenant status "+d.Name, "guest %s failed without a reason", d.GuestID)
	}
	if t.broker == nil {
		return why
	}
	// The node's word may hide the broker's: say both.
	s, err := t.broker.Launch(ctx, d.LaunchID)
	if err != nil || len(s.Refusals) == 0 {
		return why
	}
	last := s.Refusals[len(s.Refusals)-1].Refusal
	return errors.Join(why, fmt.Errorf("the key broker refused: %w", &last))
}

// Stop ends the guest; its results so far are uploaded.
func (t *Tenant) Stop(ctx context.Context, name string, grace time.Duration) error {
	if err := t.needControl(); err != nil {
		return err
	}
	d, err := t.launched(name)
	if err != nil {
		return err
	}
	if err := t.control.Stop(ctx, d.GuestID, grace); err != nil {
		return fmt.Errorf("stopping guest: %w", err)
	}
	return nil
}
