package endorsements

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/snp"
)

// maxDocument bounds every document. AMD's have 1 to 6 KiB, and an evidence
// bundle must hold four of them in 512 KiB.
const maxDocument = 64 << 10

// errWrongRoot means that a root is not the pinned one.
var errWrongRoot = errors.New("the root is not the pinned ARK of its product line")

// checker judges documents by the pinned roots.
type checker struct {
	roots map[string]*x509.Certificate
	now   func() time.Time
}

// check says why data may not be kept under a name. It gets what the document
// depends on through look.
func (c *checker) check(n name, data []byte, look func(name) ([]byte, error)) error {
	if len(data) > maxDocument {
		return fmt.Errorf("it has %d bytes, the limit is %d", len(data), maxDocument)
	}
	root := c.roots[n.product.Name]
	if root == nil {
		return fmt.Errorf("no root is pinned for %s", n.product.Name)
	}
	switch n.kind {
	case kindARK:
		if !bytes.Equal(data, root.Raw) {
			return errWrongRoot
		}
		return nil
	case kindIntermediate:
		return snp.CheckIntermediate(data, n.vlek, root, c.now())
	case kindCRL:
		crl, err := snp.ParseCRL(data, root)
		if err == nil && crl.ThisUpdate.After(c.now().Add(clockSkew)) {
			err = fmt.Errorf("it is from the future (%s); compare this machine's clock", crl.ThisUpdate.Format(time.RFC3339))
		}
		return err
	case kindLeaf:
		intermediate, err := look(n.sibling(kindIntermediate))
		if err != nil {
			return fmt.Errorf("its issuer is not there: %w", err)
		}
		if n.vlek {
			return snp.CheckVLEK(data, intermediate, root, n.product, n.tcb, c.now())
		}
		id, err := n.identity()
		if err != nil {
			return err
		}
		return snp.CheckVCEK(data, intermediate, root, id, c.now())
	}
	return fmt.Errorf("kind %d is not known", n.kind)
}

// clockSkew is how far AMD's clock may be ahead of ours.
const clockSkew = 5 * time.Minute

// validity returns from when until when a document counts; the check of its
// contents is not repeated.
func validity(n name, data []byte) (from, until time.Time, err error) {
	if n.kind == kindCRL {
		crl, err := x509.ParseRevocationList(data)
		if err != nil {
			return from, until, err
		}
		return crl.ThisUpdate, crl.NextUpdate, nil
	}
	cert, err := x509.ParseCertificate(data)
	if err != nil {
		return from, until, err
	}
	return cert.NotBefore, cert.NotAfter, nil
}
