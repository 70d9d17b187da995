package main

import (
	"errors"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/store"
)

// Codes of what needs an operator's attention.
const (
	// codeCloned: somebody else speaks as this host. Launches are refused.
	codeCloned = "identity.cloned"
	// codeAuditDamaged: a damaged audit log was set aside. Launches are refused
	// until somebody took it away.
	codeAuditDamaged = "audit.damaged"
	// codeAuditUnread: how far the audit log is cannot be told.
	codeAuditUnread = "audit.unreadable"
	// codeAuditNearlyFull: audit.full is near.
	codeAuditNearlyFull = "audit.nearly-full"
	// codeOutboxNearlyFull and codeOutboxFull: the control plane has not
	// confirmed events for long.
	codeOutboxNearlyFull = "outbox.nearly-full"
	codeOutboxFull       = "outbox.full"
)

// nearlyFull is the share of outbox or audit log, in percent, from which on
// its filling is told. A day's outage of a busy host is a few percent of the
// one, a year of it a few of the other.
const nearlyFull = 80

// closed says why this host must not begin any guest, whoever asks.
func (a *agent) closed() *contract.Refusal {
	if a.link.Status().Cloned {
		return contract.Refuse(codeCloned, "find the other host or agent with this identity, stop it, and enrol it under a name of its own",
			"another host speaks as %s", a.cfg.HostID)
	}
	if aside := damagedAudit(a.cfg); aside != "" {
		return contract.Refuse(codeAuditDamaged, "keep "+aside+" for whoever looks into it, elsewhere; launches are taken again when it is gone from there",
			"the host's audit log was damaged")
	}
	return nil
}

// attention is what needs somebody's attention, for status and heartbeats.
func (a *agent) attention() []*contract.Refusal {
	var out []*contract.Refusal
	if r := a.closed(); r != nil {
		out = append(out, r)
	}
	for _, r := range []*contract.Refusal{outboxFinding(a.store), auditFinding(a.audit.State().Bytes, auditDir(a.cfg.StateDir))} {
		if r != nil {
			out = append(out, r)
		}
	}
	return out
}

func outboxFinding(s interface{ OutboxShare() (int, error) }) *contract.Refusal {
	share, err := s.OutboxShare()
	if err != nil {
		share = 0 // the store's own finding
	}
	const remedy = "see why the control plane confirms nothing (nodeagent status, control); events leave by themselves when it does"
	switch {
	case share >= store.OutboxWhole:
		return contract.Refuse(codeOutboxFull, remedy,
			"the outbox is full: nothing new is taken on; what runs goes on, and can be stopped")
	case share >= nearlyFull:
		return contract.Refuse(codeOutboxNearlyFull, remedy,
			"the outbox is filled to %d percent; when it is full nothing new is taken on", share)
	}
	return nil
}

func auditFinding(bytes int64, dir string) *contract.Refusal {
	if bytes*100/audit.MaxBytes < nearlyFull {
		return nil
	}
	return contract.Refuse(codeAuditNearlyFull, "run nodeagent audit export, stop the agent, move the folder "+dir+
		" to where it is kept, start the agent, and let the control plane accept the new log", "the audit log has %d bytes; at %d nothing new is taken on", bytes, int64(audit.MaxBytes))
}

// auditPatience is how long a heartbeat waits for the audit log's disk.
const auditPatience = 5 * time.Second

// errAuditHangs means that the audit log's disk does not answer.
var errAuditHangs = errors.New("the disk of the audit log does not answer")

// withAudit carries out what writes to the audit log, one at a time, and waits
// no longer than auditPatience: a disk that hangs must not hold up the link.
func withAudit[T any](a *agent, f func() (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	var none T
	if !a.auditing.CompareAndSwap(false, true) {
		return none, errAuditHangs
	}
	done := make(chan answer, 1)
	go func() {
		defer a.auditing.Store(false)
		value, err := f()
		done <- answer{value, err}
	}()
	patience := time.NewTimer(auditPatience)
	defer patience.Stop()
	select {
	case got := <-done:
		return got.value, got.err
	case <-patience.C:
		return none, errAuditHangs
	}
}

// offerAudit fills in how far the audit log is.
func (a *agent) offerAudit(h *api.Heartbeat) {
	offer, err := withAudit(a, a.audit.Offer)
	if err != nil {
		a.log.Error("making a checkpoint of the audit log", "err", err)
		h.Warnings = append(h.Warnings, api.RefusalToWire(contract.Refuse(codeAuditUnread, "look at the agent's log on the host", "the audit log has no checkpoint to show")))
		return
	}
	h.Audit = &api.AuditCheckpoint{Key: offer.Key, Checkpoint: offer.Checkpoint, From: uint64(offer.From)}
	for _, hash := range offer.Proof {
		h.Audit.Proof = append(h.Audit.Proof, hash[:])
	}
}

// confirmAudit notes what the control plane has of the audit log.
func (a *agent) confirmAudit(h *api.Heartbeat) {
	_, err := withAudit(a, func() (struct{}, error) { return struct{}{}, a.audit.Confirmed(h.GetAudit().GetCheckpoint()) })
	if err != nil {
		a.log.Error("noting what the control plane has of the audit log; it is shown again", "err", err)
	}
}
