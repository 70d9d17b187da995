package tenant

import "github.com/confidential-node/agent/nodeagent/api"

// Features a node must have for what the user asked.
const (
	featureCompliance = "compliance." // + profile
	featureAudit      = "audit.log"
)

// features are what a node must have to carry the deployment out as asked.
func (o *DeployOptions) features() []string {
	out := []string{api.FeatureLaunchDirectBoot, api.FeatureEvidenceRelay, api.FeatureResultsPresignedPut}
	if len(o.Datasets)+len(o.Models) > 0 {
		out = append(out, api.FeatureInputsAge)
	}
	if o.inParts() {
		out = append(out, api.FeatureResultsPartGrants)
	}
	if len(o.Ports) > 0 {
		out = append(out, api.FeaturePortsAttestedTLS)
	}
	if len(o.ServerNames) > 0 {
		out = append(out, api.FeaturePortsServerName)
	}
	if o.IDBlock.Block != "" {
		out = append(out, api.FeatureLaunchIDBlock)
	}
	if o.Compliance != "" {
		out = append(out, featureCompliance+o.Compliance)
	}
	if o.AuditLogging {
		out = append(out, featureAudit)
	}
	return out
}
