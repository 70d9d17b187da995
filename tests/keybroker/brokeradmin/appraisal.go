package brokeradmin

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/idblock"
)

// maxDemands bounds each list of an AppraisalPolicy.
const maxDemands = 16

// AppraisalPolicy is what a tenant may demand of platform and launch beside
// the floor, in the form it is written down in. It is no policy of its own: it
// makes a snp.AppraisalPolicy stricter, and never looser.
type AppraisalPolicy struct {
	// Floors by kind of processor, as snp.ParseFloor reads them.
	Floors []string `json:"floors,omitempty"`
	// ForbidSMT refuses guests and platforms with SMT.
	ForbidSMT bool `json:"forbid_smt,omitempty"`
	// RequireCRL fails evidence without a revocation list.
	RequireCRL bool `json:"require_crl,omitempty"`
	// Platform are facts it must state, as snp.ParsePlatformInfo reads them.
	Platform string `json:"platform,omitempty"`
	// ExcludeProducts are processor lines to refuse.
	ExcludeProducts []string `json:"exclude_products,omitempty"`
	// IDKeyDigests and AuthorKeyDigests, 96 hex digits each, are of the keys
	// one of which must have signed the guest's ID block.
	IDKeyDigests     []string `json:"id_key_digests,omitempty"`
	AuthorKeyDigests []string `json:"author_key_digests,omitempty"`
	// MinGuestSVN is the lowest in the ID block.
	MinGuestSVN uint32 `json:"min_guest_svn,omitempty"`
}

// Demand adds the demands to x. It fails, naming the field, on what cannot be
// read. A nil policy demands nothing.
func (a *AppraisalPolicy) Demand(x *snp.AppraisalPolicy) error {
	if a == nil {
		return nil
	}
	for name, n := range map[string]int{
		"floors": len(a.Floors), "exclude_products": len(a.ExcludeProducts), "id_key_digests": len(a.IDKeyDigests), "author_key_digests": len(a.AuthorKeyDigests),
	} {
		if n > maxDemands {
			return fmt.Errorf("%s: at most %d", name, maxDemands)
		}
	}
	for _, text := range a.Floors {
		f, err := snp.ParseFloor(text)
		if err != nil {
			return fmt.Errorf("floors: %w", err)
		}
		x.Floors = append(x.Floors, f)
	}
	products, err := snp.ParseProducts(a.ExcludeProducts)
	if err != nil {
		return fmt.Errorf("exclude_products: %w", err)
	}
	x.Exclude = append(x.Exclude, products...)
	if a.Platform != "" {
		facts, err := snp.ParsePlatformInfo(a.Platform)
		if err != nil {
			return fmt.Errorf("platform: %w", err)
		}
		x.Platform |= facts
	}
	if x.IDKeys, err = narrow(x.IDKeys, a.IDKeyDigests); err != nil {
		return fmt.Errorf("id_key_digests: %w", err)
	}
	if x.AuthorKeys, err = narrow(x.AuthorKeys, a.AuthorKeyDigests); err != nil {
		return fmt.Errorf("author_key_digests: %w", err)
	}
	x.ForbidSMT, x.RequireCRL = x.ForbidSMT || a.ForbidSMT, x.RequireCRL || a.RequireCRL
	x.MinGuestSVN = max(x.MinGuestSVN, a.MinGuestSVN)
	return nil
}

// narrow keeps of the accepted keys those that are demanded as well; an empty
// list accepts any.
func narrow(accepted [][]byte, demanded []string) ([][]byte, error) {
	if len(demanded) == 0 {
		return accepted, nil
	}
	var out [][]byte
	for _, text := range demanded {
		raw, err := hex.DecodeString(text)
		if err != nil || len(raw) != idblock.DigestSize {
			return nil, fmt.Errorf("%.100q is not %d hex digits", text, 2*idblock.DigestSize)
		}
		if len(accepted) == 0 || slices.ContainsFunc(accepted, func(key []byte) bool { return bytes.Equal(key, raw) }) {
			out = append(out, raw)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("none of them is among the keys accepted already")
	}
	return out, nil
}
