package api

import "github.com/confidential-node/agent/firmware/contract"

// Codes of refusals of a command before anything acts on it, in the order of
// the checks. Peers branch on them; they are never renamed.
const (
	// CodeOversize: the envelope is larger than MaxCommandBytes.
	CodeOversize = "command.oversize"
	// CodeMalformed: not one well-formed envelope of the command type, or a
	// payload that is not a command with every required field in range.
	CodeMalformed = "command.malformed"
	// CodeForged: no signature of an accepted issuer key holds.
	CodeForged = "command.forged"
	// CodeWrongAudience: signed for another host.
	CodeWrongAudience = "command.wrong-audience"
	// CodeCapabilityTooLow: min_capability is above CapabilityVersion.
	CodeCapabilityTooLow = "command.capability-too-low"
	// CodeUnknownField: the command says something this build cannot read.
	CodeUnknownField = "command.unknown-field"
	// CodeWindowTooLong: expires_at is more than MaxWindow after not_before.
	CodeWindowTooLong = "command.window-too-long"
	// CodeNotYetValid: not_before is in this host's future.
	CodeNotYetValid = "command.not-yet-valid"
	// CodeExpired: expires_at is in this host's past.
	CodeExpired = "command.expired"
	// CodeEpochUnknown: this store is not in the command's epoch yet. A new
	// or lost store answers everything but BeginEpoch with it.
	CodeEpochUnknown = "command.epoch-unknown"
	// CodeEpochStale: the command's epoch is older than this store's.
	CodeEpochStale = "command.epoch-stale"
	// CodeStoreMismatch: a BeginEpoch for another store than this one.
	CodeStoreMismatch = "command.store-mismatch"
	// CodeReplayed: the sequence is at or below the store's floor, so that
	// the command was carried out before or overtaken long ago; or it was
	// issued before its epoch was begun for this store.
	CodeReplayed = "command.replayed"
	// CodeFeatureUnknown: a required feature this node does not have.
	CodeFeatureUnknown = "command.feature-unknown"
)

// RefusalToWire converts a refusal for an event. The local cause stays here.
func RefusalToWire(r *contract.Refusal) *Refusal {
	if r == nil {
		return nil
	}
	return &Refusal{Code: r.Code, Message: r.Message, Remedy: r.Remedy}
}

// RefusalFromWire converts a refusal received in an event.
func RefusalFromWire(r *Refusal) *contract.Refusal {
	if r == nil {
		return nil
	}
	return &contract.Refusal{Code: r.GetCode(), Message: r.GetMessage(), Remedy: r.GetRemedy()}
}
