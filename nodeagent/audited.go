package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
)

const (
	// maxUnlisted refusals an hour of bytes nobody signed have entries of their
	// own, whoever sends them: 9 MB a day.
	maxUnlisted   = 1000
	unlistedEvery = time.Hour
	// maxPending entries are remembered of changes that the store did not take.
	maxPending = 4096
)

func auditDir(stateDir string) string { return filepath.Join(stateDir, "audit") }

// openAudit opens the audit log. One that is damaged is set aside and a new
// one begun, which the control plane's witness will not take for the old one;
// nothing is launched while the damaged one lies there.
func openAudit(cfg config.Config, now func() time.Time, logger hclog.Logger) (*audit.Log, error) {
	dir := auditDir(cfg.StateDir)
	l, err := audit.Open(dir, cfg.HostID, now)
	if !errors.Is(err, audit.ErrDamaged) {
		return l, err
	}
	aside := dir + ".damaged-" + now().UTC().Format("20060102T150405Z")
	logger.Error("audit log is damaged; set aside, and a new one begun", "aside", aside, "err", err)
	if err := os.Rename(dir, aside); err != nil {
		return nil, fmt.Errorf("setting a damaged audit log aside: %w", err)
	}
	return audit.Open(dir, cfg.HostID, now)
}

// damagedAudit names a log that was set aside, "" when there is none.
func damagedAudit(cfg config.Config) string {
	found, err := filepath.Glob(auditDir(cfg.StateDir) + ".damaged-*")
	if err != nil || len(found) == 0 {
		return ""
	}
	return found[0]
}

// auditLog is what audited needs of the log.
type auditLog interface{ Append(e audit.Entry) error }

// audited is the store, and writes into the audit log what the store is about
// to remember: what cannot be written there is not done.
type audited struct {
	*store.Store
	log auditLog
	now func() time.Time

	mu sync.Mutex // guards below
	// pending are entries of changes that the store has not taken; they are not
	// written again when it is asked again.
	pending  map[string]bool
	window   time.Time
	unsigned int
}

func newAudited(s *store.Store, log auditLog, now func() time.Time) *audited {
	return &audited{Store: s, log: log, now: now, pending: map[string]bool{}}
}

// change writes entries by their keys, then changes the store.
func (a *audited) change(keys []string, entries []audit.Entry, change func() error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, e := range entries {
		if a.pending[keys[i]] {
			continue
		}
		listed, err := a.listedLocked(e)
		if err != nil {
			return err
		}
		if !listed {
			continue
		}
		if err := a.log.Append(e); err != nil {
			return fmt.Errorf("writing down what is about to be done: %w", err)
		}
		if len(a.pending) >= maxPending {
			clear(a.pending)
		}
		a.pending[keys[i]] = true
	}
	if err := change(); err != nil {
		return err
	}
	for _, key := range keys {
		delete(a.pending, key)
	}
	return nil
}

// listedLocked counts refusals of bytes nobody signed. What is beyond the
// hour's share is one entry in the next.
func (a *audited) listedLocked(e audit.Entry) (bool, error) {
	if e.Kind != api.KindCommandRefused || e.CommandID != "" {
		return true, nil
	}
	now := a.now()
	if now.Sub(a.window) >= unlistedEvery || now.Before(a.window) {
		if over := a.unsigned - maxUnlisted; over > 0 {
			if err := a.log.Append(audit.Entry{Kind: audit.KindUnlisted, Count: over}); err != nil {
				return false, fmt.Errorf("writing down what was refused: %w", err)
			}
		}
		a.window, a.unsigned = now, 0
	}
	a.unsigned++
	return a.unsigned <= maxUnlisted, nil
}

func (a *audited) events(events []*api.Event, change func() error) error {
	keys, entries := make([]string, 0, len(events)), make([]audit.Entry, 0, len(events))
	for _, e := range events {
		entry, err := entryOf(e)
		if err != nil {
			return err
		}
		keys, entries = append(keys, e.GetEventId()), append(entries, entry)
	}
	return a.change(keys, entries, change)
}

