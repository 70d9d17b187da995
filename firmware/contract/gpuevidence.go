package contract

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// Limits of GPU evidence.
const (
	MaxGPUs             = 8
	MaxGPUEvidenceBytes = 256 << 10
	GPUNonceBytes       = 32
)

// Architectures of GPUs that can prove themselves.
const (
	ArchHopper    = "HOPPER"
	ArchBlackwell = "BLACKWELL"
)

// GPUEvidence is what one GPU says about itself, in the form NVIDIA's own
// verifiers read. A guest's GPU evidence is the JSON array of one element per
// GPU, in order of their PCI addresses inside the guest.
type GPUEvidence struct {
	// Arch is ArchHopper or ArchBlackwell.
	Arch string `json:"arch"`
	// Nonce is that of the request, 64 hex digits.
	Nonce string `json:"nonce"`
	// Report is the transcript of GET_MEASUREMENTS (DMTF DSP0274 1.1).
	Report []byte `json:"evidence"`
	// Certificates are the GPU's in PEM, leaf first.
	Certificates []byte `json:"certificate"`
}

// EncodeGPUEvidence returns the bytes whose SHA-384 goes into REPORT_DATA.
func EncodeGPUEvidence(gpus []GPUEvidence) ([]byte, error) {
	data, err := json.Marshal(gpus)
	if err != nil {
		return nil, fmt.Errorf("encoding GPU evidence: %w", err)
	}
	if _, err := ParseGPUEvidence(data); err != nil {
		return nil, err
	}
	return data, nil
}

// ParseGPUEvidence decodes 1 to 8 GPUs' evidence and checks its form; it
// verifies nothing.
func ParseGPUEvidence(data []byte) ([]GPUEvidence, error) {
	var gpus []GPUEvidence
	if err := UnmarshalStrict(data, MaxGPUEvidenceBytes, &gpus); err != nil {
		return nil, fmt.Errorf("parsing GPU evidence: %w", err)
	}
	if len(gpus) == 0 || len(gpus) > MaxGPUs {
		return nil, fmt.Errorf("parsing GPU evidence: it is of %d GPUs, want 1 to %d", len(gpus), MaxGPUs)
	}
	for i, g := range gpus {
		if nonce, err := hex.DecodeString(g.Nonce); err != nil || len(nonce) != GPUNonceBytes {
			return nil, fmt.Errorf("parsing GPU evidence: GPU %d has the nonce %.80q, want %d hex digits", i, g.Nonce, 2*GPUNonceBytes)
		}
		if g.Arch != ArchHopper && g.Arch != ArchBlackwell {
			return nil, fmt.Errorf("parsing GPU evidence: GPU %d is of the architecture %.20q, known are %s and %s", i, g.Arch, ArchHopper, ArchBlackwell)
		}
		if len(g.Report) == 0 || len(g.Certificates) == 0 {
			return nil, fmt.Errorf("parsing GPU evidence: GPU %d lacks its report or its certificates", i)
		}
	}
	return gpus, nil
}

// AttestedGPU is what a GPU's evidence says of it; believe it only where no
// check failed.
type AttestedGPU struct {
	// Chip is as its certificates name it, "GH100".
	Chip string `json:"chip"`
	// PDI is the chip's own number, 0x and 16 hex digits.
	PDI string `json:"pdi"`
	// Board is project, SKU of the project and of the chip, as NVIDIA's
	// manifests name it.
	Board string `json:"board,omitempty"`
	// Driver is that of the guest, VBIOS that on the board.
	Driver string `json:"driver"`
	VBIOS  string `json:"vbios"`
	// Mode is "on" (CC), "multi-gpu" (CC with encrypted NVLinks) or "ppcie".
	Mode string `json:"mode"`
	// Emulated means that no silicon stands behind it.
	Emulated bool `json:"emulated"`
}

// GPUAppraisal is every check that was made of GPU evidence, and what else it
// tells.
type GPUAppraisal struct {
	Checks
	// GPUs are none unless all certificates and signatures hold.
	GPUs     []AttestedGPU
	Warnings []Warning
}

// gpuNonceLabel separates this use of REPORT_DATA from every other.
const gpuNonceLabel = "nodeagent gpu nonce v1"

// GPUNonce is the nonce every GPU of a guest has to answer, for either
// purpose: SHA-256 over a label and what REPORT_DATA were without GPU
// evidence. So the GPUs answer the verifier's nonce and the guest's keys, and
// REPORT_DATA then covers their answer.
func GPUNonce(withoutGPUs [ReportDataSize]byte) [GPUNonceBytes]byte {
	return sha256.Sum256(append([]byte(gpuNonceLabel), withoutGPUs[:]...))
}
