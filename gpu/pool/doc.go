// Package pool owns the life of the GPUs a host rents out: which of them the
// agent has taken over, in what state each one is, who has it, and what must
// be true before it is offered again.
//
//	unmanaged ─bind─▶ bound ─verify─▶ clean ─reserve─▶ reserved ─check─▶ attached
//	    ▲                               ▲ ◀───cancel────┘ │                 │
//	    │                               └──verify── dirty ◀──────return─────┘
//	    └──off, give back── (on command)             ▲ reset, on command
//	                                     any failure ─▶ quarantined
//
// state.go is the whole table. A record is on disk before each effect
// (Record.Step names the step that was begun) and after it, so that the next
// run finishes what a dead one began: bind and give back may be repeated, and
// everything else starts from a reset.
//
// Clean means: after the last reset the mode was read back and was the one
// GPUs wait in (CC on), nothing else is staged, and the device id (PDI) is the
// one noted before, wherever the device shows it. Nothing that fails this is
// offered: it is quarantined with reason, evidence and the operator's way out.
//
// Devices that the configuration does not name are never touched, and one that
// somebody uses is left to them. A GPU leaves duty only by the operator's
// command: CC is switched off, its memory seen to be cleared, and it goes back
// to the driver it came from.
//
// A Pool is safe for concurrent use. Each device has one worker at a time;
// what waits for a device waits for that device only.
package pool
