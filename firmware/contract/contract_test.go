package contract_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

func manifest() *contract.Manifest {
	return &contract.Manifest{
		Version: 1, LaunchID: strings.Repeat("0a", 16), Image: "registry.example:5000/app@sha256:" + strings.Repeat("b", 64),
		Env: map[string]string{"A": "1"}, SecretEnv: map[string]string{"TOKEN": "kbs:///default/env/token"},
		Inputs:  []contract.Input{{Name: "model", SHA256: strings.Repeat("c", 64), Size: 7, Format: contract.FormatAge, Key: "kbs:///default/key/model"}},
		Results: []contract.Result{{Name: "out", Recipients: []string{"age1x"}}}, Ports: []int{8000},
		Broker:   contract.Endpoint{URL: "https://broker.example:9443", CAPEM: "pem"},
		Registry: contract.Endpoint{URL: "https://registry.example:5000", SPKISHA256: strings.Repeat("d", 64)},
	}
}

func TestManifestHasOneEncoding(t *testing.T) {
	t.Parallel()
	data, err := manifest().Encode()
	if err != nil {
		t.Fatal(err)
	}
	m, err := contract.ParseManifest(data)
	if err != nil {
		t.Fatal(err)
	}
	again, err := m.Encode()
	if err != nil || !bytes.Equal(again, data) {
		t.Errorf("encoding changes on the way: %v", err)
	}
	text := string(data)
	for name, bad := range map[string]string{
		"white space":   " " + text,
		"after the end": text + "\n",
		"unknown field": strings.Replace(text, `{`, `{"aaa":1,`, 1),
		"duplicate key": strings.Replace(text, `"version":1`, `"version":1,"version":1`, 1),
		"other case":    strings.Replace(text, `"version"`, `"Version"`, 1),
		"escaped":       strings.Replace(text, `"model"`, `"\u006dodel"`, 1),
		"nothing":       "",
		"too deep":      strings.Repeat("[", 20),
		"too large":     text + strings.Repeat(" ", contract.MaxManifestBytes),
	} {
		if _, err := contract.ParseManifest([]byte(bad)); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestEachRuleOfTheManifestRefuses(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*contract.Manifest){
		"version":               func(m *contract.Manifest) { m.Version = 2 },
		"launch id":             func(m *contract.Manifest) { m.LaunchID = strings.ToUpper(m.LaunchID) },
		"tag":                   func(m *contract.Manifest) { m.Image = "registry.example:5000/app:1" },
		"image elsewhere":       func(m *contract.Manifest) { m.Image = strings.Replace(m.Image, "registry", "other", 1) },
		"path in a name":        func(m *contract.Manifest) { m.Inputs[0].Name = "../x" },
		"hidden file":           func(m *contract.Manifest) { m.Results[0].Name = ".x" },
		"input twice":           func(m *contract.Manifest) { m.Inputs = append(m.Inputs, m.Inputs[0]) },
		"empty input":           func(m *contract.Manifest) { m.Inputs[0].Size = 0 },
		"gpg":                   func(m *contract.Manifest) { m.Inputs[0].Format = "gpg" },
		"key elsewhere":         func(m *contract.Manifest) { m.Inputs[0].Key = "https://x/y" },
		"no recipient":          func(m *contract.Manifest) { m.Results[0].Recipients = nil },
		"port out of range":     func(m *contract.Manifest) { m.Ports = []int{70000} },
		"port twice":            func(m *contract.Manifest) { m.Ports = []int{1, 1} },
		"plain broker":          func(m *contract.Manifest) { m.Broker.URL = "http://broker.example" },
		"unpinned broker":       func(m *contract.Manifest) { m.Broker.CAPEM = "" },
		"two pins":              func(m *contract.Manifest) { m.Registry.CAPEM = "pem" },
		"user in a URL":         func(m *contract.Manifest) { m.Broker.URL = "https://u@broker.example" },
		"variable name":         func(m *contract.Manifest) { m.Env["A=B"] = "x" },
		"plain and secret":      func(m *contract.Manifest) { m.Env["TOKEN"] = "x" },
		"nine GPUs":             func(m *contract.Manifest) { m.GPU = &contract.GPU{Model: "H100", Count: 9} },
		"NUL in a plain value":  func(m *contract.Manifest) { m.Env["A"] = "x\x00" },
		"more inputs than vdas": func(m *contract.Manifest) { m.Inputs = make([]contract.Input, 17) },
	} {
		m := manifest()
		change(m)
		if _, err := m.Encode(); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// The vector is CoCo's: SHA-384 over RFC 8785 JSON.
func TestCanonicalJSONIsWhatTheKeyBrokerProtocolHashes(t *testing.T) {
	t.Parallel()
	doc, err := contract.Canonical(map[string]any{"c": map[string]any{"d": "e"}, "b": 1, "a": "test"})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha512.Sum384(doc)
	if hex.EncodeToString(sum[:]) != "e71ce8e70d814ba6639c3612ebee0ff1f76f650f8dbb5e47157e0f3f525cd22c4597480a186427c813ca941da78870c3" {
		t.Errorf("%s hashes to %x", doc, sum)
	}
	got, err := contract.BrokerReportData("", "n", json.RawMessage(`{"kty":"EC", "crv":"P-256"}`))
	want := sha512.Sum384([]byte(`{"additional-evidence":"","nonce":"n","tee-pubkey":{"crv":"P-256","kty":"EC"}}`))
	if err != nil || !bytes.Equal(got[:48], want[:]) || !bytes.Equal(got[48:], make([]byte, 16)) {
		t.Errorf("report data is %x, %v", got, err)
	}
}

func TestEvidenceReportDataBindsEveryPart(t *testing.T) {
	t.Parallel()
	base := contract.EvidenceReportData([]byte("nonce"), []byte("spki"), []byte("key"), nil)
	for name, other := range map[string][contract.ReportDataSize]byte{
		"nonce": contract.EvidenceReportData([]byte("noncf"), []byte("spki"), []byte("key"), nil),
		"spki":  contract.EvidenceReportData([]byte("nonce"), []byte("spkj"), []byte("key"), nil),
		"key":   contract.EvidenceReportData([]byte("nonce"), []byte("spki"), []byte("kez"), nil),
		"gpu":   contract.EvidenceReportData([]byte("nonce"), []byte("spki"), []byte("key"), []byte("g")),
		"shift": contract.EvidenceReportData([]byte("nonces"), []byte("pki"), []byte("key"), nil),
	} {
		if other == base {
			t.Errorf("%s is not bound", name)
		}
	}
}

func TestEnvelopesOpenOnlyForTheSignersKeyAndType(t *testing.T) {
	t.Parallel()
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	const kind = "application/x"
	sealed, err := contract.SealEnvelope(kind, []byte("payload"), priv)
	if err != nil {
		t.Fatal(err)
	}
	keys := []ed25519.PublicKey{other, pub}
	if got, err := contract.OpenEnvelope(sealed, kind, 1<<10, keys); err != nil || string(got) != "payload" {
		t.Errorf("%q %v", got, err)
	}
	changed := bytes.Replace(sealed, []byte(base64.StdEncoding.EncodeToString([]byte("payload"))), []byte(base64.StdEncoding.EncodeToString([]byte("payloae"))), 1)
	if _, err := contract.OpenEnvelope(changed, kind, 1<<10, keys); !errors.Is(err, contract.ErrUnsigned) {
		t.Errorf("changed payload: %v", err)
	}
	if _, err := contract.OpenEnvelope(sealed, kind, 1<<10, keys[:1]); !errors.Is(err, contract.ErrUnsigned) {
		t.Errorf("another key: %v", err)
	}
	if _, err := contract.OpenEnvelope(sealed, kind+"y", 1<<10, keys); !errors.Is(err, contract.ErrEnvelope) {
		t.Errorf("another type: %v", err)
	}
	if _, err := contract.OpenEnvelope(sealed, kind, 10, keys); !errors.Is(err, contract.ErrEnvelope) {
		t.Errorf("oversize: %v", err)
	}
}

func TestResultsOpenOnlyUnderTheAttestedKey(t *testing.T) {
	t.Parallel()
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	m := &contract.ResultManifest{Version: 1, LaunchID: strings.Repeat("0a", 16), Results: []contract.ResultEntry{{Name: "out", SHA256: strings.Repeat("a", 64), Size: 3}}}
	data, err := contract.SealResults(m, priv)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := contract.OpenResults(data, pub); err != nil || got.Results[0] != m.Results[0] {
		t.Errorf("%+v %v", got, err)
	}
	_, hosts, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := contract.SealResults(m, hosts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := contract.OpenResults(forged, pub); err == nil {
		t.Error("results signed by the host are accepted")
	}
	m.Results[0].Name = "../out"
	if data, err = contract.SealResults(m, priv); err != nil {
		t.Fatal(err)
	}
	if _, err := contract.OpenResults(data, pub); err == nil {
		t.Error("a path in a result's name is accepted")
	}
}

func TestRefusalsHideTheirCauseFromTheWire(t *testing.T) {
	t.Parallel()
	cause := errors.New("secret path")
	r := contract.Refuse("a.b", "do this", "no %d", 1).Because(cause)
	raw, err := json.Marshal(r)
	if err != nil || strings.Contains(string(raw), "secret") || !errors.Is(r, cause) {
		t.Errorf("%s %v", raw, err)
	}
	if got := contract.AsRefusal(cause); got.Code != "internal" || strings.Contains(got.Message, "secret") || got.Remedy == "" {
		t.Errorf("%+v", got)
	}
}
