// Package audit is the host's transparency log: what it was told, what it
// refused, what it launched, how that ended, and what an operator changed, in
// a Merkle tree that can only grow. It decides nothing and holds nothing
// secret: entries are ids, verbs, codes and digests.
//
// The log proves nothing while it stays on the host, whose owner can write
// what he likes. So a signed checkpoint leaves in every heartbeat, with the
// proof that its tree contains the one the control plane has confirmed before,
// and a Witness there alarms when that does not hold. What an owner never lets
// in is not seen by anybody; what was in once cannot be taken out or changed.
//
// # Files, in one folder, 0700
//
//	key         the log's signing key, as a note signer; the log's name is in it
//	entries     one entry per line, JSON, oldest first; only ever appended
//	hashes      the hashes of the tree in the order of tlog's storage index
//	checkpoint  the latest signed tree that was offered to a witness
//	witnessed   the latest one that was confirmed
//	lock        held for one change at a time
//
// An entry is synced before Append returns; its hashes follow and are made
// again from it after a crash. Both are synced before a checkpoint names them.
// A last line without its hash is an append that was never confirmed, and is
// cut off; anything else that does not check is damage.
//
// The formats are those of C2SP: checkpoints are signed notes, Export writes
// tlog-tiles. A Log is safe for concurrent use, also by several processes.
package audit
