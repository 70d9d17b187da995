// Package hostile is what an attacking guest reports: whom it tried to reach
// and what it could read. The attacker itself is cmd/hostile, the init of a
// guest image of its own. For tests only; values only.
package hostile

// Environment variables of the manifest that tell the attacker what to do.
const (
	// EnvTargets is a comma-separated list of NAME=host:port.
	EnvTargets = "ATTACK_TARGETS"
	// EnvCollector is the URL that reports are posted to.
	EnvCollector = "ATTACK_COLLECTOR"
	// EnvResult, NAME:BYTES, has the guest attack nobody: it delivers one
	// result of so many bytes, sealed to nobody, and ends.
	EnvResult = "DELIVER_RESULT"
)

// Port is where an attacker listens, so that others have something to reach.
const Port = 8000

// Report is what one attacker found.
type Report struct {
	// LaunchID is the attacker's own.
	LaunchID string `json:"launch_id"`
	// Address is the attacker's own, with prefix length.
	Address string `json:"address"`
	// Reached maps every target to what happened: "open", or the error.
	Reached map[string]string `json:"reached"`
	// Metadata holds the launch_id of every manifest that metadata served,
	// asked at each address that could be thought of.
	Metadata []string `json:"metadata"`
	// Disks are the serial numbers of all block devices.
	Disks []string `json:"disks"`
	// LinkLocal is the attacker's own link-local address.
	LinkLocal string `json:"link_local"`
	// Neighbours are the IPv6 addresses that answered an echo to all nodes.
	Neighbours []string `json:"neighbours"`
}

// Open is the report on a target that accepted a connection.
const Open = "open"
