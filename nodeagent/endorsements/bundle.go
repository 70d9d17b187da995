package endorsements

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

const (
	bundleVersion = 1
	// MaxBundle bounds a bundle in bytes: maxDocuments of their usual size.
	MaxBundle = 16 << 20
)

// bundle carries documents from one cache to another in one file.
type bundle struct {
	// Version is bundleVersion.
	Version   int           `json:"version"`
	CreatedAt time.Time     `json:"created_at"`
	Documents []bundleEntry `json:"documents"`
}

type bundleEntry struct {
	Name string `json:"name"`
	// SHA256 of Data in hex.
	SHA256 string `json:"sha256"`
	Data   []byte `json:"data"`
}

// Export returns everything in the cache that checks as one bundle.
func (p *Provider) Export() ([]byte, []Change, error) {
	found, strangers, err := p.cache.list()
	if err != nil {
		return nil, nil, err
	}
	b := bundle{Version: bundleVersion, CreatedAt: p.cfg.Now().UTC(), Documents: []bundleEntry{}}
	var changes []Change
	for _, s := range strangers {
		changes = append(changes, Change{s, resultLeftOut, "it is no document of this layout"})
	}
	for _, n := range found {
		data, err := p.cache.get(n)
		if err != nil {
			changes = append(changes, Change{n.String(), resultLeftOut, err.Error()})
			continue
		}
		sum := sha256.Sum256(data)
		b.Documents = append(b.Documents, bundleEntry{n.String(), hex.EncodeToString(sum[:]), data})
		changes = append(changes, Change{Name: n.String(), Result: resultExported})
	}
	raw, err := json.MarshalIndent(b, "", " ")
	if err == nil && len(raw) > MaxBundle {
		err = fmt.Errorf("it has %d bytes, the limit is %d", len(raw), MaxBundle)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("encoding bundle: %w", err)
	}
	return append(raw, '\n'), changes, nil
}

// Import takes a bundle over into the cache. Nothing is taken unless every
// document in it checks.
func (p *Provider) Import(ctx context.Context, raw []byte) ([]Change, error) {
	documents, err := parseBundle(raw)
	if err != nil {
		return nil, contract.Refuse("endorsements.bad-bundle", "export it again with nodeagent endorsements export, and copy it whole", "this is no bundle of endorsements").Because(err)
	}
	return p.take(ctx, documents)
}

// ImportVLEK takes over a VLEK as the operator has it from their cloud
// provider, DER, and its chain: ASVK and ARK, PEM.
func (p *Provider) ImportVLEK(ctx context.Context, vlek, chain []byte) ([]Change, error) {
	product, tcb, err := snp.ReadLeaf(vlek)
	if err != nil {
		return nil, contract.Refuse("endorsements.bad-vlek", "ask your cloud provider for the VLEK certificate of this machine's product line", "this is no VLEK certificate").Because(err)
	}
	asvk, ark, err := parseChain(chain)
	if err != nil {
		return nil, contract.Refuse("endorsements.bad-chain", "take the file cert_chain of the VLEK family from AMD's key service", "the chain is not an ASVK and an ARK").Because(err)
	}
	leaf := name{product: product, kind: kindLeaf, vlek: true, tcb: tcb}
	return p.take(ctx, map[name][]byte{leaf: vlek, leaf.sibling(kindIntermediate): asvk, leaf.sibling(kindARK): ark})
}

// take checks documents against each other and the cache, then keeps them in
// the order of their dependence.
func (p *Provider) take(ctx context.Context, documents map[name][]byte) ([]Change, error) {
	look := func(n name) ([]byte, error) {
		if data, ok := documents[n]; ok {
			return data, nil
		}
		return p.cache.raw(n)
	}
	order := slices.SortedFunc(maps.Keys(documents), name.compare)
	for _, n := range order {
		if err := p.cache.check(n, documents[n], look); err != nil {
			return nil, contract.Refuse("endorsements.import-refused", "take this document from AMD anew, or leave it out; compare this machine's clock",
				"%s does not check; nothing was imported", n).Because(err)
		}
	}
	var changes []Change
	for _, n := range order {
		result := resultImported
		if old, err := p.cache.raw(n); err == nil && bytes.Equal(old, documents[n]) {
			result = resultKept
		} else if taken, err := p.cache.put(ctx, n, documents[n]); err != nil {
			return changes, err
		} else if !taken {
			result = resultKept
		}
		changes = append(changes, Change{Name: n.String(), Result: result})
	}
	return changes, nil
}

// parseBundle decodes a bundle and compares digests; it verifies nothing.
func parseBundle(raw []byte) (map[name][]byte, error) {
	var b bundle
	if err := contract.UnmarshalStrict(raw, MaxBundle, &b); err != nil {
		return nil, err
	}
	if b.Version != bundleVersion {
		return nil, fmt.Errorf("version %d is not supported, this build knows %d", b.Version, bundleVersion)
	}
	if len(b.Documents) == 0 || len(b.Documents) > maxDocuments {
		return nil, fmt.Errorf("it has %d documents, not 1 to %d", len(b.Documents), maxDocuments)
	}
	documents := map[name][]byte{}
	for _, e := range b.Documents {
		n, err := parseName(e.Name)
		if err != nil {
			return nil, err
		}
		if _, twice := documents[n]; twice {
			return nil, fmt.Errorf("%s is there twice", n)
		}
		if sum := sha256.Sum256(e.Data); hex.EncodeToString(sum[:]) != e.SHA256 {
			return nil, fmt.Errorf("%s does not have its digest: it was changed on the way", n)
		}
		documents[n] = e.Data
	}
	return documents, nil
}