// AddCommand implements inbox.Journal. Commands that are stored done were
// refused, and that is in the log.
func (a *audited) AddCommand(c inbox.Command) (fresh bool, err error) {
	if c.Done {
		return a.Store.AddCommand(c)
	}
	sum := sha256.Sum256(c.Payload)
	err = a.change([]string{c.ID}, []audit.Entry{{
		Kind: audit.KindAccepted, CommandID: c.ID, Verb: c.Verb, GuestID: c.Guest, Generation: c.Generation, SHA256: hex.EncodeToString(sum[:]),
	}}, func() (err error) { fresh, err = a.Store.AddCommand(c); return err })
	return fresh, err
}

// FinishCommand implements inbox.Journal.
func (a *audited) FinishCommand(id string, events ...*api.Event) error {
	return a.events(events, func() error { return a.Store.FinishCommand(id, events...) })
}

// AppendEvents implements inbox.Journal.
func (a *audited) AppendEvents(events ...*api.Event) error {
	return a.events(events, func() error { return a.Store.AppendEvents(events...) })
}

// PutGuest implements lifecycle.Records.
func (a *audited) PutGuest(g store.Guest, events ...*api.Event) error {
	return a.events(events, func() error { return a.Store.PutGuest(g, events...) })
}

// SetCordon implements lifecycle.Records.
func (a *audited) SetCordon(reason string, on bool, events ...*api.Event) error {
	return a.events(events, func() error { return a.Store.SetCordon(reason, on, events...) })
}

// SaveReport implements capability.Journal.
func (a *audited) SaveReport(report *api.Capability, events ...*api.Event) error {
	return a.events(events, func() error { return a.Store.SaveReport(report, events...) })
}

// entryOf says of an event what is nobody's secret.
func entryOf(e *api.Event) (audit.Entry, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil {
		return audit.Entry{}, fmt.Errorf("encoding event: %w", err)
	}
	sum := sha256.Sum256(data)
	out := audit.Entry{Kind: api.EventKind(e), CommandID: e.GetCommandId(), SHA256: hex.EncodeToString(sum[:])}
	switch b := e.GetBody().(type) {
	case *api.Event_CommandRefused:
		out.Code = b.CommandRefused.GetRefusal().GetCode()
		if of := b.CommandRefused.GetEnvelopeSha256(); of != "" {
			out.SHA256 = of
		}
	case *api.Event_GuestState:
		g := b.GuestState
		out.GuestID, out.Generation, out.Status, out.Code = g.GetGuestId(), g.GetGeneration(), g.GetStatus().Word(), g.GetRefusal().GetCode()
	case *api.Event_Evidence:
		sum := sha256.Sum256(b.Evidence.GetEvidence())
		out.GuestID, out.SHA256 = b.Evidence.GetGuestId(), hex.EncodeToString(sum[:])
	case *api.Event_ResultUploaded:
		out.GuestID, out.Detail, out.SHA256 = b.ResultUploaded.GetGuestId(), b.ResultUploaded.GetName(), hex.EncodeToString(b.ResultUploaded.GetSha256())
	case *api.Event_ResultGivenUp:
		out.GuestID, out.Detail, out.Code = b.ResultGivenUp.GetGuestId(), b.ResultGivenUp.GetName(), b.ResultGivenUp.GetRefusal().GetCode()
	case *api.Event_UploadGrantWanted:
		out.GuestID, out.Detail, out.Code = b.UploadGrantWanted.GetGuestId(), b.UploadGrantWanted.GetName(), b.UploadGrantWanted.GetRefusal().GetCode()
	case *api.Event_UploadReady:
		out.GuestID, out.Detail, out.SHA256 = b.UploadReady.GetGuestId(), b.UploadReady.GetName(), hex.EncodeToString(b.UploadReady.GetSha256())
	case *api.Event_CommandDone, *api.Event_Capability, *api.Event_Heartbeat, nil:
	}
	return out, nil
}

// gate refuses launches while the host as a whole must not begin any. What had
// begun before goes on.
type gate struct {
	inbox.Executor
	known  func(guestID string) bool
	closed func() *contract.Refusal
}

// Execute implements inbox.Executor.
func (g gate) Execute(ctx context.Context, cmd *api.Command) ([]*api.Event, error) {
	if launch := cmd.GetLaunchGuest(); launch != nil && !g.known(launch.GetGuestId()) {
		if refusal := g.closed(); refusal != nil {
			return nil, refusal
		}
	}
	return g.Executor.Execute(ctx, cmd)
}
