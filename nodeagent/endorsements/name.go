package endorsements

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// kind of a document, in the order in which documents depend on each other.
type kind int

const (
	kindARK kind = iota
	kindIntermediate
	kindCRL
	kindLeaf
)

// Families of keys, as in the paths of AMD's key service.
const (
	familyVCEK = "vcek"
	familyVLEK = "vlek"
)

// name says which document one is. Its string form is unique: it is the path
// in the cache and the key in a bundle.
type name struct {
	product snp.Product
	kind    kind
	// vlek tells the families apart; false for the ARK.
	vlek bool
	// hwid of a VCEK in hex, and tcb of any leaf.
	hwid string
	tcb  contract.TCB
}

// names of everything that stands behind the reports of a platform.
type names struct{ ark, intermediate, crl, leaf name }

func namesFor(id Identity) names {
	of := func(k kind) name { return name{product: id.Product, kind: k, vlek: id.VLEK} }
	n := names{name{product: id.Product, kind: kindARK}, of(kindIntermediate), of(kindCRL), of(kindLeaf)}
	n.leaf.tcb = id.TCB
	if !id.VLEK {
		n.leaf.hwid = hex.EncodeToString(id.HWID)
	}
	return n
}

func (n name) family() string {
	if n.vlek {
		return familyVLEK
	}
	return familyVCEK
}

func (n name) String() string {
	parts := []string{n.product.Name, n.family()}
	switch n.kind {
	case kindARK:
		return n.product.Name + "/ark.der"
	case kindIntermediate:
		parts = append(parts, "ask.der")
	case kindCRL:
		parts = append(parts, "crl.der")
	case kindLeaf:
		if !n.vlek {
			parts = append(parts, n.hwid)
		}
		parts = append(parts, fmt.Sprintf("%016x.der", n.product.EncodeTCB(n.tcb)))
	}
	return strings.Join(parts, "/")
}

// sibling is another document of the same product and family.
func (n name) sibling(k kind) name {
	return name{product: n.product, kind: k, vlek: n.vlek && k != kindARK}
}

// parseName is the inverse of String, and refuses everything else.
func parseName(text string) (name, error) {
	parts := strings.Split(text, "/")
	product, err := snp.ProductByName(parts[0])
	if err != nil || len(parts) < 2 || len(parts) > 4 {
		return name{}, fmt.Errorf("%q is no document of this layout", text)
	}
	n := name{product: product, vlek: parts[1] == familyVLEK}
	switch last := parts[len(parts)-1]; last {
	case "ark.der":
	case "ask.der":
		n.kind = kindIntermediate
	case "crl.der":
		n.kind = kindCRL
	default:
		n.kind = kindLeaf
		raw, err := strconv.ParseUint(strings.TrimSuffix(last, ".der"), 16, 64)
		if err != nil {
			return name{}, fmt.Errorf("%q is no document of this layout", text)
		}
		n.tcb = product.TCB(raw)
		if len(parts) == 4 {
			n.hwid = parts[2]
			id, err := n.identity()
			if err != nil {
				return name{}, fmt.Errorf("%q is no document of this layout: %w", text, err)
			}
			n.hwid = hex.EncodeToString(id.HWID)
		}
	}
	if n.String() != text { // another spelling, family, depth, or reserved bits of the TCB
		return name{}, fmt.Errorf("%q is no document of this layout", text)
	}
	return n, nil
}

// identity of the chip whose VCEK is meant.
func (n name) identity() (snp.Identity, error) {
	raw, err := hex.DecodeString(n.hwid)
	if err != nil {
		return snp.Identity{}, err
	}
	return snp.NewIdentity(n.product.Name, raw, n.tcb)
}

// compare orders documents so that each comes after those it depends on.
func (n name) compare(o name) int {
	return cmp.Or(cmp.Compare(n.kind, o.kind), cmp.Compare(n.String(), o.String()))
}
