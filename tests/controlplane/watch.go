package controlplane

import (
	"encoding/hex"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

const (
	// codeCloned: two instances speak as one host, in turns.
	codeCloned = "node.cloned"
	// codeNodeAlarmed refuses work for a host with an alarm.
	codeNodeAlarmed = "control.node-alarmed"
	// maxReturns of an instance that another had followed. A heartbeat may
	// have been on its way when its sender was replaced; two were not.
	maxReturns = 2
	// maxInstances are remembered per host.
	maxInstances = 64
)

// watched is what is remembered of a host's heartbeats, to see that it is one
// host, and that its audit log only grows.
type watched struct {
	// Sequence of the event stream up to which heartbeats were looked at.
	Sequence uint64        `json:"sequence"`
	Audit    audit.Witness `json:"audit,omitzero"`
	// Instance spoke last (hex), on the boot BootID. Former ones came back as
	// often as it says.
	Instance string         `json:"instance,omitempty"`
	BootID   string         `json:"boot_id,omitempty"`
	Former   map[string]int `json:"former,omitempty"`
	// Alarms by code, until somebody resolves them.
	Alarms map[string]client.Alarm `json:"alarms,omitempty"`
}

// observe takes a heartbeat and reports whether there is something to keep.
func (w *watched) observe(h *api.Heartbeat, at time.Time) (changed bool, raised []*contract.Refusal) {
	changed, r := w.instance(h)
	if r != nil {
		raised = append(raised, r)
	}
	if a := h.GetAudit(); a != nil {
		grown, r := w.audit(a)
		changed = changed || grown
		if r != nil {
			raised = append(raised, r)
		}
	}
	fresh := raised[:0]
	for _, r := range raised {
		if _, known := w.Alarms[r.Code]; known {
			continue
		}
		if w.Alarms == nil {
			w.Alarms = map[string]client.Alarm{}
		}
		w.Alarms[r.Code] = client.Alarm{Code: r.Code, Message: r.Message, Remedy: r.Remedy, Since: at}
		fresh = append(fresh, r)
	}
	return changed || len(fresh) > 0, fresh
}

func (w *watched) instance(h *api.Heartbeat) (changed bool, alarm *contract.Refusal) {
	now := hex.EncodeToString(h.GetInstance())
	if now == "" || now == w.Instance {
		return false, nil
	}
	if w.Former == nil || len(w.Former) >= maxInstances {
		w.Former = map[string]int{}
	}
	if w.Instance != "" {
		w.Former[w.Instance] += 0
	}
	before := w.BootID
	if _, returned := w.Former[now]; returned {
		w.Former[now]++
	}
	w.Instance, w.BootID = now, h.GetBootId()
	if w.Former[now] < maxReturns {
		return true, nil
	}
	return true, contract.Refuse(codeCloned,
		"stop one of the two, enrol it under a name of its own, and give the other new credentials; then resolve the alarm",
		"two agents speak as this host in turns, on the boots %q and %q", before, h.GetBootId())
}

func (w *watched) audit(a *api.AuditCheckpoint) (grown bool, alarm *contract.Refusal) {
	proof, err := audit.ParseProof(a.GetProof())
	if err != nil || a.GetFrom() > 1<<62 {
		return false, contract.Refuse(audit.CodeForged, "ask the host's operator", "the audit log's proof does not parse")
	}
	return w.Audit.Observe(audit.Offer{Key: a.GetKey(), Checkpoint: a.GetCheckpoint(), From: int64(a.GetFrom()), Proof: proof})
}

// watch looks at a heartbeat once, also at one that was stored while we were
// down.
func (s *Server) watch(hostID string, h *api.Heartbeat, at time.Time, sequence uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	host := s.state.Hosts[hostID]
	if host == nil || sequence <= host.Watched.Sequence {
		return
	}
	host.Watched.Sequence = sequence
	changed, raised := host.Watched.observe(h, at)
	for _, r := range raised {
		s.cfg.Logger.Error("ALARM", "host_id", hostID, "code", r.Code, "err", r, "remedy", r.Remedy)
	}
	if !changed {
		return
	}
	if err := s.state.save(s.cfg.Dir, s.cfg.Clock()); err != nil {
		s.cfg.Logger.Error("keeping what was seen of a host", "host_id", hostID, "err", err)
	}
}

// rewound lets a stream that was wiped be looked at from its beginning.
func (s *Server) rewound(last uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.state.Hosts {
		h.Watched.Sequence = min(h.Watched.Sequence, last)
	}
}

// Resolve forgets a host's alarms: somebody looked into them. Its audit log
// and its instance count from the next heartbeat on.
func (s *Server) Resolve(hostID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.state.Hosts[hostID]
	if h == nil {
		return errNodeNotFound(hostID)
	}
	h.Watched = watched{Sequence: h.Watched.Sequence}
	return s.state.save(s.cfg.Dir, s.cfg.Clock())
}

// alarmed refuses to send work to a host with an alarm.
func (h *hostState) alarmed(hostID string) *contract.Refusal {
	for code := range h.Watched.Alarms {
		return contract.Refuse(codeNodeAlarmed, "look at the node's alarms and do what they say; then resolve them", "node %s has an alarm: %s", hostID, code)
	}
	return nil
}
