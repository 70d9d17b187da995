package keybroker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// The protocol this broker speaks.
const (
	protocolVersion = "0.4.0"
	teeSNP          = "snp"
	keyAlgorithm    = "ECDH-ES+A256KW"
	sessionCookie   = "kbs-session-id"
)

// Body limits. An attestation carries one report, a manifest and three
// certificates; all four have limits of their own.
const (
	maxAuthBytes   = 4 << 10
	maxAttestBytes = 512 << 10
)

const protocolRemedy = "use a guest image whose broker client speaks CoCo KBS protocol 0.4.0 with SEV-SNP"

type authRequest struct {
	Version     string          `json:"version"`
	TEE         string          `json:"tee"`
	ExtraParams json.RawMessage `json:"extra-params"`
}

type challenge struct {
	Nonce       string `json:"nonce"`
	ExtraParams string `json:"extra-params"`
}

type attestRequest struct {
	InitData    json.RawMessage `json:"init-data"`
	RuntimeData struct {
		Nonce     string          `json:"nonce"`
		TEEPubKey json.RawMessage `json:"tee-pubkey"`
	} `json:"runtime-data"`
	TEEEvidence struct {
		Primary    json.RawMessage `json:"primary_evidence"`
		Additional string          `json:"additional_evidence"`
	} `json:"tee-evidence"`
}

type tokenResponse struct {
	Token string `json:"token"`
}

// parseAuth decodes the first message.
func parseAuth(data []byte) *contract.Refusal {
	var r authRequest
	if err := contract.UnmarshalStrict(data, maxAuthBytes, &r); err != nil {
		return contract.Refuse("broker.request-malformed", protocolRemedy, "the auth request is malformed").Because(err)
	}
	if r.Version != protocolVersion {
		return contract.Refuse("broker.version-unsupported", protocolRemedy,
			"the client speaks protocol %.20q, this broker speaks %s", r.Version, protocolVersion)
	}
	if r.TEE != teeSNP {
		return contract.Refuse("broker.tee-unsupported", protocolRemedy, "the client's TEE is %.20q, this broker verifies %q only", r.TEE, teeSNP)
	}
	return nil
}

// attestation is the decoded attest request. Nothing in it is believed yet.
type attestation struct {
	nonce     string
	rawKey    json.RawMessage
	key       *ecdsa.PublicKey
	evidence  contract.BrokerEvidence
	manifest  *contract.Manifest
	additions string
}

// parseAttest decodes the attestation with everything it contains.
func parseAttest(data []byte) (*attestation, *contract.Refusal) {
	malformed := func(what string, err error) *contract.Refusal {
		return contract.Refuse("broker.request-malformed", protocolRemedy, "the attest request's %s is malformed", what).Because(err)
	}
	var r attestRequest
	if err := contract.UnmarshalStrict(data, maxAttestBytes, &r); err != nil {
		return nil, malformed("body", err)
	}
	if len(r.InitData) > 0 && string(r.InitData) != "null" {
		return nil, contract.Refuse("broker.init-data-unsupported", "bind configuration with the manifest, whose digest is HOST_DATA, and send no init-data",
			"the attest request carries init-data, which this broker does not evaluate")
	}
	a := &attestation{nonce: r.RuntimeData.Nonce, rawKey: r.RuntimeData.TEEPubKey, additions: r.TEEEvidence.Additional}
	var err error
	if a.key, err = parseKey(a.rawKey); err != nil {
		return nil, contract.Refuse("broker.key-unsupported", "send an EC P-256 JWK with alg "+keyAlgorithm,
			"the tee-pubkey is not a usable key").Because(err)
	}
	if err := contract.UnmarshalStrict(r.TEEEvidence.Primary, maxAttestBytes, &a.evidence); err != nil {
		return nil, malformed("primary_evidence", err)
	}
	if a.manifest, err = contract.ParseManifest(a.evidence.Manifest); err != nil {
		return nil, contract.Refuse("broker.manifest-malformed", "send the manifest exactly as the tenant wrote it",
			"the manifest in the evidence is not a valid canonical manifest").Because(err)
	}
	return a, nil
}

// parseKey decodes the guest's EC P-256 JWK. A private part, another curve or
// algorithm, and a point off the curve are refused.
func parseKey(raw json.RawMessage) (*ecdsa.PublicKey, error) {
	var k struct {
		Kty string `json:"kty"`
		Crv string `json:"crv"`
		Alg string `json:"alg"`
		X   string `json:"x"`
		Y   string `json:"y"`
	}
	if err := contract.UnmarshalStrict(raw, 1024, &k); err != nil {
		return nil, err
	}
	if k.Kty != "EC" || k.Crv != "P-256" || k.Alg != keyAlgorithm {
		return nil, errors.New("JWK is not EC P-256 for " + keyAlgorithm)
	}
	x, errX := base64.RawURLEncoding.Strict().DecodeString(k.X)
	y, errY := base64.RawURLEncoding.Strict().DecodeString(k.Y)
	if errX != nil || errY != nil || len(x) != 32 || len(y) != 32 {
		return nil, errors.New("JWK coordinates are not 32 bytes of base64url")
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
	if err != nil {
		return nil, err
	}
	return key, nil
}

// parseResourcePath decodes repository/type/tag.
func parseResourcePath(path string) (contract.Resource, *contract.Refusal) {
	r, err := contract.ParseResource("kbs:///" + strings.TrimPrefix(path, "/"))
	if err != nil {
		return r, contract.Refuse("broker.resource-malformed", "ask for /kbs/v0/resource/repository/type/tag",
			"the path does not name a resource")
	}
	return r, nil
}
