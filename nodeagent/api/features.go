package api

// CapabilityVersion is this build's protocol integer. The diary in the
// package comment says what each value added.
const CapabilityVersion = 4

// Features a command may require by name. A name means the whole behaviour:
// a node that does it in part does not list it.
const (
	// FeatureAuditLog: commands, refusals, launches and their ends are in a log
	// that only grows, whose signed checkpoint leaves in every heartbeat.
	FeatureAuditLog = "audit.log"
	// FeatureLaunchDirectBoot: guests boot from firmware, kernel and initrd
	// whose digests are part of the predicted launch digest.
	FeatureLaunchDirectBoot = "launch.direct-boot"
	// FeatureLaunchIDBlock: ID block and ID auth are passed to the firmware.
	FeatureLaunchIDBlock = "launch.id-block"
	// FeatureInputsAge: sealed inputs in age format, by presigned GET.
	FeatureInputsAge = "inputs.age"
	// FeatureResultsPresignedPut: results leave by presigned PUT.
	FeatureResultsPresignedPut = "results.presigned-put"
	// FeatureResultsPartGrants: results leave in parts, by upload grants.
	FeatureResultsPartGrants = "results.part-grants"
	// FeaturePortsAttestedTLS: ports served by TLS that ends in the guest.
	FeaturePortsAttestedTLS = "ports.attested-tls"
	// FeaturePortsServerName: ports reached by server name on a shared TLS
	// port. The host's configuration decides which names, if any.
	FeaturePortsServerName = "ports.server-name"
	// FeatureEvidenceRelay: RequestEvidence reaches a running guest.
	FeatureEvidenceRelay = "evidence.relay"
)

// Features returns the features every node of this build has, sorted.
// "compliance.hipaa" is a name the platform uses; it is missing on purpose, so
// that a job that needs it is refused.
func Features() []string {
	return []string{
		FeatureAuditLog, FeatureEvidenceRelay, FeatureInputsAge, FeatureLaunchDirectBoot, FeatureLaunchIDBlock,
		FeaturePortsAttestedTLS, FeaturePortsServerName, FeatureResultsPartGrants, FeatureResultsPresignedPut,
	}
}
