package endorsements

import (
	"context"
	"encoding/hex"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Status is what is there and what is missing.
type Status struct {
	// KeyService that is asked, "" when none is; MayAskAt is when next.
	KeyService string    `json:"key_service"`
	MayAskAt   time.Time `json:"may_ask_at"`
	// Platform is nil where it cannot be asked.
	Platform *PlatformStatus `json:"platform,omitempty"`
	// Source of the certificates that are served: "operator", "cache" or
	// "none".
	Source    string              `json:"source"`
	Documents []Document          `json:"documents"`
	Findings  []*contract.Refusal `json:"findings"`
}

// Sources of what is served.
const (
	sourceOperator = "operator"
	sourceCache    = "cache"
	sourceNone     = "none"
)

// PlatformStatus is the identity of this machine.
type PlatformStatus struct {
	Product string       `json:"product"`
	ChipID  string       `json:"chip_id"`
	TCB     contract.TCB `json:"tcb"`
	VLEK    bool         `json:"vlek"`
}

// Document is one in the cache.
type Document struct {
	Name string `json:"name"`
	// TCB of a VCEK or VLEK.
	TCB *contract.TCB `json:"tcb,omitempty"`
	// NotBefore and NotAfter are thisUpdate and nextUpdate of a revocation
	// list.
	NotBefore time.Time `json:"not_before,omitzero"`
	NotAfter  time.Time `json:"not_after,omitzero"`
	// Stale says that a revocation list is not current and not served.
	Stale bool `json:"stale"`
	// Problem says why the document counts as missing.
	Problem string `json:"problem,omitempty"`
}

// Status reads the cache and asks the platform, but not AMD.
func (p *Provider) Status(ctx context.Context) (Status, error) {
	s := Status{KeyService: p.cfg.KeyService, Source: sourceNone, Documents: []Document{}}
	var err error
	if s.MayAskAt, err = (pace{p.cfg.Dir, p.cfg.Now}).next(p.cfg.Now()); err != nil {
		return s, err
	}
	if p.cfg.Platform != nil {
		id, _, err := p.observe(ctx)
		if err != nil {
			p.setProblem(noPlatform(err))
		} else {
			s.Platform = &PlatformStatus{id.Product.Name, hex.EncodeToString(id.HWID), id.TCB, id.VLEK}
		}
	}
	found, strangers, err := p.cache.list()
	if err != nil {
		return s, err
	}
	for _, n := range found {
		s.Documents = append(s.Documents, p.describe(n))
	}
	for _, path := range strangers {
		s.Documents = append(s.Documents, Document{Name: path, Problem: "it is no document of this layout; remove it"})
	}
	if operator, _ := readOperator(p.cfg.OperatorDir); operator.VCEK != nil {
		s.Source = sourceOperator
	} else if p.Endorsements().VCEK != nil {
		s.Source = sourceCache
	}
	s.Findings = append([]*contract.Refusal{}, p.Findings()...)
	return s, nil
}

func (p *Provider) describe(n name) Document {
	d := Document{Name: n.String()}
	if n.kind == kindLeaf {
		d.TCB = &n.tcb
	}
	data, err := p.cache.raw(n)
	if err == nil {
		if d.NotBefore, d.NotAfter, err = validity(n, data); err == nil {
			err = p.cache.check(n, data, p.cache.raw)
		}
	}
	if err != nil {
		d.Problem = err.Error()
	}
	d.Stale = n.kind == kindCRL && !p.cfg.Now().Before(d.NotAfter)
	return d
}
