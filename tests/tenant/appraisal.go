package tenant

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"reflect"
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
	return &s, nil
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
