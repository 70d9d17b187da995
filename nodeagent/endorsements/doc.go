// Package endorsements keeps the certificates that stand behind this host's
// attestation reports: VCEK or VLEK, ASK or ASVK, ARK, and the revocation list.
// It gets them ahead of time from AMD's key distribution service (KDS), from a
// bundle or from the operator, so that no launch ever waits for AMD: what a
// guest is served comes from memory, or from the operator's folder.
//
// Nothing is kept or imported unless it checks: the ARK is byte for byte the
// pinned one, intermediates and revocation lists are signed by it, and a VCEK
// was made for the chip and TCB it is filed under. Certificates are kept for
// ever; a revocation list is fetched anew once a day, never replaced by an
// older one, and never served after its nextUpdate. It decides nothing about
// evidence: to guests and verifiers everything here is a hint.
//
// # Layout of the cache, version 1
//
//	version.json                           {"version": 1}
//	lock                                   flock: pace.json, revocation lists
//	pace.json                              when AMD may be asked next
//	documents/PRODUCT/ark.der
//	documents/PRODUCT/vcek/ask.der
//	documents/PRODUCT/vcek/crl.der         its mtime is when it was fetched
//	documents/PRODUCT/vcek/HWID/TCB.der    hex; TCB is the u64 of the report
//	documents/PRODUCT/vlek/ask.der         the ASVK
//	documents/PRODUCT/vlek/crl.der
//	documents/PRODUCT/vlek/TCB.der
//
// A layout of another version is refused. Files are replaced whole, and checked
// each time they are read: one that is damaged counts as missing.
//
// Several processes may use one cache: the pace of one request per 10 seconds
// is theirs together. A Provider is safe for concurrent use; Run is its only
// long-lived work, started once by the supervisor.
package endorsements
