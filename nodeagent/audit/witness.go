package audit

import (
	"fmt"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/confidential-node/agent/firmware/contract"
)

// Codes of a witness's alarms.
const (
	// CodeReplaced: the host shows another log than before.
	CodeReplaced = "audit.replaced"
	// CodeForged: a checkpoint is not signed by the log's key.
	CodeForged = "audit.forged"
	// CodeRolledBack: the log is shorter than it was.
	CodeRolledBack = "audit.rolled-back"
	// CodeForked: the log does not contain what it did.
	CodeForked = "audit.forked"
	// CodeUnproven: the proof does not start from what the witness has.
	CodeUnproven = "audit.unproven"
)

// Witness remembers one host's log as it was last seen. The zero Witness
// believes the first log it is shown. It is for one goroutine at a time, and
// its fields are to be kept on disk by whoever holds it.
type Witness struct {
	Key  string    `json:"key"`
	Size int64     `json:"size"`
	Root tlog.Hash `json:"root"`
}

// Observe compares an offer with what was seen before, and moves on if the
// log only grew. A refusal is an alarm: the Witness stays where it was.
func (w *Witness) Observe(o Offer) (changed bool, alarm *contract.Refusal) {
	const keep = "take no new work to the host and ask its operator; what the log was is in the alarm and the events. If the loss is explained, resolve the alarm, and the log as it is counts from now on"
	refuse := func(code, format string, args ...any) (bool, *contract.Refusal) {
		return false, contract.Refuse(code, keep, format, args...)
	}
	if w.Key != "" && o.Key != w.Key {
		return refuse(CodeReplaced, "the host shows another audit log than the one of %d entries seen before", w.Size)
	}
	verifier, err := note.NewVerifier(o.Key)
	if err != nil {
		return refuse(CodeForged, "the audit log's key does not parse")
	}
	seen, err := openTree(o.Checkpoint, verifier)
	if err != nil {
		return refuse(CodeForged, "the audit log's checkpoint does not verify: %v", err)
	}
	switch {
	case w.Key == "":
		*w = Witness{o.Key, seen.size, seen.root}
		return true, nil
	case seen.size < w.Size:
		return refuse(CodeRolledBack, "the audit log has %d entries, it had %d", seen.size, w.Size)
	case seen.size == w.Size && seen.root != w.Root:
		return refuse(CodeForked, "the audit log has other entries among its %d than it had", w.Size)
	case seen.size == w.Size:
		return false, nil
	case o.From != w.Size:
		return refuse(CodeUnproven, "the audit log's proof goes from %d to %d entries, %d were seen before", o.From, seen.size, w.Size)
	}
	if err := tlog.CheckTree(o.Proof, seen.size, seen.root, w.Size, w.Root); err != nil {
		return refuse(CodeForked, "the audit log of %d entries does not contain the one of %d", seen.size, w.Size)
	}
	w.Size, w.Root = seen.size, seen.root
	return true, nil
}

// ParseProof reads the hashes of a proof from the wire. No proof of a log has
// more of them.
func ParseProof(raw [][]byte) ([]tlog.Hash, error) {
	const most = 64
	if len(raw) > most {
		return nil, fmt.Errorf("a proof of %d hashes, limit is %d", len(raw), most)
	}
	out := make([]tlog.Hash, 0, len(raw))
	for _, h := range raw {
		if len(h) != tlog.HashSize {
			return nil, fmt.Errorf("a hash of %d bytes", len(h))
		}
		out = append(out, tlog.Hash(h))
	}
	return out, nil
}
