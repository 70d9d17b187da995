package api

// CapabilityVersion is this build's protocol integer. The diary in the
// package comment says what each value added.
const CapabilityVersion = 4

// Features a command may require by name. A name means the whole behaviour:
// a node that does it in part does not list it.
const (
	// FeatureLaunchDirectBoot: guests boot from firmware, kernel and initrd
	// whose digests are part of the predicted launch digest.
	FeatureLaunchDirectBoot = "launch.direct-boot"
	// FeatureLaunchIDBlock: ID block and ID auth are passed to the firmware.
	FeatureLaunchIDBlock = "launch.id-block"
	// FeatureInputsAge: sealed inputs in age format, by presigned GET.
	FeatureInputsAge = "inputs.age"
	// FeatureResultsPresignedPut: results leave by presigned PUT.
	FeatureResultsPresignedPut = "results.presigned-put"
	// FeaturePortsAttestedTLS: ports served by TLS that ends in the guest.
	FeaturePortsAttestedTLS = "ports.attested-tls"
	// FeatureEvidenceRelay: RequestEvidence reaches a running guest.
	FeatureEvidenceRelay = "evidence.relay"
)

// Features returns the features every node of this build has, sorted.
// "audit.log" and "compliance.hipaa" are names the platform uses; they are
// missing on purpose, so that a job that needs them is refused.
func Features() []string {
	return []string{
		FeatureEvidenceRelay, FeatureInputsAge, FeatureLaunchDirectBoot, FeatureLaunchIDBlock,
		FeaturePortsAttestedTLS, FeatureResultsPresignedPut,
	}
}
