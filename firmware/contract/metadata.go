package contract

// The metadata service: HTTP/1.1 on the host's end of the guest's own tap.
// Whatever it serves is an untrusted hint to the guest, except the manifest,
// which HOST_DATA pins. Whatever it receives is untrusted bytes to the node.
const (
	// MetadataAddr is the host's address on every guest's tap, and
	// MetadataPort the TCP port. The listener is bound to that tap only.
	MetadataAddr = "fe80::1"
	MetadataPort = 80
	// MetadataHeader must be present on every request with MetadataToken as
	// its value, so that a browser-like client inside a guest cannot be
	// tricked into a request (as IMDSv2 and MMDS v2 do).
	MetadataHeader = "X-Nodeagent-Metadata"
	MetadataToken  = "1"

	PathManifest     = "/v1/manifest"     // GET: canonical manifest bytes
	PathNetwork      = "/v1/network"      // GET: NetworkFacts
	PathEndorsements = "/v1/endorsements" // GET: Endorsements
	PathBoot         = "/v1/boot"         // GET: BootComponents
	// PathChallenge: GET, long poll. 200 with Challenge, or 204 after
	// ChallengePollSeconds without one.
	PathChallenge = "/v1/challenge"
	PathEvidence  = "/v1/evidence" // POST: Evidence answering a challenge
	PathStatus    = "/v1/status"   // POST: GuestStatus
	// PathResults + name: PUT, the sealed result as a stream. The node
	// refuses names the manifest lacks, bytes over the quota, and anything
	// that is not an age file.
	PathResults = "/v1/results/"
	// PathResultManifest: PUT, the signed result manifest; ends the results.
	PathResultManifest = "/v1/result-manifest"

	// ChallengePollSeconds is how long a challenge poll is held open.
	ChallengePollSeconds = 20
	// MaxStatusBytes bounds a GuestStatus.
	MaxStatusBytes = 4 << 10
)

// NetworkFacts tell the guest how to reach the outside. Hints: a wrong one
// costs the guest its connection, nothing else.
type NetworkFacts struct {
	// Address is the guest's IPv4 address in CIDR form, Gateway the host's end.
	Address string `json:"address"`
	Gateway string `json:"gateway"`
	// DNS servers, may be empty.
	DNS []string `json:"dns,omitempty"`
	// Hosts are static names, as in /etc/hosts.
	Hosts map[string]string `json:"hosts,omitempty"`
	// MTU in bytes; 0 keeps the interface's.
	MTU int `json:"mtu,omitempty"`
	// UnixTime is the host's clock in seconds. A hint: nothing the guest
	// trusts depends on it.
	UnixTime int64 `json:"unix_time"`
}

// Challenge asks the guest for evidence over a verifier's nonce.
type Challenge struct {
	// ID is echoed in the URL query "id" of the evidence.
	ID    string `json:"id"`
	Nonce []byte `json:"nonce"`
}

// GuestPhase is how far a guest says it has come.
type GuestPhase string

// Phases in order. PhaseFailed may follow any.
const (
	PhaseBooted     GuestPhase = "booted"     // manifest fetched and equal to HOST_DATA
	PhaseAttested   GuestPhase = "attested"   // broker released the keys
	PhaseInputs     GuestPhase = "inputs"     // every input verified and opened
	PhaseImage      GuestPhase = "image"      // workload image pulled and unpacked
	PhaseRunning    GuestPhase = "running"    // workload started
	PhaseCollecting GuestPhase = "collecting" // workload ended, sealing results
	PhaseDone       GuestPhase = "done"       // results delivered, powering off
	PhaseFailed     GuestPhase = "failed"
)

// GuestStatus is a guest's own word about itself: shown, never relied upon.
type GuestStatus struct {
	Phase GuestPhase `json:"phase"`
	// UptimeMS is milliseconds since the guest's init started.
	UptimeMS int64 `json:"uptime_ms"`
	// Refusal says why, in PhaseFailed.
	Refusal *Refusal `json:"refusal,omitempty"`
	// ExitCode of the workload, in PhaseCollecting and PhaseDone.
	ExitCode int `json:"exit_code,omitempty"`
}
