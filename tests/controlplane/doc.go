// Package controlplane is a reference control plane: an embedded NATS server
// with JetStream, the issuer's key, and an HTTPS API on top, so that anybody
// sees how a node is driven, and tests drive real nodes.
//
// It owns its folder (keys, counters, streams), its two listeners and nothing
// else. It is trusted with nothing that matters to a tenant: it sees
// manifests, presigned URLs, ciphertext digests and evidence, never keys or
// plaintext. It logs no command and no URL.
//
// It watches its hosts: it is the witness of their audit logs, and alarms on one
// that was rolled back or forked, and on two that speak as one. A host with an
// alarm gets no work until somebody resolves it.
//
// What is on disk: state.json before every command it numbers; the event
// stream is the log from which the view of nodes and guests is rebuilt at
// every start. Events are applied once by their id, in order of arrival, and
// only as far as they speak about the host that sent them.
//
// A Server is safe for concurrent use.
package controlplane
