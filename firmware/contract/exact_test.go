package contract_test

import (
	"crypto/ed25519"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

func TestFieldNamesMustBeExact(t *testing.T) {
	t.Parallel()
	type inner struct {
		A int `json:"a"`
	}
	type outer struct {
		Nonce string           `json:"nonce"`
		List  []inner          `json:"list"`
		Map   map[string]inner `json:"map"`
		Ptr   *inner           `json:"ptr"`
	}
	for _, bad := range []string{
		`{"Nonce":"x"}`, `{"nonce":"x","Nonce":"y"}`, `{"list":[{"A":1}]}`, `{"map":{"K":{"A":1}}}`, `{"ptr":{"A":1}}`,
	} {
		var v outer
		if err := contract.UnmarshalStrict([]byte(bad), 1<<10, &v); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
	var v outer
	good := `{"nonce":"x","list":[{"a":1}],"map":{"K":{"a":1},"k":{"a":2}},"ptr":{"a":1}}`
	if err := contract.UnmarshalStrict([]byte(good), 1<<10, &v); err != nil || len(v.Map) != 2 {
		t.Errorf("%+v %v", v, err)
	}
}

func TestKeysOfAnotherSizeAreRefusedNotPanickedOn(t *testing.T) {
	t.Parallel()
	if _, err := contract.SealEnvelope("t", nil, ed25519.PrivateKey("short")); err == nil {
		t.Error("a short key signs")
	}
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := contract.SealEnvelope("t", []byte("p"), priv)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := contract.OpenEnvelope(sealed, "t", 1<<10, []ed25519.PublicKey{pub[:31], pub}); err != nil {
		t.Error(err)
	}
}
