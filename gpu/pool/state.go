package pool

// State is where in its life a device is.
type State string

// States.
const (
	Unmanaged   State = "unmanaged"   // its own driver's, or nobody's
	Bound       State = "bound"       // ours, and nothing known of it
	Clean       State = "clean"       // verified: may be offered
	Reserved    State = "reserved"    // promised to a guest
	Attached    State = "attached"    // a guest's
	Dirty       State = "dirty"       // to be reset and verified
	Quarantined State = "quarantined" // until an operator decides
)

// Event moves a device from one state to another.
type Event string

// Events.
const (
	EventBound    Event = "bound"
	EventVerified Event = "verified"
	EventReserved Event = "reserved"
	// EventCancelled is the end of a reservation before the device was touched.
	EventCancelled Event = "cancelled"
	EventAttached  Event = "attached"
	EventReturned  Event = "returned"
	// EventRecheck is a start of the agent or an operator's reset: what was
	// true may no longer be.
	EventRecheck  Event = "recheck"
	EventFailed   Event = "failed"
	EventReleased Event = "released"
)

// States are all states, in the order of a life.
func States() []State {
	return []State{Unmanaged, Bound, Clean, Reserved, Attached, Dirty, Quarantined}
}

// Next is the whole transition table. False means that the event cannot
// happen to a device in that state.
func Next(s State, e Event) (State, bool) {
	next, ok := map[Event]map[State]State{
		EventBound:     {Unmanaged: Bound},
		EventVerified:  {Bound: Clean, Dirty: Clean},
		EventReserved:  {Clean: Reserved},
		EventCancelled: {Reserved: Clean},
		EventAttached:  {Reserved: Attached},
		EventReturned:  {Reserved: Dirty, Attached: Dirty},
		EventRecheck:   {Bound: Dirty, Clean: Dirty, Dirty: Dirty, Quarantined: Dirty},
		// Never from attached: the guest has it until it is gone.
		EventFailed:   {Unmanaged: Quarantined, Bound: Quarantined, Clean: Quarantined, Reserved: Quarantined, Dirty: Quarantined},
		EventReleased: {Unmanaged: Unmanaged, Bound: Unmanaged, Clean: Unmanaged, Dirty: Unmanaged, Quarantined: Unmanaged},
	}[e][s]
	return next, ok
}

// Step is one effect on hardware. Its name is on record while it is under way.
type Step string

// Steps.
const (
	StepNone   Step = ""
	StepBind   Step = "bind"   // hand it to vfio-pci
	StepVerify Step = "verify" // reset, mode on, read back
	StepCheck  Step = "check"  // read back before a guest gets it
	StepOff    Step = "off"    // CC off, memory cleared
	StepReturn Step = "return" // give it back to its driver
)

// Steps are all steps, in the order of a life.
func Steps() []Step { return []Step{StepBind, StepVerify, StepCheck, StepOff, StepReturn} }

// Points are where a device's life may be broken: before, inside and after
// each step, and after its record.
func Points() []string {
	var points []string
	for _, s := range Steps() {
		for _, at := range []string{"begun:", "inside:", "did:", "done:"} {
			points = append(points, at+string(s))
		}
	}
	return points
}

// due is the step that a record asks for by itself; StepCheck is asked for by
// a guest.
func due(r Record) Step {
	switch {
	case r.Leaving && r.Step == StepReturn:
		return StepReturn
	case r.Leaving:
		return StepOff
	case r.State == Unmanaged && r.Duty:
		return StepBind
	case r.State == Bound, r.State == Dirty:
		return StepVerify
	}
	return StepNone
}
