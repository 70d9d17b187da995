package capability

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/nodeagent/api"
)

// Fill puts the conclusions into a capability report.
func Fill(c *api.Capability, machine host.Report, r Report) {
	c.SevSnp = wireSNP(machine)
	for _, k := range r.Components {
		c.Components = append(c.Components, &api.Component{
			Name: k.Name, Observed: k.Observed, Floor: k.Floor, FloorGpu: k.FloorGPU,
			Meets: wireConclusion(k.Meets), MeetsGpu: wireConclusion(k.MeetsGPU), Remedy: k.Remedy,
		})
	}
	c.Gpus = wireGPUs(r.GPUs)
	c.Endorsements = wireEndorsements(r.Endorsements)
}

func wireConclusion(c Conclusion) api.Conclusion {
	switch c {
	case Yes:
		return api.Conclusion_CONCLUSION_YES
	case No:
		return api.Conclusion_CONCLUSION_NO
	case Unknown:
	}
	return api.Conclusion_CONCLUSION_UNSPECIFIED
}

func wireSNP(r host.Report) *api.SEVSNP {
	f := r.Facts
	out := &api.SEVSNP{
		Enabled: r.Enabled, CpuFamily: uint32(f.CPU.Family), CpuModel: uint32(f.CPU.Model), CpuStepping: uint32(f.CPU.Stepping), Microcode: f.CPU.Microcode,
		CurrentTcb: wireTCB(r.CurrentTCB), ReportedTcb: wireTCB(r.ReportedTCB), ChipIds: f.ChipIDs, VlekLoaded: r.VLEKLoaded,
	}
	if p := r.Processor; p != nil {
		out.Processor, out.Generation, out.Product = p.Name, p.Generation, p.Product
	}
	if k := f.KVM; k != nil {
		out.KvmVmTypes = &k.VMTypes
	}
	if fw := r.Firmware; fw != nil {
		out.FirmwareVersion, out.FirmwareState = fw.Version, fw.State
	}
	if a := r.ASIDs; a != nil {
		out.Asids = &api.ASIDs{Total: a.Total, Free: a.Free, Returning: a.Returning, Source: a.Source}
	}
	for _, finding := range r.Findings {
		out.Findings = append(out.Findings, &api.Finding{
			Code: finding.Code, Level: string(finding.Level), Message: finding.Message, Remedy: finding.Remedy, Observed: finding.Observed,
		})
	}
	return out
}

func wireTCB(t *host.TCB) *api.TCBVersion {
	if t == nil {
		return nil
	}
	p := t.Parts
	return &api.TCBVersion{
		Raw: uint64(t.Raw), Fmc: uint32(p.FMC), BootLoader: uint32(p.BootLoader), Tee: uint32(p.TEE), Snp: uint32(p.SNP), Microcode: uint32(p.Microcode),
	}
}

func wireEndorsements(e *Endorsements) *api.EndorsementState {
	if e == nil {
		return nil
	}
	return &api.EndorsementState{
		Certificate: wireConclusion(e.Certificate), CertificateNotAfter: wireTime(e.CertificateNotAfter),
		RevocationList: wireConclusion(e.RevocationList), RevocationListNextUpdate: wireTime(e.RevocationListNextUpdate),
		Findings: wireRefusals(e.Findings),
	}
}

func wireTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func wireRefusals(refusals []*contract.Refusal) (out []*api.Finding) {
	for _, r := range refusals {
		out = append(out, &api.Finding{Code: r.Code, Level: string(host.Warning), Message: r.Message, Remedy: r.Remedy})
	}
	return out
}
