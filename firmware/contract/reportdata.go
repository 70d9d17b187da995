package contract

import (
	"crypto/sha512"
	"encoding/binary"
	"encoding/json"
	"fmt"
)

// ReportDataSize is the size of REPORT_DATA (AMD 56860, MSG_REPORT_REQ).
const ReportDataSize = 64

// BrokerReportData is REPORT_DATA for the key broker, as CoCo KBS protocol
// 0.4.0 computes it: SHA-384 over the RFC 8785 JSON of
// {"additional-evidence","nonce","tee-pubkey"}, then 16 zero bytes.
// additional is "" when there is no further evidence; teePubKey is the JWK
// exactly as sent.
func BrokerReportData(additional, nonce string, teePubKey json.RawMessage) ([ReportDataSize]byte, error) {
	doc, err := Canonical(struct {
		AdditionalEvidence string          `json:"additional-evidence"`
		Nonce              string          `json:"nonce"`
		TEEPubKey          json.RawMessage `json:"tee-pubkey"`
	}{additional, nonce, teePubKey})
	if err != nil {
		return [ReportDataSize]byte{}, fmt.Errorf("computing broker report data: %w", err)
	}
	var out [ReportDataSize]byte
	sum := sha512.Sum384(doc)
	copy(out[:], sum[:])
	return out, nil
}

// evidenceLabel separates this use of REPORT_DATA from every other.
const evidenceLabel = "nodeagent evidence v1"

// EvidenceReportData is REPORT_DATA for a verifier's challenge: SHA-512 over
// the label, then nonce, TLS SubjectPublicKeyInfo (DER), Ed25519 result key
// and SHA-384 of the GPU evidence (empty when there is none), each preceded by
// its length as a big-endian uint32.
func EvidenceReportData(nonce, tlsSPKI, resultKey, gpuEvidence []byte) [ReportDataSize]byte {
	var gpu []byte
	if len(gpuEvidence) > 0 {
		sum := sha512.Sum384(gpuEvidence)
		gpu = sum[:]
	}
	h := sha512.New()
	for _, part := range [][]byte{[]byte(evidenceLabel), nonce, tlsSPKI, resultKey, gpu} {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(part)))
		h.Write(n[:])
		h.Write(part)
	}
	return [ReportDataSize]byte(h.Sum(nil))
}
