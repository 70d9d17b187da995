// Package contract holds what tenant, guest, verifier and node agree on, as
// plain types and pure functions: the manifest whose SHA-256 is HOST_DATA, the
// two encodings of REPORT_DATA, the guest-facing metadata wire, the evidence
// bundle, the signed result manifest, the description of a guest image, and
// the refusal every party answers with.
//
// It does no I/O, keeps no state, and is the only package that every other one
// may import. All functions are safe for concurrent use. Anything decoded here
// comes from a party that is not trusted: decoding is strict (unknown fields,
// duplicate keys, trailing bytes and oversize input are refused) and fuzzed.
//
// # History
//
//   - 1 (2026-11): first version. Manifest 1, evidence 1, results 1, image 1,
//     metadata paths under /v1/.
package contract
