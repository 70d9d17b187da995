package lifecycle

import (
	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vm"
)

// stage is how far a record has come.
type stage string

const (
	stageNone      stage = "none"      // there is no record
	stageLaunching stage = "launching" // accepted, domain not begun
	stageStarting  stage = "starting"  // domain begun, not done
	stageStarted   stage = "started"
	stageUndoing   stage = "undoing"
	stageRevoking  stage = "revoking" // undoing, domain never begun
	stageEnded     stage = "ended"
)

func stageOf(r store.Guest) stage {
	switch domain := find(r.Steps, stepDomain); {
	case r.ID == "":
		return stageNone
	case !r.EndedAt.IsZero():
		return stageEnded
	case r.Undoing && domain == nil:
		return stageRevoking
	case r.Undoing:
		return stageUndoing
	case domain == nil:
		return stageLaunching
	case domain.DoneAt.IsZero() && r.Phase == "":
		return stageStarting
	}
	return stageStarted // one that spoke has started, whether or not that could be recorded
}

func find(steps []store.Step, name string) *store.Step {
	for i := range steps {
		if steps[i].Name == name {
			return &steps[i]
		}
	}
	return nil
}

// sight is what the hypervisor says of a guest.
type sight string

const (
	sightUnknown sight = "unknown" // it said nothing
	sightAbsent  sight = "absent"
	sightOurs    sight = "ours"  // of the record's generation
	sightOther   sight = "other" // of another, or without a mark
)

// action is what follows.
type action string

const (
	actWait   action = "wait"   // until the hypervisor speaks
	actNone   action = "none"   // all is well, or over
	actAdopt  action = "adopt"  // watch it
	actFinish action = "finish" // upload, take down, report
	actUndo   action = "undo"   // take down, report the launch as failed
	actReport action = "report" // leave it alone and say so
)

// decide is the whole reconciliation. It ends no domain that the record does
// not account for.
func decide(s stage, domain sight) action {
	switch {
	case s == stageEnded && domain == sightAbsent, s == stageNone && domain != sightOurs && domain != sightOther:
		return actNone
	case domain == sightUnknown:
		return actWait
	case domain == sightOther, s == stageNone, s == stageEnded, (s == stageLaunching || s == stageRevoking) && domain == sightOurs:
		return actReport
	case s == stageUndoing, s == stageRevoking, s == stageStarted && domain == sightAbsent:
		return actFinish
	case domain == sightOurs:
		return actAdopt
	}
	return actUndo
}

// ending is how a guest ends.
type ending struct {
	final api.GuestStatus
	why   *contract.Refusal
}

func failed(code, remedy, format string, args ...any) *ending {
	return &ending{api.GuestStatus_GUEST_STATUS_FAILED, contract.Refuse(code, remedy, format, args...)}
}

// cutShort says how a launch ends that came to no domain. fresh says that
// this run of the agent began it.
func cutShort(r store.Guest, bootID string, fresh bool) ending {
	switch {
	case r.Stop != nil:
		return ending{final: api.GuestStatus_GUEST_STATUS_STOPPED}
	case r.BootID != bootID:
		return *failed("host.rebooted", "launch again", "the host was started anew before the guest was")
	case fresh:
		return *failed("agent.launch-interrupted", "look at the agent's log on the host (is the disk of state_dir full?), then launch again",
			"the node's agent could not go on with the launch")
	}
	return *failed("agent.restarted", "launch again", "the node's agent was started anew before the guest was")
}

// codeEndedEarly: nobody said why the guest's machine is gone.
const codeEndedEarly = "guest.ended-early"

// verdict says how a guest ended whose domain is gone.
func verdict(r store.Guest, bootID string, cause vm.Cause) ending {
	switch _, done := r.Phases[contract.PhaseDone]; {
	case done:
		return ending{final: api.GuestStatus_GUEST_STATUS_FINISHED}
	case r.Stop != nil:
		return ending{final: api.GuestStatus_GUEST_STATUS_STOPPED}
	case r.GuestRefusal != nil:
		return ending{api.GuestStatus_GUEST_STATUS_FAILED, r.GuestRefusal}
	case r.BootID != bootID:
		return *failed("host.rebooted", "launch again", "the host was started anew while the guest ran")
	case cause == vm.CauseDied:
		return *failed("guest.crashed", "launch again; if it repeats, look on the host whether its memory was exhausted (journalctl -k: Out of memory, killed process) and into the domain's log",
			"the guest's machine was killed or crashed%s", lastWord(r))
	case cause == vm.CauseDestroyed:
		return *failed("guest.destroyed", "launch again, or ask the host's operator why",
			"somebody on the host ended the guest's machine%s", lastWord(r))
	}
	return *failed(codeEndedEarly, "launch again; a debug image in a trial without secrets shows its console",
		"the guest's machine ended without a word%s", lastWord(r))
}

func lastWord(r store.Guest) string {
	if r.Phase == "" {
		return ", it never spoke"
	}
	return ", its last one was " + string(r.Phase)
}

// due says whether a started guest's time is up, and if not, when it will be;
// the zero time means never.
func due(r store.Guest, c Config, now clock.Instant) (*ending, clock.Instant) {
	phase := func(p contract.GuestPhase) clock.Instant { return r.Phases[p] }
	var at clock.Instant
	var end *ending
	switch {
	case !phase(contract.PhaseDone).IsZero():
		at, end = phase(contract.PhaseDone).Add(c.PowerOffGrace), &ending{final: api.GuestStatus_GUEST_STATUS_FINISHED}
		if r.Stop != nil && r.Stop.Deadline.Before(at) {
			at = r.Stop.Deadline
		}
	case r.Stop != nil:
		at, end = r.Stop.Deadline, &ending{final: api.GuestStatus_GUEST_STATUS_STOPPED}
	case r.GuestRefusal != nil:
		at, end = phase(contract.PhaseFailed).Add(c.PowerOffGrace), &ending{api.GuestStatus_GUEST_STATUS_FAILED, r.GuestRefusal}
	case !phase(contract.PhaseCollecting).IsZero():
		at, end = phase(contract.PhaseCollecting).Add(c.CollectTimeout), failed("guest.collect-timeout",
			"make the results smaller, or launch again", "the guest did not deliver its results within %s", c.CollectTimeout)
	case !phase(contract.PhaseRunning).IsZero():
		at, end = phase(contract.PhaseRunning).Add(r.Limits.Run), failed("guest.run-timeout",
			"allow a longer run_timeout, up to the host's", "the workload did not end within %s", r.Limits.Run)
	default:
		at, end = r.AcceptedAt.Add(r.Limits.Start), startTimeout(r)
	}
	if now.Before(at) {
		return nil, at
	}
	return end, at
}

// startTimeout explains a start that took too long. A guest that was started
// and never spoke has most likely been stopped by its own firmware.
func startTimeout(r store.Guest) *ending {
	const code = "guest.start-timeout"
	switch {
	case find(r.Steps, stepDomain) == nil:
		return failed(code, "allow a longer start_timeout, or look at what the node waits for", "the launch was not ready within %s", r.Limits.Start)
	case r.Phase == "":
		return failed(code, "compare kernel and initrd on the host with the image's image.json; if they are right, look at the guest's console with a debug image",
			"the guest did not speak within %s: a kernel, initrd or command line that is not the measured one hangs in the firmware (OVMF) without a word", r.Limits.Start)
	}
	return failed(code, "look at what that phase waits for (broker, registry, size of the inputs), or allow a longer start_timeout",
		"the workload did not run within %s, the guest's last word was %s", r.Limits.Start, r.Phase)
}
