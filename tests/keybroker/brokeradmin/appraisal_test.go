package brokeradmin

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

func TestDemandsMakeAPolicyStricterAndNeverLooser(t *testing.T) {
	t.Parallel()
	one, two := bytes.Repeat([]byte{1}, 48), bytes.Repeat([]byte{2}, 48)
	x := snp.AppraisalPolicy{
		ForbidSMT: true, RequireCRL: true, MinGuestSVN: 9, Platform: snp.PlatformECC, IDKeys: [][]byte{one, two},
		Floors: []snp.Floor{{Family: 0x19}},
	}
	if err := (*AppraisalPolicy)(nil).Demand(&x); err != nil {
		t.Fatal(err)
	}
	a := AppraisalPolicy{MinGuestSVN: 3, Platform: "tsme", Floors: []string{"1a/2:snp=4"}, IDKeyDigests: []string{strings.Repeat("02", 48), strings.Repeat("03", 48)}}
	if err := a.Demand(&x); err != nil {
		t.Fatal(err)
	}
	if !x.ForbidSMT || !x.RequireCRL || x.MinGuestSVN != 9 || x.Platform != snp.PlatformECC|snp.PlatformTSME || len(x.Floors) != 2 {
		t.Errorf("%+v", x)
	}
	if !slices.EqualFunc(x.IDKeys, [][]byte{two}, bytes.Equal) {
		t.Errorf("ID keys %x", x.IDKeys)
	}
	if err := a.Demand(&snp.AppraisalPolicy{IDKeys: [][]byte{one}}); err == nil {
		t.Error("no key satisfies both, and that is no error")
	}
}

// What can be read has made the policy what it says; what cannot is an error.
func FuzzDemand(f *testing.F) {
	f.Add([]byte(`{"floors":["19/10-1f:snp=27,microcode=86,mitigations=0x7"],"forbid_smt":true,"require_crl":true,"platform":"ecc,tsme","exclude_products":["milan"]}`))
	f.Add([]byte(`{"id_key_digests":["` + strings.Repeat("0d", 48) + `"],"min_guest_svn":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var a AppraisalPolicy
		if contract.UnmarshalStrict(data, MaxLaunchBytes, &a) != nil {
			return
		}
		var x snp.AppraisalPolicy
		if a.Demand(&x) != nil {
			return
		}
		if len(x.Floors) != len(a.Floors) || len(x.IDKeys) != len(a.IDKeyDigests) || len(x.AuthorKeys) != len(a.AuthorKeyDigests) ||
			x.ForbidSMT != a.ForbidSMT || x.RequireCRL != a.RequireCRL || x.MinGuestSVN != a.MinGuestSVN || (x.Platform == 0) != (a.Platform == "") {
			t.Errorf("%s demands %+v", data, x)
		}
	})
}
