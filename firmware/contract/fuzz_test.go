package contract_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

// fuzzKey is fixed, so that seeds stay the same.
func fuzzKey() ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
}

func FuzzParseManifest(f *testing.F) {
	data, err := manifest().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"version":1}`))
	f.Add(bytes.Replace(data, []byte("version"), []byte("Version"), 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := contract.ParseManifest(data)
		if err != nil {
			return
		}
		if again, err := m.Encode(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("two encodings of one manifest: %q and %q (%v)", data, again, err)
		}
		if len(m.Inputs) > contract.MaxInputs || len(data) > contract.MaxManifestBytes {
			t.Errorf("limits are not kept: %q", data)
		}
	})
}

func FuzzUnmarshalStrict(f *testing.F) {
	for _, seed := range []string{
		`{"a":1,"b":{"a":[1,2,{"a":null}]}}`, `{"a":1,"a":2}`, `[[[[[]]]]]`, `1 2`, `"\ud800"`, "\"\xff\"", `{"a":1}}`, ``, `nul`, `{"a"`,
		strings.Repeat("[", 17) + strings.Repeat("]", 17), strings.Repeat(`{"a":`, 17) + "1" + strings.Repeat("}", 17),
	} {
		f.Add([]byte(seed))
	}
	const limit = 1 << 12
	f.Fuzz(func(t *testing.T, data []byte) {
		var v any
		if err := contract.UnmarshalStrict(data, limit, &v); err != nil {
			return
		}
		if len(data) > limit || !json.Valid(data) {
			t.Errorf("accepted %q", data)
		}
		if depth(v) > 16 {
			t.Errorf("nested deeper than the limit: %q", data)
		}
	})
}

func depth(v any) int {
	deepest := 0
	switch v := v.(type) {
	case map[string]any:
		for _, e := range v {
			deepest = max(deepest, depth(e))
		}
	case []any:
		for _, e := range v {
			deepest = max(deepest, depth(e))
		}
	default:
		return 0
	}
	return deepest + 1
}

func FuzzOpenEnvelope(f *testing.F) {
	key := fuzzKey()
	const kind = "application/x"
	sealed, err := contract.SealEnvelope(kind, []byte("payload"), key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Add([]byte(`{"payloadType":"application/x","payload":"","signatures":[{"keyid":"","sig":""}]}`))
	f.Add([]byte(`{"payloadType":"application/x","payload":"eA==","signatures":[]}`))
	pub, _ := key.Public().(ed25519.PublicKey)
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := contract.OpenEnvelope(data, kind, 1<<16, nil); err == nil {
			t.Errorf("opens without a key: %q", data)
		}
		payload, err := contract.OpenEnvelope(data, kind, 1<<16, []ed25519.PublicKey{pub})
		if err == nil && string(payload) != "payload" {
			t.Errorf("opens with a payload nobody signed: %q", data)
		}
		if err != nil && payload != nil {
			t.Errorf("payload and an error: %q", data)
		}
	})
}

func FuzzOpenResults(f *testing.F) {
	key := fuzzKey()
	m := resultManifest()
	sealed, err := contract.SealResults(m, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed, []byte(nil))
	f.Add([]byte(nil), []byte(`{"exit_code":0,"launch_id":"0a","results":[],"version":1}`))
	pub, _ := key.Public().(ed25519.PublicKey)
	f.Fuzz(func(t *testing.T, data, payload []byte) {
		if got, err := contract.OpenResults(data, pub); err == nil && got.LaunchID != m.LaunchID {
			t.Errorf("opens with results nobody signed: %q", data)
		}
		// A guest that lies is signed too: the list must still be well formed.
		signed, err := contract.SealEnvelope(contract.ResultsPayloadType, payload, key)
		if err != nil {
			t.Fatal(err)
		}
		got, err := contract.OpenResults(signed, pub)
		if err != nil {
			return
		}
		for _, r := range got.Results {
			if !contract.ValidFileName(r.Name) || r.Size < 0 {
				t.Errorf("entry %+v is accepted", r)
			}
		}
	})
}

func FuzzParseEvidence(f *testing.F) {
	full, err := json.Marshal(evidence())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	f.Add([]byte(`{"version":1,"nonce":"AAAAAAAAAAAAAAAAAAAAAA=="}`))
	f.Add([]byte(`{"version":1,"nonce":null,"report":3}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := contract.ParseEvidence(data)
		if err != nil {
			return
		}
		if len(data) > contract.MaxEvidenceBytes || len(e.Nonce) < contract.MinNonceBytes || len(e.Nonce) > contract.MaxNonceBytes {
			t.Errorf("limits are not kept: %q", data)
		}
		again, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := contract.ParseEvidence(again); err != nil && len(again) <= contract.MaxEvidenceBytes {
			t.Errorf("evidence cannot be passed on: %v", err)
		}
	})
}

func FuzzParseImageDescription(f *testing.F) {
	full, err := json.Marshal(imageDescription())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	f.Add([]byte(`{"version":1,"variant":"production"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := contract.ParseImageDescription(data)
		if err != nil {
			return
		}
		for _, file := range []contract.ImageFile{d.Firmware, d.Kernel, d.Initrd} {
			if strings.ContainsAny(file.File, "/") || file.Size <= 0 || len(file.SHA256) != 64 {
				t.Errorf("component %+v is accepted", file)
			}
		}
	})
}

func FuzzParseTCB(f *testing.F) {
	f.Add("snp=27,microcode=86")
	f.Add("fmc=0x10, boot-loader=1 tee=255")
	f.Add("snp=27,snp=28")
	f.Fuzz(func(t *testing.T, text string) {
		tcb, err := contract.ParseTCB(text)
		if err != nil {
			return
		}
		if again, err := contract.ParseTCB(tcb.String()); err != nil || again != tcb {
			t.Errorf("%q is %v, read again %v (%v)", text, tcb, again, err)
		}
	})
}

// A reference comes apart in one way only: put together again it is the same.
func FuzzReferences(f *testing.F) {
	f.Add("registry.example:5000/team/app@sha256:" + strings.Repeat("ab", 32))
	f.Add("kbs:///job/age/data")
	f.Add("kbs:///../age/data")
	f.Fuzz(func(t *testing.T, text string) {
		if host, repository, digest, err := contract.SplitImage(text); err == nil && host+"/"+repository+"@"+digest != text {
			t.Errorf("image %q comes apart as %q %q %q", text, host, repository, digest)
		}
		if r, err := contract.ParseResource(text); err == nil && (r.String() != text || strings.Contains(text, "/../")) {
			t.Errorf("resource %q comes apart as %+v", text, r)
		}
	})
}
