package endorsements

import (
	"context"
	"errors"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// crlRefresh is the age at which a revocation list is fetched anew, so that a
// revocation is known within a day; half of its own lifetime if that is less.
const crlRefresh = 24 * time.Hour

// What became of a document.
const (
	resultFetched  = "fetched"
	resultImported = "imported"
	resultExported = "exported"
	resultKept     = "kept"
	resultLeftOut  = "left-out"
)

// Change is what became of one document.
type Change struct {
	Name string `json:"name"`
	// Result is "fetched", "imported", "exported", "kept" (it was there) or
	// "left-out".
	Result string `json:"result"`
	// Why it was left out.
	Why string `json:"why,omitempty"`
}

// Fetch gets what the cache lacks for an identity, whatever the operator's
// folder holds. A VLEK is not AMD's to hand out; only its chain is fetched.
func (p *Provider) Fetch(ctx context.Context, id Identity) ([]Change, error) {
	wanted := p.wanted(id, contract.Endorsements{})
	fetched := map[name]bool{}
	var changes []Change
	for _, n := range wanted {
		got, err := p.fetchDocument(ctx, id, n)
		changes = append(changes, got...)
		if err != nil {
			return changes, err
		}
		fetched[n] = true
	}
	n := namesFor(id)
	fetched[n.ark] = fetched[n.intermediate]
	for _, n := range []name{n.ark, n.intermediate, n.leaf, n.crl} {
		if !fetched[n] && p.cache.has(n) {
			changes = append(changes, Change{Name: n.String(), Result: resultKept})
		}
	}
	return changes, nil
}

// wanted is what must be fetched for an identity, in order. What the operator
// supplies is not: neither their certificates nor their revocation list.
func (p *Provider) wanted(id Identity, operator contract.Endorsements) (wanted []name) {
	n := namesFor(id)
	if operator.VCEK == nil {
		if !p.cache.has(n.ark) || !p.cache.has(n.intermediate) {
			wanted = append(wanted, n.intermediate)
		}
		if !id.VLEK && !p.cache.has(n.leaf) {
			wanted = append(wanted, n.leaf)
		}
	}
	if operator.CRL == nil && p.crlDue(n.crl) {
		wanted = append(wanted, n.crl)
	}
	return wanted
}

func (p *Provider) crlDue(n name) bool {
	data, errData := p.cache.get(n)
	age, errAge := p.cache.age(n)
	if errors.Join(errData, errAge) != nil || age < 0 {
		return true
	}
	from, until, err := validity(n, data)
	return err != nil || age >= min(crlRefresh, until.Sub(from)/2)
}

// fetchDocument asks AMD for one document and keeps it if it checks. The root
// comes with the intermediate.
func (p *Provider) fetchDocument(ctx context.Context, id Identity, n name) ([]Change, error) {
	if p.kds == nil {
		return nil, contract.Refuse("endorsements.offline", "set key_service, or carry the certificates over with export and import",
			"%s is missing, and this host is configured never to ask AMD's key service", n)
	}
	switch n.kind {
	case kindIntermediate:
		intermediate, ark, err := p.kds.chain(ctx, n.product.Name, n.family())
		if err != nil {
			return nil, err
		}
		root, err := p.keep(ctx, n.sibling(kindARK), ark)
		if err != nil {
			return nil, err
		}
		rest, err := p.keep(ctx, n, intermediate)
		return append(root, rest...), err
	case kindLeaf:
		data, err := p.kds.vcek(ctx, id.Identity)
		if err != nil {
			return nil, err
		}
		return p.keep(ctx, n, data)
	case kindCRL:
		data, err := p.kds.crl(ctx, n.product.Name, n.family())
		if err != nil {
			return nil, err
		}
		return p.keep(ctx, n, data)
	case kindARK:
	}
	return nil, errors.New("the root is fetched with its intermediate")
}

// keep checks what AMD answered before it is kept.
func (p *Provider) keep(ctx context.Context, n name, data []byte) ([]Change, error) {
	err := p.cache.check(n, data, p.cache.raw)
	if errors.Is(err, errWrongRoot) {
		return nil, contract.Refuse("endorsements.wrong-root", "look for a proxy that answers in AMD's place; if AMD has a new root, a new agent is needed",
			"the key service answered with another root for %s than the pinned one", n.product.Name)
	}
	if err != nil {
		return nil, contract.Refuse("endorsements.wrong-certificate", "compare this machine's clock; look for a proxy that answers in AMD's place; "+importInstead,
			"what the key service answered for %s is not what was asked for", n).Because(err)
	}
	taken, err := p.cache.put(ctx, n, data)
	if err != nil {
		return nil, err
	}
	if !taken {
		p.log.Warn("the key service answered with an older revocation list than is known; kept the newer", "name", n.String())
		return []Change{{Name: n.String(), Result: resultKept}}, nil
	}
	p.log.Info("fetched", "name", n.String())
	return []Change{{Name: n.String(), Result: resultFetched}}, nil
}
