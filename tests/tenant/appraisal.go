package tenant

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// IDBlockFiles are the publisher's pair, base64 as `nodeagent measure
// --id-block` prints it. Both or neither.
type IDBlockFiles struct{ Block, Auth string }

// signedLaunch is a verified pair.
type signedLaunch struct{ block, auth []byte }

// policy is the guest policy of the launch.
func (o *DeployOptions) policy() uint64 {
	if o.Appraisal.ForbidSMT {
		return guestPolicy &^ uint64(snp.PolicySMT)
	}
	return guestPolicy
}

// checkAppraisal refuses demands that cannot be read, or that no launch of
// this command could meet.
func (o *DeployOptions) checkAppraisal() error {
	if err := o.Appraisal.Demand(&snp.AppraisalPolicy{}); err != nil {
		return Usage("appraisal policy: %v", err)
	}
	if (o.IDBlock.Block == "") != (o.IDBlock.Auth == "") {
		return Usage("--id-block and --id-auth go together")
	}
	if o.IDBlock.Block == "" && (len(o.Appraisal.IDKeyDigests) > 0 || len(o.Appraisal.AuthorKeyDigests) > 0 || o.Appraisal.MinGuestSVN > 0) {
		return Usage("--id-key-digest, --author-key-digest and --min-guest-svn need --id-block and --id-auth: a guest without them has no key")
	}
	return nil
}

// appraisal is what the broker is given: nil when nothing is demanded.
func (o *DeployOptions) appraisal() *brokeradmin.AppraisalPolicy {
	if reflect.ValueOf(o.Appraisal).IsZero() {
		return nil
	}
	return &o.Appraisal
}

// idBlock reads the publisher's pair and holds it against launch and demands,
// before anything is sealed: the firmware would say no only at the very end.
func (o *DeployOptions) idBlock(digest string) (*signedLaunch, error) {
	if o.IDBlock.Block == "" {
		return &signedLaunch{}, nil
	}
	var s signedLaunch
	var err error
	if s.block, err = readBase64(o.IDBlock.Block); err != nil {
		return nil, err
	}
	if s.auth, err = readBase64(o.IDBlock.Auth); err != nil {
		return nil, err
	}
	const remedy = "sign this image, machine and policy: nodeagent measure --id-block, with --policy as the message says"
	pair, err := idblock.Verify(s.block, s.auth)
	if err != nil {
		return nil, contract.Refuse("tenant.id-block-malformed", remedy, "--id-block and --id-auth are no signed pair").Because(err)
	}
	if got := hex.EncodeToString(pair.Block.LaunchDigest[:]); got != digest {
		return nil, contract.Refuse("tenant.id-block-mismatch", remedy, "the ID block is for launch digest %s, this launch has %s", got, digest)
	}
	if pair.Block.Policy != o.policy() {
		return nil, contract.Refuse("tenant.id-block-mismatch", remedy, "the ID block is for guest policy %#x, this launch has %#x", pair.Block.Policy, o.policy())
	}
	return &s, o.meetsDemands(pair)
}

// meetsDemands holds a pair against what the broker will demand of the report.
func (o *DeployOptions) meetsDemands(pair *idblock.Signed) error {
	var demands snp.AppraisalPolicy
	if err := o.Appraisal.Demand(&demands); err != nil {
		return Usage("appraisal policy: %v", err)
	}
	among := func(digest [idblock.DigestSize]byte, accepted [][]byte) bool {
		return len(accepted) == 0 || slices.ContainsFunc(accepted, func(a []byte) bool { return bytes.Equal(a, digest[:]) })
	}
	const remedy = "use the publisher's current pair, or demand what this one has"
	switch {
	case !among(pair.IDKeyDigest, demands.IDKeys):
		return contract.Refuse("tenant.id-block-mismatch", remedy, "the ID block is signed by key %x, which --id-key-digest does not name", pair.IDKeyDigest)
	case len(demands.AuthorKeys) > 0 && !pair.HasAuthorKey:
		return contract.Refuse("tenant.id-block-mismatch", remedy, "no author key signed the ID key, and --author-key-digest demands one")
	case !among(pair.AuthorKeyDigest, demands.AuthorKeys):
		return contract.Refuse("tenant.id-block-mismatch", remedy, "the author key is %x, which --author-key-digest does not name", pair.AuthorKeyDigest)
	case pair.Block.GuestSVN < demands.MinGuestSVN:
		return contract.Refuse("tenant.id-block-mismatch", remedy, "the ID block has guest SVN %d, and --min-guest-svn demands %d", pair.Block.GuestSVN, demands.MinGuestSVN)
	}
	return nil
}

func readBase64(file string) ([]byte, error) {
	text, err := readSmall(file)
	if err != nil {
		return nil, fmt.Errorf("reading ID block: %w", err)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, Usage("%s is not base64", file)
	}
	return raw, nil
}
