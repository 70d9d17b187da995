// Package lifecycle takes guests from an accepted command to the end of their
// last trace on the host: a launch is a list of steps, each with its undo and
// with a look at what is left of it.
//
//	StopGuest, timeouts, the guest's own end
//	                │
//	accepted ─steps─┴▶ started ─watched─▶ undoing ──▶ ended
//	    │  a step fails, or the agent died  ▲  domain, metadata, tap, copies,
//	    └───────────────────────────────────┘  blobs gone, GPUs verified; results uploaded
//
// A record is on disk before what it speaks of: a step is begun before its
// first effect and done after its last, and undoing is decided before anything
// is undone. After a restart records and domains decide alone (decide.go): a
// guest that runs is adopted, a launch that was cut short is undone, and what
// cannot be accounted for is left alone, reported, and counted as used for as
// long as it is there (survey.go). Silence of the hypervisor decides nothing,
// and a domain is started at most once. The end of the agent ends no guest.
//
// The package never judges evidence, never opens what guests send, and holds
// no key. It believes a guest's word about itself for showing it, and for
// nothing that matters to anybody else.
//
// A Manager is safe for concurrent use. Each guest has one goroutine that
// decides and acts; everybody else changes its record under its lock and wakes
// it. Lock order: Manager.admission, guest.changing, guest.mu,
// Manager.mu.
package lifecycle
