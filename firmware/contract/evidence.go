package contract

import (
	"encoding/json"
	"fmt"
)

// Limits of the evidence bundle.
const (
	EvidenceVersion  = 1
	MaxEvidenceBytes = 512 << 10
	// MinNonceBytes and MaxNonceBytes bound a verifier's nonce.
	MinNonceBytes = 16
	MaxNonceBytes = 64
)

// Evidence is what a guest hands to a verifier, directly at
// /.well-known/evidence or relayed by the node. The node relays it unopened.
type Evidence struct {
	// Version is EvidenceVersion.
	Version int `json:"version"`
	// Nonce is the verifier's, 16 to 64 bytes.
	Nonce []byte `json:"nonce"`
	// TLSSPKI is the DER SubjectPublicKeyInfo of the guest's TLS key. A
	// client compares it with its connection's after the handshake.
	TLSSPKI []byte `json:"tls_spki"`
	// ResultKey is the Ed25519 public key (32 bytes) that signs the results.
	ResultKey []byte `json:"result_key"`
	// GPUEvidence is opaque here; empty when the guest has no GPU.
	GPUEvidence []byte `json:"gpu_evidence,omitempty"`
	// Report is the SEV-SNP attestation report, 1184 bytes.
	Report []byte `json:"report"`
	// Manifest is the canonical manifest; its SHA-256 is HOST_DATA.
	Manifest []byte `json:"manifest"`
	// Endorsements and Boot are the host's hints, copied by the guest.
	// A verifier trusts the first through its signatures only, and shows the
	// second as information.
	Endorsements Endorsements   `json:"endorsements"`
	Boot         BootComponents `json:"boot"`
}

// Endorsements are the certificates behind a report, DER. VCEK may be a VLEK
// and ASK an ASVK.
type Endorsements struct {
	VCEK []byte `json:"vcek,omitempty"`
	ASK  []byte `json:"ask,omitempty"`
	ARK  []byte `json:"ark,omitempty"`
	CRL  []byte `json:"crl,omitempty"`
}

// BootComponents are the public inputs of the launch digest.
type BootComponents struct {
	FirmwareSHA256 string `json:"firmware_sha256"`
	KernelSHA256   string `json:"kernel_sha256"`
	InitrdSHA256   string `json:"initrd_sha256"`
	Cmdline        string `json:"cmdline"`
	VCPUs          int    `json:"vcpus"`
	CPUModel       string `json:"cpu_model"`
	GuestFeatures  uint64 `json:"guest_features"`
	// LaunchDigest is the node's prediction, 96 hex digits.
	LaunchDigest string `json:"launch_digest"`
	// Image is the image.json the node found beside the files.
	Image json.RawMessage `json:"image,omitempty"`
}

// ParseEvidence decodes a bundle and checks sizes; it verifies nothing.
func ParseEvidence(data []byte) (*Evidence, error) {
	var e Evidence
	if err := UnmarshalStrict(data, MaxEvidenceBytes, &e); err != nil {
		return nil, fmt.Errorf("parsing evidence: %w", err)
	}
	if e.Version != EvidenceVersion {
		return nil, fmt.Errorf("parsing evidence: version %d is not supported, this build knows %d", e.Version, EvidenceVersion)
	}
	if len(e.Nonce) < MinNonceBytes || len(e.Nonce) > MaxNonceBytes {
		return nil, fmt.Errorf("parsing evidence: nonce has %d bytes, need %d to %d", len(e.Nonce), MinNonceBytes, MaxNonceBytes)
	}
	return &e, nil
}

// BrokerEvidence is the primary evidence of the RCAR attest request, the
// value of tee-evidence.primary_evidence.
type BrokerEvidence struct {
	Report       []byte       `json:"report"`
	Manifest     []byte       `json:"manifest"`
	Endorsements Endorsements `json:"endorsements"`
}
