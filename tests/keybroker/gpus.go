package keybroker

import (
	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/evidence"
	"github.com/confidential-node/agent/gpu/spdm"
)

// validateGPUs refuses demands that no guest could ever meet.
func validateGPUs(demand *contract.GPU, pdis []string) *contract.Refusal {
	if demand == nil {
		if len(pdis) > 0 {
			return badRegistration("gpu_pdis: the manifest asks for no GPU")
		}
		return nil
	}
	if refused := gpu.Rule(demand.Model, demand.Count); refused != nil {
		return badRegistration("gpu: %s; %s", refused.Message, refused.Remedy)
	}
	if len(pdis) > brokerPDIs {
		return badRegistration("gpu_pdis: at most %d", brokerPDIs)
	}
	if _, err := spdm.ParsePDIs(pdis); err != nil {
		return badRegistration("gpu_pdis: %v", err)
	}
	return nil
}

// brokerPDIs bounds the list of a launch: that of a provider's whole hall.
const brokerPDIs = 4096

// shown refuses evidence of GPUs where none is wanted, and its absence where
// it is, before anything is verified.
func shown(a *attestation) *contract.Refusal {
	switch {
	case a.manifest.GPU == nil && a.additions != "":
		return contract.Refuse("broker.additional-evidence-unsupported", "send an empty additional_evidence for a launch without GPUs",
			"the attest request carries additional evidence, and the manifest asks for no GPU")
	case a.manifest.GPU != nil && a.additions == "":
		return contract.Refuse("broker.gpu-evidence-missing", "use a guest image that gathers evidence of its GPUs and sends it as additional_evidence",
			"the manifest demands %d × %s, and the attest request carries no evidence of GPUs", a.manifest.GPU.Count, a.manifest.GPU.Model)
	}
	return nil
}

// judgeGPUs judges those of a launch that asks for any; that the report covers
// their evidence is its own check, "report-data".
func (s *Server) judgeGPUs(a *attestation, r *record) ([]contract.AttestedGPU, *contract.Refusal) {
	demand := a.manifest.GPU
	if demand == nil {
		return nil, nil
	}
	without, err := contract.BrokerReportData("", a.nonce, a.rawKey)
	if err != nil {
		return nil, contract.Refuse("broker.request-malformed", protocolRemedy, "the runtime data cannot be canonicalised").Because(err)
	}
	pdis, err := spdm.ParsePDIs(r.Launch.GPUPDIs)
	if err != nil {
		return nil, contract.AsRefusal(err)
	}
	policy := evidence.Policy{
		Model: demand.Model, Count: demand.Count, PDIs: pdis, Manifests: s.cfg.GPUManifests, AllowUnmeasured: s.cfg.AllowUnmeasuredGPUs,
		EmulatedRoots: s.cfg.EmulatedRoots, Now: s.cfg.Now(),
	}
	judged := policy.Judge([]byte(a.additions), contract.GPUNonce(without))
	return judged.GPUs, refuseChecks(snp.Result{Checks: judged.Checks})
}
