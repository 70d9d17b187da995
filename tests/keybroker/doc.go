// Package keybroker is a reference key broker for tenants: it speaks the
// Request-Challenge-Attestation-Response protocol of the Confidential
// Containers KBS, version 0.4.0, verifies the SEV-SNP evidence of a guest and
// that of its GPUs against what the tenant registered for that launch, counts
// releases, and hands out resources encrypted to the key that the report binds.
//
// The framing (paths, cookie, JSON names, error body, JWE) is Trustee's; the
// primary evidence is contract.BrokerEvidence, which Trustee does not know, the
// additional one the guest's GPU evidence.
//
// It owns its state folder (0700), alone (lock): launches/ID.json per registered
// launch with its resources, releases and latest refusals, and token.key, the
// ECDSA key that signs tokens. With a PKCS#11 token, resources are wrapped by a
// key in it, on disk and in memory, and opened to be given. A launch's record is on disk, synced, before the release
// it counts becomes visible. Resources are secrets: they are never logged, and
// they leave only as JWE.
//
// It must not trust the endorsements' or the bundle's own image description,
// and it never answers for another launch than the one the session attested.
//
// A Server is safe for concurrent use; one mutex guards sessions, another the
// launches, and no lock is held while a signature is checked.
package keybroker
