package contract

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
)

// ResultsPayloadType is the DSSE payload type of a signed result manifest.
const ResultsPayloadType = "application/vnd.nodeagent.results.v1+json"

// ResultsVersion is the version of ResultManifest.
const ResultsVersion = 1

// MaxResultManifestBytes bounds the signed envelope.
const MaxResultManifestBytes = 64 << 10

// ResultsManifestName is the object name the signed result manifest is
// uploaded under, beside the sealed results.
const ResultsManifestName = "results.dsse.json"

// ResultManifest lists what a guest produced. It is signed with the key bound
// in REPORT_DATA; a tenant accepts nothing else.
type ResultManifest struct {
	// Version is ResultsVersion.
	Version  int    `json:"version"`
	LaunchID string `json:"launch_id"`
	// ExitCode is the workload's exit status; 128+n when signal n ended it.
	ExitCode int           `json:"exit_code"`
	Results  []ResultEntry `json:"results"`
}

// ResultEntry is one sealed result.
type ResultEntry struct {
	Name string `json:"name"`
	// SHA256 and Size are the ciphertext's.
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"`
}

// SealResults signs m.
func SealResults(m *ResultManifest, key ed25519.PrivateKey) ([]byte, error) {
	payload, err := Canonical(m)
	if err != nil {
		return nil, err
	}
	return SealEnvelope(ResultsPayloadType, payload, key)
}

// OpenResults verifies a signed result manifest under the key that the
// evidence of the same launch binds.
func OpenResults(data []byte, key ed25519.PublicKey) (*ResultManifest, error) {
	payload, err := OpenEnvelope(data, ResultsPayloadType, MaxResultManifestBytes, []ed25519.PublicKey{key})
	if err != nil {
		return nil, fmt.Errorf("opening result manifest: %w", err)
	}
	var m ResultManifest
	if err := unmarshalCanonical(payload, MaxResultManifestBytes, &m); err != nil {
		return nil, fmt.Errorf("opening result manifest: %w", err)
	}
	if m.Version != ResultsVersion || !isHex(m.LaunchID, 16) || len(m.Results) > MaxResults {
		return nil, fmt.Errorf("opening result manifest: version %d, launch_id %q or %d results not supported", m.Version, m.LaunchID, len(m.Results))
	}
	seen := map[string]bool{}
	for _, r := range m.Results {
		if !ValidFileName(r.Name) || seen[r.Name] || !isHex(r.SHA256, sha256.Size) || r.Size < 0 {
			return nil, fmt.Errorf("opening result manifest: entry %q is malformed or listed twice", r.Name)
		}
		seen[r.Name] = true
	}
	return &m, nil
}
