// Package link takes the control link over a network that misbehaves: a real
// NATS server and a real link, inbox and store, with a router between them in
// a namespace of its own, that forgets its translations, loses packets, goes
// silent or swallows large ones. It has tests only, and runs inside rig.Enter.
package link
